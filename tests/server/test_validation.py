"""Every fault of a reply is named, and what is good in the round is kept."""

from dataclasses import replace

import numpy as np
import pytest

from fltac.records import Rejection, Reply, Request
from fltac.server.validation import (
    LARGEST,
    LARGEST_PRODUCT,
    Expectations,
    Expected,
    accept_updates,
    product_fault,
    update_fault,
)
from server.builders import adapter, reply, server, state, update


def asked(*clients: str, **more: bool) -> list[Request]:
    return [Request(1, client, {}, {}, None, **more) for client in clients]


INITIAL = state("a", "b").initial
EXPECTED = Expectations(INITIAL, server(), 1)
GOOD = adapter(1.0, 2.0, 3.0)


def changed(**tensors: object) -> dict[str, object]:
    return {**GOOD, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


FAULTS = {
    "missing": ({k: v for k, v in GOOD.items() if k != "m.lora_B"}, "tensor m.lora_B is missing"),
    "bias": ({k: v for k, v in GOOD.items() if k != "head.2.bias"}, "tensor head.2.bias is missing"),
    "extra": (changed(other=np.zeros(1, np.float32)), "tensor other is not part of the adapter"),
    "shape": (
        changed(m__lora_A=np.zeros((2, 3), np.float32)),
        "tensor m.lora_A has shape [2, 3]; expected [1, 3]",
    ),
    "head": (changed(head__3__weight=np.zeros((3, 3), np.float32)), "tensor head.3.weight is not part of the adapter"),
    "dtype": (changed(m__lora_A=np.zeros((1, 3))), "tensor m.lora_A is float64; expected float32"),
    "nan": (
        changed(m__lora_B=np.array([[1], [np.nan]], np.float32)),
        "tensor m.lora_B has values that are not finite",
    ),
    "inf": (
        changed(m__lora_B=np.array([[1], [np.inf]], np.float32)),
        "tensor m.lora_B has values that are not finite",
    ),
    "large": (
        changed(m__lora_B=np.array([[1], [-2 * LARGEST]], np.float32)),
        "tensor m.lora_B has the value 2e+06; allowed are up to 1e+06",
    ),
    "headless": ({k: v for k, v in GOOD.items() if "head" not in k}, "it has no head"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_upload_is_named_and_the_others_are_used(fault: str) -> None:
    tensors, reason = FAULTS[fault]
    updates, rejections = accept_updates([reply("b", GOOD), reply("a", GOOD, tensors)], asked("a", "b"), EXPECTED)
    assert [item.key for item in updates] == [("a", 0), ("b", 0)]
    assert rejections == [Rejection("a", 1, reason)]


def test_an_empty_adapter_names_its_first_tensor() -> None:
    assert update_fault(update("a", 0, {}), "a", set(), Expected(INITIAL)) == "tensor m.lora_A is missing"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (update("b", 0, GOOD), "slot 0 claims to be of client 'b'"),
        (update("a", -1, GOOD), "slot is -1; allowed are numbers from 0"),
        (update("a", 4, GOOD), "slot 4 occurs twice"),
        (update("a", 0, GOOD, examples=0), "examples is 0; allowed are numbers from 1"),
    ],
)
def test_faults_beside_the_tensors(item: object, reason: str) -> None:
    assert update_fault(item, "a", {4}, Expected(INITIAL)) == reason  # type: ignore[arg-type]


def test_clients_that_fail_are_silent_or_were_not_asked() -> None:
    replies = [Reply("a", error="out of memory"), reply("x", GOOD), reply("c", GOOD), reply("c", adapter(9, 9))]
    updates, rejections = accept_updates(replies, asked("a", "b", "c"), EXPECTED)
    assert [item.client for item in updates] == ["c"]
    assert updates[0].adapter is GOOD
    assert set(rejections) == {
        Rejection("a", None, "out of memory"),
        Rejection("b", None, "no reply"),
        Rejection("c", None, "replied twice; the first reply counts"),
        Rejection("x", None, "was not asked in this round"),
    }


def test_the_order_of_replies_does_not_matter() -> None:
    replies = [reply("a", GOOD, GOOD), reply("b", GOOD)]
    one, other = (
        accept_updates(replies, asked("a", "b"), EXPECTED),
        accept_updates(replies[::-1], asked("b", "a"), EXPECTED),
    )
    assert [item.key for item in one[0]] == [item.key for item in other[0]] == [("a", 0), ("a", 1), ("b", 0)]


def test_large_values_are_refused_one_by_one_and_not_by_their_sum() -> None:
    """The fast check sees only the sum of squares; what fails it is looked at closely."""
    expected = Expected(INITIAL)
    assert update_fault(update("a", 0, adapter(LARGEST, -LARGEST, LARGEST)), "a", set(), expected) is None
    over = np.nextafter(np.float32(LARGEST), np.float32(np.inf))
    fault = update_fault(update("a", 0, {**GOOD, "m.lora_A": np.full((1, 3), over)}), "a", set(), expected)
    assert fault == "tensor m.lora_A has the value 1e+06; allowed are up to 1e+06"


def test_an_upload_has_both_parts_of_each_head_that_it_holds() -> None:
    expected = Expected(state("a", heads={"2": (2, 3), "1": (1, 3)}).initial)
    both = {**GOOD, **adapter(1, 2, 3, key="1", outputs=1)}
    for tensors in (GOOD, both):
        assert update_fault(update("a", 0, tensors), "a", set(), expected) is None
    part = {name: tensor for name, tensor in both.items() if name != "head.1.bias"}
    assert update_fault(update("a", 0, part), "a", set(), expected) == "tensor head.1.bias is missing"


def test_profiles_are_checked_and_may_be_missing() -> None:
    settings = server("server.clustering.profile_rows=8", "server.clustering.profile_noise=0.1")
    expected = Expectations(INITIAL, settings, 1)
    good = np.array([0.6, 0.8, 0.0], np.float32)
    faults = {
        "a": (good, None),
        "b": (good[:2], "profile has shape [2] and dtype float32; expected [3] of float32"),
        "c": (good * np.float32("nan"), "profile has norm nan; allowed are up to 2.74"),
        "d": (good * 9, "profile has norm 9; allowed are up to 2.74"),
        "e": (good.astype(np.float64), "profile has shape [3] and dtype float64; expected [3] of float32"),
        "f": (None, None),
    }
    replies = [
        Reply(client, (replace(update(client, 0, GOOD), profile=profile),)) for client, (profile, _) in faults.items()
    ]
    updates, rejections = accept_updates(replies, asked(*faults, profile=True), expected)
    assert [item.client for item in updates] == ["a", "f"]
    told = {item.client: item.reason for item in rejections}
    assert all(told[client].startswith(reason) for client, (_, reason) in faults.items() if reason is not None)
    unasked, (rejection,) = accept_updates(replies[:1], asked("a"), expected)
    assert (unasked, rejection.reason) == ([], "has a profile that was not asked for")


@pytest.mark.parametrize(
    ("rule", "refused"), [("flexlora", 1), ("flora", 1), ("fedex", 1), ("mean", 0), ("hetlora", 0)]
)
def test_a_product_beyond_what_can_be_sent_is_refused_where_it_is_decomposed(rule: str, refused: int) -> None:
    """One client's diverged factors, each of which could be sent, must not end the run for all others."""
    expected = Expectations(INITIAL, server(f"server.aggregation.rule={rule}"), 1)
    huge = adapter(300.0, 300.0)
    used, rejections = accept_updates([reply("a", huge), reply("b", GOOD)], asked("a", "b"), expected)
    assert len(used) == 2 - refused
    assert [item.reason for item in rejections] == [
        "the norms of the factors of m are 520 and 424; allowed are up to 60000 for their product"
    ] * refused
    edge = {**GOOD, "m.lora_A": np.array([[LARGEST_PRODUCT, 0, 0]], np.float32)}
    assert product_fault({**edge, "m.lora_B": np.array([[1], [0]], np.float32)}) is None
