"""Rounds in which all are one cluster before slots are grouped: what is kept, what is sent, what is told."""

from collections import defaultdict

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fltac.config import ServerSettings, load_config
from fltac.errors import InputError
from fltac.records import Adapter, Reply, RoundReport, ServerState, Update
from fltac.server.round import finish_round, init_server, plan_round
from server.builders import planted, server


def configured(*overrides: str) -> ServerSettings:
    config = load_config({"backbone": {"name": "x"}, "tasks": ["sst2", "rte", "mrpc"]}, overrides)
    return config.server_settings


def start(updates: list[Update], settings: ServerSettings) -> ServerState:
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    return init_server(settings, body, {"2": (2, 12)}, sorted({update.client for update in updates}))


def play(state: ServerState, updates: list[Update], settings: ServerSettings) -> tuple[ServerState, RoundReport]:
    """Each slot learns what its update holds, from whatever it was sent."""
    own = defaultdict(list)
    for update in updates:
        began = state.received(update.key)
        learned: Adapter = {name: began[name] + tensor for name, tensor in update.adapter.items()}
        own[update.client].append(Update(update.client, update.slot, learned, 1))
    replies = [Reply(client, tuple(held)) for client, held in own.items()]
    return finish_round(state, plan_round(state, settings), replies, settings)


def ari(state: ServerState, updates: list[Update], truth: list[int]) -> float:
    assigned = state.assignment()
    return float(adjusted_rand_score(truth, [assigned[update.key] for update in updates]))


@pytest.mark.parametrize("first", [None, 2, 3])
def test_all_are_together_until_the_round_that_is_named(first: int | None) -> None:
    updates, truth = planted(8, 3, noise=0.2)
    settings = configured(*([] if first is None else [f"server.clustering.from_round={first}"]))
    state = start(updates, settings)
    for number in range(1, 4):
        state, report = play(state, updates, settings)
        if number < (first or 2):
            (together,) = state.clusters
            assert set(together.members) == {update.key for update in updates}
            mean = np.mean([update.adapter["m.lora_B"] for update in updates], axis=0)
            np.testing.assert_allclose(together.adapter["m.lora_B"], number * mean, atol=1e-5)
            assert report.k is None
            assert not report.confidence
        else:
            assert report.k == 3
            assert ari(state, updates, truth) == 1.0
    assert max(cluster.id for cluster in state.clusters) == 2, "the one cluster goes on as one of the three"


def test_what_was_learned_before_counts_when_slots_are_grouped() -> None:
    """In the round that is grouped after nobody learns anything: what is known is from the one before."""
    updates, truth = planted(8, 3, noise=0.2)
    settings = configured()
    state, _ = play(start(updates, settings), updates, settings)
    still = [
        Update(item.client, item.slot, {name: np.zeros_like(part) for name, part in item.adapter.items()}, 1)
        for item in updates
    ]
    state, _ = play(state, still, settings)
    assert ari(state, updates, truth) == 1.0


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ((), 2),
        (("server.clustering.cannot_link=false",), 2),
        (("server.clustering.features=products",), 1),
        (("federation.rounds=1",), 1),
        (("server.clustering.assign=loss",), 1),
        (("server.aggregation.from_round=2",), 1),
        (("server.clustering.assign=loss", "server.clustering.assign_from=4", "server.clustering.from_round=3"), 3),
    ],
)
def test_when_slots_are_grouped_first(overrides: tuple[str, ...], first: int) -> None:
    updates, _ = planted(4, 3, noise=0.2)
    settings = configured(*overrides)
    state, found = start(updates, settings), 1
    while (result := play(state, updates, settings))[1].k is None:
        state, found = result[0], found + 1
    assert found == first


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("server.clustering.from_round=6",), "clustering.from_round: got 6; at most federation.rounds=5"),
        (("server.clustering.from_round=0",), "from_round: got 0; input should be greater"),
        (("method=fltac-paper", "server.clustering.from_round=2"), "from_round: got 2 with rule=kmeans; allowed with"),
        (
            ("server.clustering.assign=loss", "server.clustering.from_round=2"),
            "from_round: got 2, but clients choose among clusters from round assign_from=2 on; allowed: up to 1",
        ),
    ],
)
def test_what_it_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        server(*overrides)
