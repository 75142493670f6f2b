"""Gradients on the server: when they are asked for, which are refused, by what slots are grouped, what is kept."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fltac.config import GRADIENT_DIRECTIONS, ServerSettings, load_config
from fltac.errors import InputError
from fltac.records import Adapter, LateReply, Reply, RoundReport, ServerState, Update
from fltac.server import grouping
from fltac.server.directions import squared_agreement, squared_lengths
from fltac.server.gradients import GRADIENTS, gathered
from fltac.server.round import finish_round, init_server, plan_round
from fltac.server.similarity import kernel
from server.builders import server, with_gradients

TASKS, MATRICES, FEATURES = 3, 6, 24
SETTINGS = ("server.clustering.features=auto", "server.clustering.k=3")


def learned(clients: int, noise: float, seed: int = 0) -> tuple[list[Update], list[int]]:
    """Every client has every task; what A learns of a task, from zero, has a direction in common."""
    draw = np.random.default_rng(seed)
    common = draw.normal(size=(TASKS, MATRICES, FEATURES))
    updates, truth = [], []
    for client in range(clients):
        for slot, task in enumerate(draw.permutation(TASKS).tolist()):
            adapter: dict[str, np.ndarray] = {}
            for number in range(MATRICES):
                change = common[task, number] + noise * draw.normal(size=FEATURES)
                adapter[f"m{number}.lora_A"] = change[None].astype(np.float32)
                adapter[f"m{number}.lora_B"] = np.ones((FEATURES, 1), np.float32)
            adapter["head.2.weight"] = noise * draw.normal(size=(2, 12)).astype(np.float32)
            adapter["head.2.bias"] = np.zeros(2, np.float32)
            updates.append(Update(f"client-{client}", slot, adapter, 1))
            truth.append(task)
    return updates, truth


def start(updates: list[Update], settings: ServerSettings) -> ServerState:
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    state = init_server(settings, body, {"2": (2, 12)}, sorted({item.client for item in updates}))
    return replace(state, initial={name: np.zeros_like(tensor) for name, tensor in state.initial.items()})


def told(noise_of_changes: float, noise_of_gradients: float, clients: int = 8) -> tuple[list[Update], list[int]]:
    """Updates whose changes say so much of their tasks, with gradients that say so much."""
    updates, truth = learned(clients, noise_of_changes)
    clear, same = learned(clients, 0.0)
    assert truth == same
    state = start(updates, server(*SETTINGS))
    seen = with_gradients(clear, state.initial, noise_of_gradients)
    return [replace(item, gradients=other.gradients) for item, other in zip(updates, seen, strict=True)], truth


def play(
    state: ServerState, updates: list[Update], settings: ServerSettings, late: tuple[LateReply, ...] = ()
) -> tuple[ServerState, RoundReport]:
    clients = sorted({item.client for item in updates})
    replies = [Reply(client, tuple(item for item in updates if item.client == client)) for client in clients]
    requests = [request for request in plan_round(state, settings) if request.client in clients]
    return finish_round(state, requests, replies, settings, late=late)


def ari(state: ServerState, updates: list[Update], truth: list[int]) -> float:
    assigned = state.assignment()
    return float(adjusted_rand_score(truth, [assigned[item.key] for item in updates]))


@pytest.mark.parametrize(("changes", "gradients", "better"), [(20.0, 0.2, "gradients"), (0.2, 20.0, "changes")])
def test_slots_are_grouped_by_what_halves_agree_on(changes: float, gradients: float, better: str) -> None:
    updates, truth = told(changes, gradients)
    settings = server(*SETTINGS)
    after, report = play(start(updates, settings), updates, settings)
    assert not report.rejections
    assert report.agreement is not None
    assert max(report.agreement, key=lambda kind: report.agreement[kind]) == better  # type: ignore[index]
    assert ari(after, updates, truth) == 1.0
    blind = server("server.clustering.k=3")
    alone = [replace(item, gradients=None) for item in updates]
    assert (ari(play(start(alone, blind), alone, blind)[0], alone, truth) == 1.0) == (better == "changes")


def test_where_halves_cannot_be_compared_changes_count() -> None:
    """One matrix has no halves."""
    updates, truth = told(0.2, 20.0)
    one = [
        replace(
            item,
            adapter={name: x for name, x in item.adapter.items() if name[:2] in ("m0", "he")},
            gradients={"m0.lora_A": (item.gradients or {})["m0.lora_A"]},
        )
        for item in updates
    ]
    settings = server(*SETTINGS)
    after, report = play(start(one, settings), one, settings)
    assert report.agreement == {"gradients": 0.0, "changes": 0.0}
    assert ari(after, one, truth) == 1.0


def test_what_a_slot_said_first_is_kept_as_it_is() -> None:
    updates, truth = told(20.0, 0.2)
    settings = server(*SETTINGS)
    one, _ = play(start(updates, settings), updates, settings)
    later = [
        replace(
            item, gradients=None, adapter={name: x + 5 * np.sign(x) for name, x in item.adapter.items()}, examples=2
        )
        for item in updates
    ]
    assert not any(request.gradients for request in plan_round(one, settings))
    two, report = play(one, later, settings)
    assert not report.rejections
    assert ari(two, updates, truth) == 1.0
    for key, held in one.memory.items():
        assert held.keys() == two.memory[key].keys()
        for name, tensor in held.items():
            np.testing.assert_array_equal(tensor, two.memory[key][name])


def test_a_slot_that_comes_later_brings_its_own() -> None:
    updates, truth = told(20.0, 0.2)
    settings = server(*SETTINGS)
    state = start(updates, settings)
    early = [item for item in updates if item.client != "client-3"]
    one, _ = play(state, early, settings)
    asked = {request.client: request.gradients for request in plan_round(one, settings)}
    assert [client for client, wanted in asked.items() if wanted] == ["client-3"]
    now = [item if item.client == "client-3" else replace(item, gradients=None) for item in updates]
    two, report = play(one, now, settings)
    assert not report.rejections
    assert ari(two, updates, truth) == 1.0


def test_a_late_reply_brings_its_own() -> None:
    updates, truth = told(20.0, 0.2)
    settings = replace(server(*SETTINGS), stale="use")
    state = start(updates, settings)
    (request,) = [item for item in plan_round(state, settings) if item.client == "client-3"]
    early = [item for item in updates if item.client != "client-3"]
    one, _ = play(state, early, settings)
    late = LateReply(request, Reply("client-3", tuple(item for item in updates if item.client == "client-3")))
    two, report = play(one, [replace(item, gradients=None) for item in early], settings, (late,))
    assert not report.rejections
    assert report.stale == TASKS
    assert ari(two, updates, truth) == 1.0


def test_what_came_first_stays_when_more_comes_late() -> None:
    """A slow client is asked again before its late reply is there: the first one counts, for good."""
    updates, truth = told(20.0, 0.2)
    settings = replace(server(*SETTINGS), stale="use")
    state = start(updates, settings)
    others = [item for item in updates if item.client != "client-3"]
    own = tuple(item for item in updates if item.client == "client-3")
    one, _ = play(state, others, settings)
    again = next(item for item in plan_round(one, settings) if item.client == "client-3")
    known = [replace(item, gradients=None) for item in others]
    first = LateReply(
        next(item for item in plan_round(state, settings) if item.client == "client-3"), Reply("client-3", own)
    )
    two, _ = play(one, known, settings, (first,))
    turned = tuple(
        replace(
            item,
            adapter={name: -x for name, x in item.adapter.items()},
            gradients={name: np.ones_like(x) for name, x in (item.gradients or {}).items()},
        )
        for item in own
    )
    three, report = play(two, known, settings, (LateReply(again, Reply("client-3", turned)),))
    assert (report.stale, report.rejections) == (TASKS, ())
    for item in own:
        for name, tensor in two.memory[item.key].items():
            np.testing.assert_array_equal(tensor, three.memory[item.key][name])
    assert ari(three, updates, truth) == 1.0


@pytest.mark.parametrize("first", ["1", "2", "3", "auto"])
def test_who_comes_while_all_are_together_is_asked_too(first: str) -> None:
    updates, truth = told(20.0, 0.2)
    settings = server(*SETTINGS, f"server.clustering.from_round={first}")
    early = [item for item in updates if item.client in ("client-0", "client-1")]
    late = [item for item in updates if item not in early]
    state, _ = play(start(updates, settings), early, settings)
    for number in (2, 3, 4):
        known = [replace(item, gradients=None) for item in early]
        asked = {request.client for request in plan_round(state, settings) if request.gradients}
        assert asked == ({item.client for item in late} if number == 2 else set())
        now = late if number == 2 else [replace(item, gradients=None) for item in late]
        state, report = play(state, [*known, *now], settings)
        assert not report.rejections
    assert ari(state, updates, truth) == 1.0


def test_one_slot_alone_does_not_keep_all_others_out() -> None:
    updates, truth = told(20.0, 0.2)
    settings = server(*SETTINGS)
    one, _ = play(start(updates, settings), updates[:1], settings)
    assert len(one.clusters) == 1
    now = [replace(item, gradients=None) if item is updates[0] else item for item in updates]
    two, report = play(one, now, settings)
    assert not report.rejections
    assert ari(two, updates, truth) == 1.0


@pytest.mark.parametrize("k", ["3", "auto"])
def test_a_round_of_forgotten_slots_alone(k: str) -> None:
    """A late reply may be of a slot that was given up since."""
    updates, _ = told(0.2, 0.2, clients=1)
    settings = replace(server(*SETTINGS, f"server.clustering.k={k}"), stale="use")
    one, _ = play(start(updates, settings), updates, settings)
    (request,) = plan_round(one, settings)
    late = LateReply(request, Reply("client-0", tuple(replace(item, gradients=None) for item in updates)))
    gone = replace(one, memory={}, clusters=tuple(replace(cluster, members=()) for cluster in one.clusters))
    after, report = finish_round(gone, [], [], settings, late=(late,))
    assert (after.assignment(), report.k) == ({}, None)


def test_groups_that_are_hard_to_tell_stay_as_long_as_nothing_new_is_said() -> None:
    updates, _ = told(20.0, 2.0)
    settings = server(*SETTINGS)
    state, _ = play(start(updates, settings), updates, settings)
    first = state.assignment()
    for _ in range(4):
        state, _ = play(state, [replace(item, gradients=None) for item in updates], settings)
        assert state.assignment() == first


def test_kept_gradients_compare_as_second_moments() -> None:
    """The kernel of sketches that are wide enough is that of the second moments themselves, matrix by matrix."""
    updates, _ = told(1.0, 1.0, clients=3)
    state = start(updates, server(*SETTINGS))
    first = gathered(state, updates, {item.key: state.initial for item in updates}, 0)
    assert first.gradients.body.shape == (9, GRADIENT_DIRECTIONS, MATRICES * FEATURES)
    expected = np.zeros((9, 9))
    for name in sorted(updates[0].gradients or {}):
        rows = np.stack([(item.gradients or {})[name] for item in updates])
        lengths = np.sqrt(squared_lengths(rows))
        expected += np.sqrt(squared_agreement(rows, rows) / np.outer(lengths, lengths)) / MATRICES
    np.testing.assert_allclose(kernel(first.gradients, head=True), expected, atol=1e-4)
    assert all(held.keys() == {"body", "head.2", GRADIENTS} for held in first.memory().values())


@pytest.mark.parametrize(
    ("gradients", "reason"),
    [
        (None, "has no gradients, by which slots are compared"),
        ({}, "gradients: tensor m0.lora_A is missing"),
        (
            {"m0.lora_A": np.zeros((1, FEATURES), np.float32)},
            r"gradients: tensor m0.lora_A has shape [1, 24]; expected [3, 24]",
        ),
        (
            {"m0.lora_A": np.full((3, FEATURES), np.nan, np.float32)},
            "gradients: tensor m0.lora_A has values that are not finite",
        ),
        ({"x": np.zeros(1, np.float32)}, "gradients: tensor x is not part of the adapter"),
    ],
)
def test_gradients_that_cannot_be_used(gradients: Adapter | None, reason: str) -> None:
    updates, _ = told(0.2, 0.2)
    settings = server(*SETTINGS)
    sent = updates[0].gradients or {}
    bad = gradients if not gradients else {**sent, **gradients}
    updates[0] = replace(updates[0], gradients=bad)
    after, report = play(start(updates, settings), updates, settings)
    (rejection,) = report.rejections
    assert (rejection.client, rejection.slot, rejection.reason) == (*updates[0].key, reason)
    assert updates[0].key not in after.assignment()
    assert len(after.assignment()) == len(updates) - 1


def test_gradients_that_were_not_asked_for() -> None:
    updates, _ = told(0.2, 0.2)
    settings = server("server.clustering.k=3")
    _, report = play(start(updates, settings), updates, settings)
    assert {rejection.reason for rejection in report.rejections} == {"has gradients that were not asked for"}


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ((), True),
        (("server.clustering.features=gradients",), True),
        (("server.clustering.features=a",), False),
        (("server.clustering.features=products",), False),
        (("server.aggregation.rule=ffa",), True),
        (("server.clustering.rule=kmeans",), False),
        (("method=oracle",), False),
    ],
)
def test_who_is_asked(overrides: tuple[str, ...], asked: bool) -> None:
    settings = server("server.clustering.features=auto", *overrides)
    requests = plan_round(start(learned(2, 0.2)[0], settings), settings)
    assert {request.gradients for request in requests} == {asked}


def test_slots_without_heads_are_asked_and_whole_backbones_are_not() -> None:
    settings = server(*SETTINGS)
    state = init_server(settings, {"m.lora_A": (1, 3), "m.lora_B": (2, 1)}, {}, ["a"])
    assert plan_round(state, settings)[0].gradients
    whole = init_server(settings, {"m.weight": (2, 3)}, {}, ["a"])
    assert not plan_round(whole, settings)[0].gradients


def test_in_rounds_in_which_clients_choose_nobody_is_asked() -> None:
    updates, _ = told(0.2, 0.2)
    settings = server(*SETTINGS, "server.clustering.assign=loss")
    one, _ = play(start(updates, settings), updates, settings)
    requests = plan_round(replace(one, clients=(*one.clients, "new")), settings)
    assert {request.gradients for request in requests} == {False}
    assert all(request.candidates for request in requests)


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_where_a_is_not_trained_in_all_rounds_gradients_count_alone(rule: str) -> None:
    updates, truth = told(0.2, 0.2)
    settings = server(*SETTINGS, f"server.aggregation.rule={rule}")
    sent = [
        replace(item, adapter={name: x for name, x in item.adapter.items() if not name.endswith("lora_A")})
        for item in updates
    ]
    after, report = play(start(updates, settings), sent, settings)
    assert not report.rejections
    assert report.agreement is None
    assert ari(after, updates, truth) == 1.0


@pytest.mark.parametrize("noises", [(20.0, 0.2), (0.2, 20.0)])
def test_k_is_chosen_for_each_kind(noises: tuple[float, float]) -> None:
    updates, truth = told(*noises)
    settings = server("server.clustering.features=auto", "server.clustering.k=auto")
    after, report = play(start(updates, settings), updates, settings)
    assert report.k == TASKS
    assert report.residuals is not None
    assert ari(after, updates, truth) == 1.0


def test_from_round_two_they_are_kept_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, truth = told(20.0, 0.2)
    settings = server(*SETTINGS, "server.clustering.from_round=2")
    one, report = play(start(updates, settings), updates, settings)
    assert (report.k, len(one.clusters)) == (None, 1)
    two, report = play(one, [replace(item, gradients=None) for item in updates], settings)
    assert report.k == TASKS
    assert ari(two, updates, truth) == 1.0
    monkeypatch.setattr(grouping, "ENOUGH", 2.0)
    auto = server(*SETTINGS, "server.clustering.from_round=auto")
    waits, report = play(start(updates, auto), updates, auto)
    assert (report.k, len(waits.clusters)) == (None, 1)
    assert report.agreement is not None


def test_where_nothing_is_federated_nobody_is_asked() -> None:
    tree = {"backbone": {"name": "x"}, "tasks": ["sst2", "rte"]}
    federated = load_config(tree)
    assert federated.gradient_batches == 20
    pooled = load_config(tree, ["federation.pool=sum"])
    assert pooled.gradient_batches == 0
    requests = plan_round(start(learned(2, 0.2)[0], pooled.server_settings), pooled.server_settings)
    assert not any(request.gradients for request in requests)
    for more in ((), ("training.trainable=all",)):
        with pytest.raises(InputError, match=r"features: got 'gradients', but with federation\.pool nobody"):
            load_config(tree, ["federation.pool=sum", "server.clustering.features=gradients", *more])
