"""What slots learned while all were one cluster is given back when it divides."""

from collections import defaultdict

import numpy as np
import pytest

from fltac.config import ServerSettings
from fltac.errors import InputError
from fltac.records import Presence, ServerState, Update
from fltac.server.cohort import admit
from server.builders import configured, planted, play, server, start

NAMES = ("m.lora_A", "m.lora_B", "head.2.weight")


def rounds(settings: ServerSettings, updates: list[Update], count: int) -> list[ServerState]:
    """The states before and after so many rounds in which each slot learns the same again."""
    out = [start(updates, settings)]
    for _ in range(count):
        out.append(play(out[-1], updates, settings)[0])
    return out


def means(updates: list[Update], truth: list[int], name: str) -> dict[int, np.ndarray]:
    own = defaultdict(list)
    for update, task in zip(updates, truth, strict=True):
        own[task].append(update.adapter[name])
    return {task: np.mean(held, axis=0) for task, held in own.items()}


@pytest.mark.parametrize("share", [None, 1.0, 0.5, 0.0])
def test_clusters_go_on_from_what_their_members_learned_in_all_rounds(share: float | None) -> None:
    """Round 1: all learn their task, the mean of all remains. Round 2: the same, and they are told apart."""
    updates, truth = planted(8, 3, noise=0.2)
    settings = configured(*([] if share is None else [f"server.clustering.give_back={share}"]))
    before, _, after = rounds(settings, updates, 2)
    task_of = {update.key: task for update, task in zip(updates, truth, strict=True)}
    assert len(after.clusters) == 3
    for name in NAMES:
        by_task, overall = means(updates, truth, name), np.mean([update.adapter[name] for update in updates], axis=0)
        for cluster in after.clusters:
            own = by_task[task_of[cluster.members[0]]]
            expected = before.initial[name] + overall + own + (1.0 if share is None else share) * (own - overall)
            np.testing.assert_allclose(cluster.adapter[name], expected, atol=1e-5)


def test_with_all_of_it_clusters_are_where_they_would_be_if_they_had_been_told_apart_at_once() -> None:
    updates, _ = planted(8, 3, noise=0.2)
    late = rounds(configured("server.clustering.from_round=3"), updates, 3)[-1]
    soon = rounds(configured("server.clustering.from_round=1"), updates, 3)[-1]
    soon_by_members = {cluster.members: cluster.adapter for cluster in soon.clusters}
    for cluster in late.clusters:
        for name in NAMES:
            np.testing.assert_allclose(cluster.adapter[name], soon_by_members[cluster.members][name], atol=1e-5)


def test_it_is_kept_only_as_long_as_all_are_together() -> None:
    updates, _ = planted(8, 3, noise=0.2)
    none, one, two, three = rounds(configured("server.clustering.from_round=3"), updates, 3)
    assert not none.apart
    assert set(one.apart) == set(two.apart) == {update.key for update in updates}
    for key, held in one.apart.items():
        for name, tensor in held.items():
            assert tensor.dtype == np.float32
            np.testing.assert_allclose(two.apart[key][name], 2 * tensor, atol=1e-5)
    assert not three.apart


@pytest.mark.parametrize(
    "overrides",
    [
        ("server.clustering.give_back=0",),
        ("server.aggregation.rule=fedsa",),
        ("server.aggregation.rule=flexlora",),
        ("server.clustering.features=products",),
        ("method=fltac-paper",),
        ("method=local",),
    ],
)
def test_where_nothing_is_given_back_nothing_is_kept(overrides: tuple[str, ...]) -> None:
    updates, _ = planted(4, 3, noise=0.2)
    assert not any(state.apart for state in rounds(configured(*overrides), updates, 3))


def test_a_slot_that_was_not_there_counts_as_it_is() -> None:
    updates, truth = planted(6, 2, noise=0.2)
    settings = configured("server.clustering.k=2")
    others = [pair for pair in zip(updates, truth, strict=True) if pair[0].client != "client-5"]
    first, _ = play(start(updates, settings), [update for update, _ in others], settings)
    assert all(client != "client-5" for client, _ in first.apart)
    # What it is sent is v0, since `received` knows no cluster of it; so it learns from there.
    after, _ = play(first, updates, settings)
    task_of = {update.key: task for update, task in zip(updates, truth, strict=True)}
    name = "m.lora_B"
    overall = np.mean([update.adapter[name] for update, _ in others], axis=0)
    for cluster in after.clusters:
        own = [update for update in updates if update.key in cluster.members]
        assert {task_of[update.key] for update in own} == {task_of[own[0].key]}
        expected = [
            update.adapter[name] + (0 if update.client == "client-5" else update.adapter[name])  # v0's B is zero
            for update in own
        ]
        np.testing.assert_allclose(cluster.adapter[name], np.mean(expected, axis=0), atol=1e-5)
    assert np.abs(overall).max() > 0.01


def test_nothing_is_kept_of_a_slot_that_is_gone() -> None:
    updates, _ = planted(4, 3, noise=0.2)
    settings = configured()
    first, _ = play(start(updates, settings), updates, settings)
    there = [Presence("client-0", {0: {"2": (2, 12)}, 1: {"2": (2, 12)}})]
    kept = admit(first, there, settings)
    assert set(first.apart) - set(kept.apart) == {("client-0", 2)}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("server.clustering.give_back=-1",), "give_back: got -1; input should be greater"),
        (
            ("method=fltac-paper", "server.clustering.give_back=1"),
            "give_back: got 1 with rule=kmeans and server.aggregation.rule=mean; allowed with spectral and mean",
        ),
        (
            ("server.aggregation.rule=flora", "server.clustering.give_back=0.5"),
            "give_back: got 0.5 with rule=spectral and server.aggregation.rule=flora; allowed with",
        ),
    ],
)
def test_what_it_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        server(*overrides)
