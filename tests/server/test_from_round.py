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
    """Changes of A are compared, if nothing else is said."""
    usual = ["server.clustering.features=a"]
    config = load_config({"backbone": {"name": "x"}, "tasks": ["sst2", "rte", "mrpc"]}, [*usual, *overrides])
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
    state, found = start(updates, settings), []
    for _ in range(3):
        state, report = play(state, updates, settings)
        found.append(report.k)
    assert found[:first] == [None] * (first - 1) + [3]


def test_a_round_without_replies_does_not_stand_for_the_one_in_which_all_are_together() -> None:
    """Else slots would be grouped by what they learned from v0."""
    updates, truth = planted(6, 3, noise=0.2)
    settings = configured()
    state = start(updates, settings)
    state, report = finish_round(state, plan_round(state, settings), [], settings)
    assert not state.clusters
    state, report = play(state, updates, settings)
    assert report.k is None
    assert len(state.clusters) == 1
    state, report = play(state, updates, settings)
    assert report.k == 3
    assert ari(state, updates, truth) == 1.0


def test_nobody_chose_to_put_all_together() -> None:
    """So hysteresis does not defend it where the server chooses K."""
    updates, truth = planted(8, 2, noise=0.2)
    alone = [
        Update(f"client-{number}", 0, item.adapter, 1) for number, item in enumerate(updates)
    ]  # of one slot each, so that cannot-link allows one cluster
    settings = configured("server.clustering.k=auto", "server.clustering.hysteresis=0.9")
    state, _ = play(start(alone, settings), alone, settings)
    state, report = play(state, alone, settings)
    assert report.k == 2
    assert ari(state, alone, truth) == 1.0


def test_clusters_do_not_go_on_with_the_momentum_of_all() -> None:
    updates, _ = planted(6, 3, noise=0.2)
    settings = configured("server.aggregation.optimizer=fedavgm", "server.aggregation.momentum=0.5")
    first, _ = play(start(updates, settings), updates, settings)
    assert set(first.optimizer) == {0}
    state, _ = play(first, updates, settings)
    plain, _ = play(first, updates, configured())
    assert set(state.optimizer) == {0, 1, 2}
    for ours, theirs in zip(state.clusters, plain.clusters, strict=True):
        for name, tensor in theirs.adapter.items():
            np.testing.assert_allclose(ours.adapter[name], tensor, atol=1e-5)


def test_among_one_cluster_clients_do_not_choose() -> None:
    """The only round that groups has no replies: the next one groups by uploads, too."""
    updates, truth = planted(6, 3, noise=0.2)
    settings = configured(
        "server.clustering.assign=loss", "server.clustering.assign_from=3", "server.clustering.from_round=2"
    )
    state, _ = play(start(updates, settings), updates, settings)
    state, _ = finish_round(state, plan_round(state, settings), [], settings)
    assert not any(request.candidates for request in plan_round(state, settings))
    state, _ = play(state, updates, settings)
    assert ari(state, updates, truth) == 1.0
    assert all(request.candidates == (0, 1, 2) for request in plan_round(state, settings))


def test_a_slot_that_was_sent_v0_began_from_it() -> None:
    """Planned without saying which slots are there: one that was never heard of is sent v0, and counts from it."""
    updates, _ = planted(4, 2)
    settings = configured("server.clustering.from_round=3")
    others = [item for item in updates if item.client != "client-3"]
    state, _ = play(start(updates, settings), others, settings)
    requests = plan_round(state, settings)
    asked = next(request for request in requests if request.client == "client-3")
    assert asked.slots == {}
    assert asked.initial is state.initial
    nothing = Reply("client-3", (Update("client-3", 0, state.initial, 1),))
    after, report = finish_round(state, requests, [nothing], settings)
    assert report.updates == 1
    assert not after.memory["client-3", 0]["body"].any()


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
        (
            ("server.aggregation.from_round=3", "server.clustering.from_round=2"),
            "clustering.from_round: got 2, but with server.aggregation.from_round=3 .*; allowed: 1",
        ),
        (("federation.pool=sum", "server.clustering.from_round=2"), "from_round: got 2; at most federation.rounds=1"),
    ],
)
def test_what_it_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        server(*overrides)
