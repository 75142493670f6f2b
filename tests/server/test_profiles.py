"""Profiles on the server: who is asked for one, what is kept, and what is compared."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fltac.config import ServerSettings
from fltac.errors import InputError
from fltac.records import Presence, Reply, ServerState, Update
from fltac.server import spectrum
from fltac.server.changes import PROFILE, remember
from fltac.server.round import finish_round, init_server, plan_round
from fltac.server.similarity import kernel, views
from fltac.server.spectrum import embedding
from server.builders import planted, server

ASKS = "server.clustering.profile_rows=8"
HIDDEN = 12


def noisy(clients: int, tasks: int) -> tuple[list[Update], list[int]]:
    """Updates that say nothing of their tasks, with profiles that do."""
    updates, truth = planted(clients, tasks, seed=1, noise=30.0)
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(tasks, HIDDEN)) / 10
    common = np.full(HIDDEN, 0.2)
    return [
        replace(item, profile=(common + centres[task] + draw.normal(0, 0.02, HIDDEN)).astype(np.float32))
        for item, task in zip(updates, truth, strict=True)
    ], truth


def start(updates: list[Update]) -> ServerState:
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    return init_server(server(ASKS), body, {"2": (2, HIDDEN)}, sorted({item.client for item in updates}))


def play(before: ServerState, updates: list[Update], settings: ServerSettings) -> ServerState:
    clients = sorted({item.client for item in updates})
    replies = [Reply(client, tuple(item for item in updates if item.client == client)) for client in clients]
    after, report = finish_round(before, plan_round(before, settings), replies, settings)
    assert report.rejections == tuple(item for item in report.rejections if item.reason == "no reply")
    return after


@pytest.mark.parametrize("k", ["3", "auto"])
def test_profiles_group_what_adapters_do_not(k: str) -> None:
    updates, truth = noisy(8, 3)
    settings = server(ASKS, f"server.clustering.k={k}")
    assigned = play(start(updates), updates, settings).assignment()
    assert adjusted_rand_score(truth, [assigned[item.key] for item in updates]) == 1.0
    alone = [replace(item, profile=None) for item in updates]
    blind = play(start(updates), alone, settings).assignment()
    assert adjusted_rand_score(truth, [blind[item.key] for item in updates]) < 0.5


@pytest.mark.parametrize("k", ["3", "auto"])
def test_profiles_that_say_nothing_of_the_tasks_do_not_count(k: str) -> None:
    updates, truth = planted(8, 3, seed=1, noise=0.2)
    draw = np.random.default_rng(3)
    topics = draw.normal(0, 0.1, (3, HIDDEN))
    own = {f"client-{number}": draw.permutation(3) for number in range(8)}  # not in the order of the tasks
    told = [
        replace(item, profile=(topics[own[item.client][item.slot]] + draw.normal(0, 0.01, HIDDEN)).astype(np.float32))
        for item in updates
    ]
    settings, first = server(ASKS, f"server.clustering.k={k}"), start(updates)
    replies = [Reply(client, tuple(item for item in told if item.client == client)) for client in sorted(own)]
    after, report = finish_round(first, plan_round(first, settings), replies, settings)
    assigned = after.assignment()
    assert adjusted_rand_score(truth, [assigned[item.key] for item in updates]) == 1.0
    assert report.evidence()["profiled"] is False
    assert PROFILE in after.memory[updates[0].key], "they may count in a later round"


def test_a_client_is_asked_until_all_its_slots_have_one() -> None:
    updates, _ = noisy(3, 2)
    settings = server(ASKS)
    first = start(updates)
    assert [request.profile for request in plan_round(first, settings)] == [True] * 3
    assert not any(request.profile for request in plan_round(first, server()))
    silent = [replace(item, profile=None) if item.client == "client-1" else item for item in updates]
    after = play(first, silent, settings)
    assert [request.profile for request in plan_round(after, settings)] == [False, True, False]
    more = [Presence("client-0", {0: {}, 1: {}, 2: {}}), Presence("client-2", {0: {}, 1: {}})]
    assert [request.profile for request in plan_round(after, settings, more)] == [True, False], "a new slot"
    again = play(after, [replace(item, profile=None) for item in updates], settings)
    for item in updates:
        kept = again.memory[item.key].get(PROFILE)
        assert (kept is None) == (item.client == "client-1"), "what was sent once is kept"


def test_the_kernel_adds_the_cosine_of_centred_profiles() -> None:
    updates, _ = noisy(4, 3)
    first = start(updates)
    some = [updates[0], *updates[2:]]
    mixed = [replace(updates[1], profile=None), *some]
    changes = remember(
        first, sorted(mixed, key=lambda item: item.key), dict.fromkeys([u.key for u in mixed], first.initial), 1.0, 0
    )
    values = np.stack([item.profile for item in some]).astype(np.float64)
    values -= values.mean(axis=0)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    expected = np.zeros((12, 12))
    places = [0, *range(2, 12)]
    expected[np.ix_(places, places)] = 3 * values @ values.T
    np.testing.assert_allclose(
        kernel(changes, True, 3.0) - kernel(replace(changes, profiles=None), True), expected, atol=1e-5
    )
    subset = np.array([1, 4, 5])
    assert changes.only(np.array([1])).profiles is None
    np.testing.assert_array_equal(changes.only(subset).profiles.rows, [1, 2])  # type: ignore[union-attr]
    (by, within), *_ = views(changes, True, 3.0)
    assert by[0, 2] - within[0, 2] != pytest.approx(0, abs=1e-3)
    assert PROFILE not in changes.memory()[updates[1].key]
    np.testing.assert_array_equal(changes.memory()[updates[0].key][PROFILE], updates[0].profile)


def test_many_slots_are_compared_without_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, _ = noisy(6, 3)
    first = start(updates)
    changes = remember(first, updates, {item.key: first.initial for item in updates}, 1.0, 0)
    exact = embedding(changes, True, 3, 0, 2.0)
    monkeypatch.setattr(spectrum, "WHOLE", 5)
    points = embedding(changes, True, 3, 0, 2.0)
    np.testing.assert_allclose(points @ points.T, exact @ exact.T, atol=1e-2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((ASKS, "method=fltac-paper"), "got 8 with rule=kmeans; allowed with spectral"),
        (("server.clustering.profile_noise=0.1",), "profile_noise needs profile_rows"),
    ],
)
def test_what_profiles_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        server(*overrides)
