"""Slots are grouped after the first round where groups found in halves of what they learned agree."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fltac.config import ServerSettings, load_config
from fltac.errors import InputError
from fltac.records import Adapter, Reply, RoundReport, ServerState, Update
from fltac.server import agreement as module
from fltac.server.agreement import ENOUGH, agreement
from fltac.server.changes import Changes, Vectors, remember
from fltac.server.clustering import group
from fltac.server.round import finish_round, init_server, plan_round
from fltac.server.similarity import kernel
from fltac.server.spectrum import embedding

AUTO = "server.clustering.from_round=auto"
MATRICES, TASKS = 6, 3


def settings_of(*overrides: str) -> ServerSettings:
    usual = [AUTO, "server.clustering.features=a"]
    return load_config(
        {"backbone": {"name": "x"}, "tasks": ["sst2", "rte", "mrpc"]}, [*usual, *overrides]
    ).server_settings


def learned(clients: int, noise: float, seed: int = 0) -> tuple[list[Update], list[int]]:
    """Every client has every task; of a task the changes of A and of the head have a direction in common."""
    draw = np.random.default_rng(seed)
    sizes = {**{f"m{number}.lora_A": (1, 24) for number in range(MATRICES)}, "head.2.weight": (2, 12)}
    common = [{name: draw.normal(size=shape) for name, shape in sizes.items()} for _ in range(TASKS)]
    updates, truth = [], []
    for client in range(clients):
        for slot, task in enumerate(draw.permutation(TASKS).tolist()):
            adapter: dict[str, np.ndarray] = {}
            for name, shape in sizes.items():
                adapter[name] = (common[task][name] + noise * draw.normal(size=shape)).astype(np.float32)
                if "lora" in name:
                    adapter[name.replace("_A", "_B")] = np.ones((24, 1), dtype=np.float32)
            adapter["head.2.bias"] = np.zeros(2, dtype=np.float32)
            updates.append(Update(f"client-{client}", slot, adapter, 1))
            truth.append(task)
    return updates, truth


def start(updates: list[Update], settings: ServerSettings) -> ServerState:
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    return init_server(settings, body, {"2": (2, 12)}, sorted({update.client for update in updates}))


def play(state: ServerState, updates: list[Update], settings: ServerSettings) -> tuple[ServerState, RoundReport]:
    """Each slot learns what its update holds, from whatever it was sent."""
    own: dict[str, list[Update]] = {}
    for update in updates:
        began = state.received(update.key)
        after: Adapter = {name: began[name] + tensor for name, tensor in update.adapter.items()}
        own.setdefault(update.client, []).append(Update(update.client, update.slot, after, 1))
    replies = [Reply(client, tuple(held)) for client, held in own.items()]
    return finish_round(state, plan_round(state, settings), replies, settings)


def changes_of(updates: list[Update]) -> Changes:
    state = start(updates, settings_of())
    zero = {name: np.zeros_like(tensor) for name, tensor in state.initial.items()}
    began = {update.key: zero for update in updates}
    return remember(replace(state, initial=zero), updates, began, 1.0, 0, of_a=True)


def agreed(changes: Changes, k: int = TASKS, seed: int = 0) -> float | None:
    return agreement(changes, True, k, 2, seed, 8.0, 1.5, True)


def test_where_halves_agree_slots_are_grouped_after_the_first_round() -> None:
    updates, truth = learned(8, noise=0.3)
    settings = settings_of()
    state, report = play(start(updates, settings), updates, settings)
    assert report.k == TASKS
    assert report.agreement == {"changes": 1.0}
    assigned = state.assignment()
    assert adjusted_rand_score(truth, [assigned[update.key] for update in updates]) == 1.0
    _, report = play(state, updates, settings)
    assert report.agreement is None, "asked once"


@pytest.mark.parametrize("overrides", [(), ("server.clustering.features=products",)])
def test_where_they_do_not_all_stay_together_for_one_round(overrides: tuple[str, ...]) -> None:
    updates, _ = learned(8, noise=30.0)
    settings = settings_of(*overrides)
    state, report = play(start(updates, settings), updates, settings)
    assert report.k is None
    assert report.agreement is not None
    assert report.agreement["changes"] < ENOUGH
    (together,) = state.clusters
    assert set(together.members) == {update.key for update in updates}
    state, report = play(state, updates, settings)
    assert (report.k, report.agreement) == (TASKS, None)


def test_after_a_round_without_replies_it_is_asked_again() -> None:
    updates, _ = learned(8, noise=0.3)
    settings = settings_of()
    state = start(updates, settings)
    state, _ = finish_round(state, plan_round(state, settings), [], settings)
    _, report = play(state, updates, settings)
    assert (report.k, report.agreement) == (TASKS, {"changes": 1.0})


def test_it_is_the_mean_over_halves_of_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two matrices each half is one of them, whatever the draw."""
    changes = changes_of(learned(10, noise=3.0)[0])
    changes = replace(changes, modules=changes.modules[:2])
    owners = [client for client, _ in changes.keys]
    halves = [
        group(embedding(replace(changes, modules=(part,)), True, TASKS + 2, 0, 8.0, 1.5), TASKS, owners, 50, 7)
        for part in changes.modules
    ]
    expected = adjusted_rand_score(*halves)
    monkeypatch.setattr(module, "STARTS", 50)  # so that both find the best grouping
    found = agreed(changes)
    assert found is not None
    assert expected < 1
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_more_noise_the_less_agreement() -> None:
    found = [agreed(changes_of(learned(10, noise)[0])) for noise in (0.3, 2.0, 30.0)]
    assert found[0] == 1.0
    assert found[0] > (found[1] or 0) > (found[2] or 0)
    assert abs(found[2] or 0) < 0.3


@pytest.mark.parametrize(("most", "of_each", "expected"), [(30, 1, 30), (9, 11, 33)])
def test_of_many_slots_a_sample_of_whole_clients_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, most: int, of_each: int, expected: int
) -> None:
    changes = changes_of(learned(40, noise=0.3)[0])
    seen: list[tuple[str, ...]] = []

    def watched(part: Changes, *rest: Any) -> np.ndarray:
        seen.append(tuple(client for client, _ in part.keys))
        return kernel(part, *rest)

    monkeypatch.setattr(module, "MOST", most)
    monkeypatch.setattr(module, "OF_EACH", of_each)
    monkeypatch.setattr(module, "kernel", watched)
    assert agreed(changes) == 1.0
    assert len(set(seen)) == 1
    assert expected <= len(seen[0]) < expected + 2 * TASKS
    assert all(seen[0].count(client) == TASKS for client in seen[0])


def test_where_there_is_nothing_to_compare_all_stay_together() -> None:
    updates, _ = learned(8, noise=0.3)
    changes = changes_of(updates)
    assert agreed(changes) == 1.0
    assert agreed(replace(changes, modules=changes.modules[:1])) is None
    assert agreed(changes, k=len(changes.keys) // 2 + 1) is None
    assert agreed(changes, k=1) is None
    few = [update for update in updates if update.client != "client-0"]
    assert agreed(replace(changes, body=np.zeros_like(changes.body))) is None, "heads alone have no halves"
    settings = settings_of()
    state, report = play(start(updates, settings), few, settings)
    assert (report.k, report.agreement, len(state.clusters)) == (None, {"changes": 1.0}, 1), "seven clients"
    _, alone = play(start(updates, settings), few, settings_of("server.clustering.cannot_link=false"))
    assert alone.k == TASKS, "without cannot-link they are enough"
    _, report = play(state, updates, settings)
    assert report.k == TASKS


def test_few_clients_agree_by_chance_and_enough_of_them_do_not() -> None:
    """Why there is a least number of clients: noise alone, with cannot-link."""
    chance = [
        agreed(
            changes_of(
                learned(8, noise=30.0, seed=seed)[0],
            )
        )
        or 0.0
        for seed in range(5)
    ]
    assert max(chance) < ENOUGH / 2


@pytest.mark.parametrize(("noise", "k"), [(0.3, TASKS), (30.0, None)])
def test_with_k_chosen_by_the_server(noise: float, k: int | None) -> None:
    updates, _ = learned(8, noise)
    settings = settings_of("server.clustering.k=auto")
    _, report = play(start(updates, settings), updates, settings)
    assert report.k == k
    assert report.residuals


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("federation.rounds=1",), r"clustering.from_round: got auto \(1 or 2\); at most federation.rounds=1"),
        (("method=fltac-paper", AUTO), "from_round: got auto with rule=kmeans; allowed with spectral"),
        (
            ("server.clustering.assign=loss",),
            "from_round: got auto, but clients choose among clusters from round assign_from=2 on; allowed: up to 1",
        ),
        (("server.aggregation.from_round=2",), "got auto, but with server.aggregation.from_round=2 .*; allowed: 1"),
        (
            ("server.clustering.from_round=some",),
            "from_round: got 'some'; input should be a valid integer, unable to parse string as an integer, or 'auto'",
        ),
    ],
)
def test_what_it_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        settings_of(*overrides)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is known yet; one entry for each half that is grouped."""
    calls: list[int] = []

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return group(*arguments)

    monkeypatch.setattr(module, "group", counting)
    monkeypatch.setattr(module, "KNOWN", {})
    return calls


def test_what_is_asked_again_is_not_computed_again(counted: list[int]) -> None:
    changes = changes_of(learned(8, noise=3.0)[0])
    first = agreed(changes)
    halves = len(counted)
    assert agreed(replace(changes, body=changes.body.copy())) == first
    assert len(counted) == halves > 0


def test_other_evidence_or_settings_are_another_question(counted: list[int]) -> None:
    changes = changes_of(learned(8, noise=3.0)[0])
    other, heads = changes.body.copy(), changes.heads["2"]
    other[0, 0, 0] += 1
    profiles = Vectors(np.arange(4), np.ones((4, 1, 5), dtype=np.float32))
    variants = [
        changes,
        replace(changes, body=other),
        replace(changes, heads={"2": Vectors(heads.rows, heads.values * 2)}),
        replace(changes, heads={"2": Vectors(heads.rows[:-1], heads.values[:-1])}),
        replace(changes, profiles=profiles),
        replace(changes, profiles=Vectors(profiles.rows + 1, profiles.values)),
        replace(changes, modules=changes.modules[:-1]),
        replace(changes, keys=tuple((f"{client}x", slot) for client, slot in changes.keys)),
        replace(changes, of_a=False, body=changes.body[:, :1]),
    ]
    asked = [(True, TASKS, 2, 0, 8.0, 1.5, True)] * len(variants)
    usual = asked[0]
    for place, value in enumerate((False, TASKS - 1, 3, 1, 4.0, 1.0, False)):
        variants.append(changes)
        asked.append((*usual[:place], value, *usual[place + 1 :]))  # type: ignore[arg-type]
    seen = []
    for variant, how in zip(variants, asked, strict=True):
        before = len(counted)
        agreement(variant, *how)
        seen.append(len(counted) - before)
    assert min(seen) > 0
    assert len(module.KNOWN) == len(variants)


def test_not_more_answers_are_kept_than_a_few(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    changes = changes_of(learned(8, noise=0.3)[0])
    assert [agreed(changes, seed=seed) for seed in range(7)] == [1.0] * 7
    assert len(module.KNOWN) <= 3
