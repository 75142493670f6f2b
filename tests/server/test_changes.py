"""What the server remembers of each slot: sums over rounds, and sizes."""

from dataclasses import replace

import numpy as np
import pytest

from fltac.records import Adapter, Cluster, ServerState, Update
from fltac.server import changes
from fltac.server.changes import Changes, received_by, remember, width_for, width_of
from fltac.server.similarity import kernel
from server.builders import update
from server.reference import products

SHAPES = {"m.lora_A": (2, 5), "m.lora_B": (4, 2), "n.lora_A": (2, 3), "n.lora_B": (6, 2)}


def random_adapter(draw: np.random.Generator, key: str = "2") -> Adapter:
    shapes = {**SHAPES, f"head.{key}.weight": (int(key), 4), f"head.{key}.bias": (int(key),)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def first_state(draw: np.random.Generator, clients: int = 2) -> ServerState:
    initial = {**random_adapter(draw, "2"), **random_adapter(draw, "3")}
    return ServerState(0, initial, tuple(f"c{number}" for number in range(clients)))


def remembered(state: ServerState, updates: list[Update], decay: float, seed: int, of_a: bool = False) -> Changes:
    """Where all updates began from what their slots were last sent."""
    received = received_by(state)
    began = {update.key: received.get(update.key, state.initial) for update in updates}
    return remember(state, updates, began, decay, seed, of_a)


def test_memory_sums_with_decay_what_each_round_added() -> None:
    """Six rounds with bases that change, one slot that is asked every other round and one whose head changes."""
    draw = np.random.default_rng(7)
    state = first_state(draw)
    expected: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for number in range(6):
        keys = [("c0", 0), ("c1", 0)] if number % 2 == 0 else [("c0", 0)]
        received = {key: cluster.adapter for cluster in state.clusters for key in cluster.members}
        updates = [update(*key, random_adapter(draw, "2" if key[0] == "c0" else "3")) for key in keys]
        memory = remembered(state, updates, 0.5, seed=0).memory()
        for item in updates:
            before = {**state.initial, **received.get(item.key, {})}
            old = expected.get(item.key, {})
            change = products(before, item.adapter)
            expected[item.key] = {name: 0.5 * old.get(name, 0.0) + values for name, values in change.items()}
        clusters = tuple(
            Cluster(index, item.adapter, (item.key,)) for index, item in enumerate(sorted(updates, key=lambda u: u.key))
        )
        state = replace(state, memory=memory, clusters=clusters)
    assert list(state.memory) == [("c0", 0), ("c1", 0)]
    for key, held in expected.items():
        found = state.memory[key]
        body = np.concatenate([held["m"], held["n"]])
        np.testing.assert_allclose(found["body"], body[None], atol=1e-4)
        name = "head.2" if key[0] == "c0" else "head.3"
        assert set(found) == {"body", name}
        np.testing.assert_allclose(found[name], held[name][None], atol=1e-5)


@pytest.mark.parametrize("of_a", [False, True])
def test_a_slot_without_an_update_keeps_its_memory_undecayed(of_a: bool) -> None:
    draw = np.random.default_rng(0)
    state = first_state(draw)
    both = [update("c0", 0, random_adapter(draw)), update("c1", 0, random_adapter(draw))]
    one = remembered(state, both, 0.5, 0, of_a)
    two = remembered(replace(state, memory=one.memory()), [update("c0", 0, random_adapter(draw))], 0.5, 0, of_a)
    for name in ("body", "head.2"):
        before, after = one.memory()["c1", 0][name], two.memory()["c1", 0][name]
        np.testing.assert_array_equal(after[:1], before)
        assert len(after) == 1 + of_a
        assert not after[1:].any(), "room for a second direction, where there is one"
    assert not np.array_equal(two.memory()["c0", 0]["body"], one.memory()["c0", 0]["body"])


def test_a_slot_may_change_its_head() -> None:
    draw = np.random.default_rng(1)
    state = first_state(draw)
    one = remembered(state, [update("c0", 0, random_adapter(draw, "2"))], 0.5, 0).memory()
    two = remembered(replace(state, memory=one), [update("c0", 0, random_adapter(draw, "3"))], 0.5, 0).memory()
    assert set(two["c0", 0]) == {"body", "head.2", "head.3"}
    np.testing.assert_allclose(two["c0", 0]["head.2"], 0.5 * one["c0", 0]["head.2"])


@pytest.mark.parametrize("of_a", [False, True])
def test_blocks_do_not_matter(of_a: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, in the second with two slots that are new."""
    draw = np.random.default_rng(2)
    first, second = ([update("c0", slot, random_adapter(draw)) for slot in range(count)] for count in (5, 7))
    state = first_state(draw)

    def played() -> Changes:
        one = remembered(state, first, 1.0, 0, of_a)
        return remembered(replace(state, memory=one.memory()), second, 1.0, 0, of_a)

    whole = played()
    monkeypatch.setattr(changes, "BLOCK", 1)
    np.testing.assert_allclose(kernel(played(), True), kernel(whole, True), atol=1e-5)


def test_a_newcomer_beside_slots_with_a_past() -> None:
    """It has one direction, they have two; each is as like itself as it should be."""
    draw = np.random.default_rng(4)
    state = first_state(draw)
    one = remembered(state, [update("c0", 0, random_adapter(draw))], 1.0, 0, of_a=True)
    state = replace(state, memory=one.memory())
    news = random_adapter(draw)
    two = remembered(state, [update("c0", 0, random_adapter(draw)), update("c1", 0, news)], 1.0, 0, of_a=True)
    change = np.concatenate([(news[name] - state.initial[name]).ravel() for name in ("m.lora_A", "n.lora_A")])
    held = two.memory()["c1", 0]["body"]
    np.testing.assert_allclose(np.abs(held.sum(axis=0)), np.abs(change), atol=1e-5)
    assert (np.abs(held) > 1e-6).any(axis=1).sum() == 1
    np.testing.assert_allclose(np.diag(kernel(two, True)), 1.5, atol=1e-5)


def test_a_slot_of_a_that_changes_its_head_has_both() -> None:
    """Heads of different keys have nothing in common; beside a slot of one of them it counts by its share."""
    draw = np.random.default_rng(5)
    state = first_state(draw)
    two, three = random_adapter(draw, "2"), random_adapter(draw, "3")
    one = remembered(state, [update("c0", 0, two), update("c1", 0, two)], 1.0, 0, of_a=True)
    both = [update("c0", 0, three), update("c1", 0, two)]
    found = remembered(replace(state, memory=one.memory()), both, 1.0, 0, of_a=True)
    heads = 2 * kernel(replace(found, modules=()), True)
    squares = [
        sum(float(((item[name] - state.initial[name]) ** 2).sum()) for name in item if name.startswith("head."))
        for item in (two, three)
    ]
    np.testing.assert_allclose(np.diag(heads), 1.0, atol=1e-5)
    # Second moments of c0: squares[0] of one key, squares[1] of the other; of c1: twice squares[0] of the first.
    expected = (2 * squares[0] ** 2 / (np.hypot(*squares) * 2 * squares[0])) ** 0.5
    np.testing.assert_allclose(heads[0, 1], expected, atol=1e-4)


def test_the_more_clients_the_less_is_kept_of_each_slot() -> None:
    widths = [width_for(clients) for clients in (1, 10, 25, 50, 100, 1000, 10**6)]
    assert widths == [8192, 8192, 4096, 1024, 256, 128, 128]


def test_memory_is_views() -> None:
    draw = np.random.default_rng(3)
    found = remembered(first_state(draw), [update("c0", 0, random_adapter(draw))], 1.0, 0)
    assert np.shares_memory(found.memory()["c0", 0]["body"], found.body)
    assert np.shares_memory(found.memory()["c0", 0]["head.2"], found.heads["2"].values)


def test_clients_that_join_do_not_change_what_is_kept_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "WIDEST", 16)
    monkeypatch.setattr(changes, "NARROWEST", 4)
    monkeypatch.setattr(changes, "ROOM", 64)
    draw = np.random.default_rng(3)
    state = first_state(draw)
    one = remembered(state, [update("c0", 0, random_adapter(draw))], 1.0, 0)
    assert width_of(state) == 16
    grown = replace(state, clients=tuple(f"c{number}" for number in range(9)), memory=one.memory())
    assert width_for(9) == 4
    assert width_of(grown) == 16
    two = remembered(grown, [update("c8", 0, random_adapter(draw))], 1.0, 0)
    np.testing.assert_array_equal(two.memory()["c0", 0]["body"], one.memory()["c0", 0]["body"])
