"""The server's part of assignment by loss: what is sent to choose from, what is accepted, and the means of IFCA."""

from dataclasses import replace

import numpy as np
import pytest

from fltac.config import load_config
from fltac.errors import InputError
from fltac.records import Cluster, LateReply, Presence, Rejection, Reply, ServerState, Update
from fltac.server.cohort import admit
from fltac.server.round import finish_round, init_server, plan_delivery, plan_round
from server.builders import BODY, HEADS, adapter, reply, server, state, update

IFCA = ("method=ifca", "server.clustering.k=3")


def ifca_state(*clients: str, overrides: tuple[str, ...] = IFCA) -> ServerState:
    return init_server(server(*overrides), BODY, HEADS, clients)


def chose(client: str, *choices: tuple[int | None, float]) -> Reply:
    return Reply(
        client,
        tuple(
            replace(update(client, slot, adapter(value, value)), cluster=cluster)
            for slot, (cluster, value) in enumerate(choices)
        ),
    )


def value(cluster: Cluster) -> float:
    return float(cluster.adapter["m.lora_A"][0, 0])


def test_ifca_begins_with_k_adapters_drawn_apart() -> None:
    body = {"m.lora_A": (4, 100), "m.lora_B": (200, 4)}
    first = init_server(server(*IFCA, "server.clustering.spread=0.1"), body, {"2": (2, 50)}, ["a"])
    assert [cluster.id for cluster in first.clusters] == [0, 1, 2]
    assert all(cluster.members == () for cluster in first.clusters)
    assert first.next_cluster_id == 3
    for name in ("m.lora_A", "m.lora_B", "head.2.weight"):
        drawn = [cluster.adapter[name] for cluster in first.clusters]
        assert not any(np.array_equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert first.clusters[0].adapter["m.lora_B"].std() == pytest.approx(0.1, rel=0.1)
    assert not first.initial["m.lora_B"].any(), "v0 still changes nothing"
    plain = init_server(server("method=fltac"), body, {"2": (2, 50)}, ["a"])
    np.testing.assert_array_equal(plain.initial["m.lora_A"], first.initial["m.lora_A"])
    assert plain.clusters == ()


def test_every_client_is_sent_all_clusters_and_no_v0() -> None:
    first = ifca_state("a", "b")
    for request in plan_round(first, server(*IFCA)):
        assert request.candidates == (0, 1, 2)
        assert set(request.adapters) == {0, 1, 2}
        assert request.initial is None
    after, _ = finish_round(first, plan_round(first, server(*IFCA)), [chose("a", (2, 5.0))], server(*IFCA))
    (delivered, _) = plan_delivery(after, server(*IFCA))
    assert (delivered.candidates, set(delivered.adapters)) == ((), {2}), "afterwards its own clusters alone"


def test_a_head_that_a_candidate_lacks_brings_v0() -> None:
    newcomer = Presence("n", {0: {"3": (3, 3)}})
    grown = admit(ifca_state("a"), [newcomer], server(*IFCA))
    (request,) = plan_round(grown, server(*IFCA), [newcomer])
    assert request.initial is grown.initial
    assert "head.3.weight" in grown.initial


def test_updates_are_averaged_where_they_chose_to_be() -> None:
    """Unweighted, as in the paper; a cluster that nobody chose keeps its adapter; both slots of b chose the same."""
    first = ifca_state("a", "b", "c")
    replies = [chose("a", (0, 2.0), (1, 7.0)), chose("b", (0, 4.0), (0, 9.0))]
    after, report = finish_round(first, plan_round(first, server(*IFCA)), replies, server(*IFCA))
    assert after.assignment() == {("a", 0): 0, ("a", 1): 1, ("b", 0): 0, ("b", 1): 0}
    assert [value(cluster) for cluster in after.clusters[:2]] == [5.0, 7.0]
    assert after.clusters[2].adapter is first.clusters[2].adapter
    assert (report.k, report.silhouette) == (2, None)
    again, _ = finish_round(after, plan_round(after, server(*IFCA)), [chose("a", (1, 1.0), (1, 3.0))], server(*IFCA))
    assert again.assignment() == {("a", 0): 1, ("a", 1): 1, ("b", 0): 0, ("b", 1): 0}, "b was not heard and stays"
    assert [value(cluster) for cluster in again.clusters[:2]] == [5.0, 2.0]


def test_with_half_of_the_clients_the_others_stay_where_they_are() -> None:
    settings = server(*IFCA, "federation.participation=0.5")
    first = ifca_state("a", "b", overrides=(*IFCA, "federation.participation=0.5"))
    current, seen = first, set()
    for _ in range(8):
        (request,) = plan_round(current, settings)
        before = current.assignment()
        current, _ = finish_round(current, [request], [chose(request.client, (1, 1.0))], settings)
        seen.add(request.client)
        others = {key: cluster for key, cluster in current.assignment().items() if key[0] != request.client}
        assert others == {key: cluster for key, cluster in before.items() if key[0] != request.client}
    assert seen == {"a", "b"}


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        (7, "has chosen cluster 7; it was sent 0, 1, 2"),
        (-1, "has chosen cluster -1; it was sent 0, 1, 2"),
        (None, "has chosen no cluster"),
    ],
)
def test_a_choice_that_was_not_sent_is_refused(cluster: int | None, reason: str) -> None:
    first = ifca_state("a")
    replies = [chose("a", (cluster, 2.0), (1, 3.0))]
    after, report = finish_round(first, plan_round(first, server(*IFCA)), replies, server(*IFCA))
    assert report.rejections == (Rejection("a", 0, reason),)
    assert after.assignment() == {("a", 1): 1}


def test_a_choice_that_nobody_asked_for_is_refused() -> None:
    settings, first = server("method=fltac"), state("a")
    after, report = finish_round(first, plan_round(first, settings), [chose("a", (0, 2.0))], settings)
    assert report.rejections == (Rejection("a", 0, "names cluster 0, but was not asked to choose"),)
    assert after.assignment() == {}


def test_a_late_choice_counts_and_is_checked_against_its_own_request() -> None:
    settings = server(*IFCA, "federation.stale=use")
    first = ifca_state("a", "b")
    (_, slow) = plan_round(first, settings)
    before, _ = finish_round(first, plan_round(first, settings), [chose("a", (0, 2.0))], settings)
    arrived = [LateReply(slow, chose("b", (0, 6.0), (9, 1.0)))]
    after, report = finish_round(before, plan_round(before, settings), [chose("a", (0, 4.0))], settings, None, arrived)
    assert after.assignment() == {("a", 0): 0, ("b", 0): 0}
    assert value(after.clusters[0]) == 5.0
    assert Rejection("b", 1, "has chosen cluster 9; it was sent 0, 1, 2") in report.rejections


def test_one_client_more_clusters_than_updates_and_nobody() -> None:
    first = ifca_state("a")
    after, report = finish_round(first, plan_round(first, server(*IFCA)), [chose("a", (1, 0.0))], server(*IFCA))
    assert (report.k, len(after.clusters)) == (1, 3)
    none, report = finish_round(after, plan_round(after, server(*IFCA)), [Reply("a", error="x")], server(*IFCA))
    assert (none.clusters, report.updates) == (after.clusters, 0)


LEVER = (
    "method=fltac",
    "server.clustering.features=products",
    "server.clustering.assign=loss",
    "server.clustering.assign_from=3",
    "server.clustering.k=2",
)


def test_the_lever_lets_clients_choose_from_its_round_on() -> None:
    settings, current = server(*LEVER), state("a", "b")
    two = [reply("a", adapter(1, 1), adapter(1, -1)), reply("b", adapter(1, 1), adapter(1, -1))]
    for _ in range(2):
        requests = plan_round(current, settings)
        assert all(request.candidates == () for request in requests)
        current, _ = finish_round(current, requests, two, settings)
    home = current.assignment()
    requests = plan_round(current, settings)
    assert all(request.candidates == (0, 1) for request in requests)
    turned = [chose("a", (home["a", 1], 3.0), (home["a", 0], 4.0))]
    after, report = finish_round(current, requests, turned, settings)
    assert after.assignment() == {**home, ("a", 0): home["a", 1], ("a", 1): home["a", 0]}
    assert report.k == 2
    learned = after.memory["a", 0]["body"] - current.memory["a", 0]["body"]
    began = current.clusters[home["a", 1]].adapter
    expected = np.full((2, 3), 9.0) - began["m.lora_B"] @ began["m.lora_A"]
    np.testing.assert_allclose(learned.reshape(2, 3), expected, atol=1e-4, err_msg="since what it chose to begin from")


def test_a_late_update_of_a_round_without_choice_counts_where_its_slot_is_or_not_at_all() -> None:
    settings = server(*LEVER, "server.clustering.assign_from=2", "federation.stale=use")
    first = state("a", "b", "c")
    (_, slow, slower) = plan_round(first, settings)
    two = [reply("a", adapter(1, 1), adapter(1, -1)), reply("b", adapter(1, 1))]
    before, _ = finish_round(first, [*plan_round(first, settings)], two, settings)
    home = before.assignment()
    arrived = [LateReply(slow, reply("b", adapter(9, 9))), LateReply(slower, reply("c", adapter(5, 5)))]
    other = 1 - home["b", 0]
    after, _ = finish_round(before, plan_round(before, settings), [chose("a", (other, 3.0))], settings, None, arrived)
    assert after.assignment()["b", 0] == home["b", 0]
    assert value(after.clusters[home["b", 0]]) == 9.0
    assert ("c", 0) not in after.assignment()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=fedit", "server.aggregation.weighting=confidence"],
            r"weighting: got 'confidence' with rule=single; allowed with kmeans and spectral",
        ),
        (
            ["method=fedsa-lora", "server.aggregation.from_round=2"],
            r"from_round: got 2 with rule=fedsa and optimizer=none",
        ),
        (
            ["server.aggregation.rule=fedsa", "server.aggregation.shrinkage=0.5"],
            r"shrinkage: got 0.5 with rule=fedsa and optimizer=none; allowed with mean and none",
        ),
        (["method=fedit", "server.aggregation.shrinkage=0.5"], r"shrinkage: got 0.5 with rule=single; allowed with"),
        (["server.aggregation.shrinkage=1.5"], r"shrinkage: got 1.5; .*less than or equal to 1"),
        (["server.aggregation.from_round=6"], r"from_round: got 6; at most federation.rounds=5"),
        (["method=ifca", "server.aggregation.from_round=2"], r"from_round: got 2, but clients are sent clusters"),
        (["method=ifca", "server.clustering.assign=loss"], r"assign: got 'loss' with rule=ifca; allowed with kmeans"),
        (["server.clustering.assign=loss", "server.clustering.assign_from=1"], r"assign_from: got 1"),
        (["server.clustering.held_back=0.2"], r"held_back needs rule=ifca or assign=loss"),
        (["method=ifca", "server.clustering.held_back=1"], r"held_back: got 1"),
        (["method=ifca", "federation.pool=sum"], r"federation\.pool: there is nothing to choose"),
        (["server.clustering.assignment_rows=0"], r"assignment_rows: got 0"),
        (["method=cfl", "server.clustering.eps1=-1"], r"eps1: got -1"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config({"backbone": {"name": "x"}, "tasks": ["sst2"]}, overrides)


@pytest.mark.parametrize(("method", "needs_k"), [("cfl", False), ("fedlease", False), ("ifca", True)])
def test_a_coordinator_without_tasks_needs_k_for_rules_that_do(method: str, needs_k: bool) -> None:
    tree = {"backbone": {"name": "x"}, "method": method}
    if needs_k:
        with pytest.raises(InputError, match=r"server\.clustering\.k has to be given"):
            load_config(tree)
    else:
        assert load_config(tree).server.clustering.k is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("method=ifca", "server.aggregation.rule=fedsa"), "got 'fedsa', with which each slot has a B of its own"),
        (("server.clustering.assign=loss", "server.aggregation.rule=fedsa"), "all others can"),
        (("method=ifca", "server.aggregation.rule=ffa"), "got 'ffa', which keeps the A of v0"),
        (
            ("method=fltac", "server.clustering.features=a", "server.aggregation.rule=ffa"),
            "server.clustering.features: got 'a', but ffa does not always train A; allowed: auto, gradients, products",
        ),
        (("method=ifca", "server.clustering.k=auto"), "got auto, but rule ifca needs a number"),
    ],
)
def test_what_cannot_be_combined_with_a_choice_by_loss(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        server(*overrides)


def test_a_client_chooses_among_adapters_of_its_rank() -> None:
    body = {"m.lora_A": (3, 4), "m.lora_B": (5, 3)}
    settings = server(*IFCA, "lora.rank=3", "lora.ranks={a: 1}", "server.aggregation.rule=hetlora")
    first = init_server(settings, body, HEADS, ["a", "b"])
    small, whole = plan_round(first, settings)
    for cluster in first.clusters:
        np.testing.assert_array_equal(small.adapters[cluster.id]["m.lora_A"], cluster.adapter["m.lora_A"][:1])
        assert whole.adapters[cluster.id] is cluster.adapter
    replies = [
        Reply(request.client, (Update(request.client, 0, request.adapters[1], 1, cluster=1),))
        for request in (small, whole)
    ]
    after, report = finish_round(first, [small, whole], replies, settings)
    assert report.rejections == ()
    assert after.assignment() == {("a", 0): 1, ("b", 0): 1}
