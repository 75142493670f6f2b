"""Rounds by hand: means, identities, partial participation, empty clusters, clients without a reply."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import fltac.server
from fltac import config, records
from fltac.records import Cluster, Rejection, Reply, Request, ServerState
from fltac.server.aggregation import mean_adapter, shrunk
from fltac.server.cohort import draw_cohort
from fltac.server.matching import match_clusters
from fltac.server.round import finish_round, init_server, plan_delivery, plan_round
from fltac.server.similarity import flattened
from server.builders import BODY, HEADS, adapter, planted, reply, server, state

KMEANS = ("method=fltac-paper",)


def play(before: ServerState, replies: list[Reply], *overrides: str, groups: object = None) -> ServerState:
    settings = server(*overrides)
    return finish_round(before, plan_round(before, settings), replies, settings, groups)[0]  # type: ignore[arg-type]


def value(cluster: Cluster) -> float:
    return float(cluster.adapter["m.lora_A"][0, 0])


def test_the_first_adapter_changes_nothing_and_is_drawn_as_peft_does() -> None:
    shapes = {"m.lora_A": (40, 100), "m.lora_B": (20, 40)}
    first = init_server(server(), shapes, {"2": (2, 500), "3-1": (3, 500)}, ["b", "a"])
    assert first.clients == ("a", "b")
    a = first.initial["m.lora_A"]
    assert not first.initial["m.lora_B"].any()
    assert 0.095 < np.abs(a).max() <= 0.1, "U(-1/sqrt(in), 1/sqrt(in))"
    assert a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    assert first.initial["head.3-1.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert not first.initial["head.2.bias"].any()
    again = init_server(server("federation.seed=1"), shapes, {"2": (2, 500)}, ["a"])
    assert not np.array_equal(again.initial["m.lora_A"], a)


def test_mean_by_hand_weighted_and_not() -> None:
    first = state("a", "b")
    replies = [reply("a", adapter(1, 1), examples=3), reply("b", adapter(5, 2), examples=1)]
    weighted = play(first, replies, "method=fedit")
    assert value(weighted.clusters[0]) == 2.0
    assert weighted.clusters[0].adapter["m.lora_B"][0, 0] == 1.25
    uniform = play(first, replies, "method=fedit", "server.aggregation.weighting=uniform")
    assert value(uniform.clusters[0]) == 3.0


def test_mean_by_hand_weighted_by_confidence() -> None:
    # On a line: 0 and 2 are one cluster, 10 and 12 the other. A slot's own mean is that of the rest of its cluster.
    places = {"a": (0, 1), "b": (2, 3), "c": (10, 1), "d": (12, 1)}
    replies = [reply(client, adapter(at, 0), examples=rows) for client, (at, rows) in places.items()]
    found = play(state(*"abcd"), replies, *KMEANS, "server.aggregation.weighting=confidence")
    outer, inner = 1 - 2 / 11, 1 - 2 / 9
    assert value(found.clusters[0]) == pytest.approx((outer * 0 + 3 * inner * 2) / (outer + 3 * inner))
    assert value(found.clusters[1]) == pytest.approx((inner * 10 + outer * 12) / (inner + outer))
    plain = play(state(*"abcd"), replies, *KMEANS, "server.aggregation.weighting=examples")
    assert value(plain.clusters[0]) == 1.5


def test_doubtful_clusters_are_shrunk_towards_the_mean_of_all_by_hand() -> None:
    # As above: the outer slots' confidence is 1 - 2/11, the inner ones' 1 - 2/9, a cluster's doubt their mean's rest.
    places = {"a": 0, "b": 2, "c": 10, "d": 12}
    replies = [reply(client, adapter(at, 0)) for client, at in places.items()]
    found = play(state(*"abcd"), replies, *KMEANS, "server.aggregation.shrinkage=0.5")
    share = 0.5 * (2 / 11 + 2 / 9) / 2
    assert value(found.clusters[0]) == pytest.approx(1 + share * (6 - 1))
    assert value(found.clusters[1]) == pytest.approx(11 - share * (11 - 6))


def test_shrinkage_leaves_heads_that_a_cluster_does_not_have_alone() -> None:
    found = shrunk(adapter(1, 1, 2), adapter(3, 5, 4, key="1", outputs=1), 0.25)
    assert found["m.lora_A"][0, 0] == 1.5
    assert found["head.2.weight"][0, 0] == 2.0
    assert "head.1.weight" not in found


def test_before_the_round_of_the_first_mean_slots_go_on_from_their_own_uploads() -> None:
    settings = ("method=fedit", "server.aggregation.from_round=3", "federation.rounds=9")
    first = state("a", "b")
    one = play(first, [reply("a", adapter(1, 1)), reply("b", adapter(5, 1))], *settings)
    assert {item.client: sent(item) for item in plan_round(one, server(*settings))} == {"a": 1, "b": 5}
    assert value(one.clusters[0]) == 3, "the cluster is there all the same"
    two = play(one, [reply("a", adapter(2, 1))], *settings)
    assert {item.client: sent(item) for item in plan_round(two, server(*settings))} == {"a": 2, "b": 5}
    # Of the round of the first mean on, everybody is sent it, whoever replied.
    three = play(two, [reply("a", adapter(4, 1))], *settings)
    assert {item.client: sent(item) for item in plan_round(three, server(*settings))} == {"a": 4, "b": 4}
    assert not three.own


def sent(request: Request) -> float:
    return float(request.adapters[request.slots[0]]["m.lora_A"][0, 0])


def test_a_round_of_the_first_mean_that_nobody_answers_comes_later() -> None:
    settings = ("method=fedit", "server.aggregation.from_round=2", "federation.rounds=9")
    one = play(state("a", "b"), [reply("a", adapter(1, 1)), reply("b", adapter(5, 1))], *settings)
    two = play(one, [], *settings)
    assert {item.client: sent(item) for item in plan_round(two, server(*settings))} == {"a": 1, "b": 5}
    three = play(two, [reply("a", adapter(2, 1)), reply("b", adapter(4, 1))], *settings)
    assert {item.client: sent(item) for item in plan_round(three, server(*settings))} == {"a": 3, "b": 3}


def test_what_was_learned_before_the_first_mean_counts_from_what_each_slot_was_sent() -> None:
    # Slots that move twice by the same product: what is remembered is twice what one round taught, not more.
    plain = ("server.clustering.features=products", "server.clustering.k=2", "federation.rounds=9")
    replies = [reply("a", adapter(1, 1)), reply("b", adapter(1, -1)), reply("c", adapter(1, 1))]
    twice = [reply("a", adapter(1, 2)), reply("b", adapter(1, -2)), reply("c", adapter(1, 2))]
    settings = (*plain, "server.aggregation.from_round=3")
    one = play(state(*"abc"), replies, *settings)
    two = play(one, twice, *settings)
    for key, held in two.memory.items():
        assert held["body"].any()
        assert held["body"] == pytest.approx(2 * one.memory[key]["body"], abs=1e-5), key
        assert held["head.2"] == pytest.approx(one.memory[key]["head.2"], abs=1e-5), "it came to 0 and stayed there"


def test_doubtful_members_alone_are_their_mean() -> None:
    replies = [reply("a", adapter(1, 0)), reply("b", adapter(1, 0)), reply("c", adapter(1, 0))]
    found = play(state(*"abc"), replies, *KMEANS, "server.aggregation.weighting=confidence")
    assert {value(cluster) for cluster in found.clusters if cluster.members} == {1.0}


def test_heads_of_different_keys_are_never_mixed() -> None:
    found = mean_adapter([adapter(1, 1, 2), adapter(3, 3, 4, key="1", outputs=1), adapter(5, 5, 8)], [1, 1, 3])
    assert found["m.lora_A"][0, 0] == pytest.approx((1 + 3 + 15) / 5)
    assert found["head.2.weight"][0, 0] == pytest.approx((2 + 24) / 4)
    assert found["head.1.weight"].shape == (1, 3)
    assert found["head.1.weight"][0, 0] == 4.0


def test_kmeans_is_the_papers_rule() -> None:
    """The grouping is scikit-learn's on the flattened factors, the mean unweighted."""
    updates, _ = planted(4, 2, noise=1.5)
    replies = {update.client: [] for update in updates}  # type: dict[str, list[Update]]
    for update in updates:
        replies[update.client].append(update)
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    settings = server(*KMEANS)
    first = init_server(settings, body, {"2": (2, 12)}, list(replies))
    after, report = finish_round(
        first, plan_round(first, settings), [Reply(name, tuple(own)) for name, own in replies.items()], settings
    )
    ordered = sorted(updates, key=lambda update: update.key)
    points = flattened([update.adapter for update in ordered], False)
    expected = KMeans(2, n_init=50, random_state=0).fit_predict(points)
    found = [after.assignment()[update.key] for update in ordered]
    assert adjusted_rand_score(expected, found) == 1.0
    for cluster in after.clusters:
        rows = [row for row, update in zip(points, ordered, strict=True) if update.key in cluster.members]
        np.testing.assert_allclose(flattened([cluster.adapter], False)[0], np.mean(rows, axis=0), atol=1e-6)
    assert report.k == 2
    assert report.silhouette is not None


@pytest.mark.parametrize("method", ["fltac", "fltac-paper"])
def test_planted_tasks_are_found_and_the_order_of_replies_does_not_matter(method: str) -> None:
    updates, truth = planted(6, 3, noise=0.2)
    settings = server(f"method={method}", "server.clustering.k=3")
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    names = sorted({update.client for update in updates})
    first = init_server(settings, body, {"2": (2, 12)}, names)
    replies = [Reply(name, tuple(update for update in updates if update.client == name)) for name in names]
    after, _ = finish_round(first, plan_round(first, settings), replies, settings)
    assigned = after.assignment()
    assert adjusted_rand_score(truth, [assigned[update.key] for update in updates]) == 1.0
    shuffled = [Reply(item.client, item.updates[::-1]) for item in replies[::-1]]
    again, _ = finish_round(first, plan_round(first, settings)[::-1], shuffled, settings)
    assert again.assignment() == assigned
    for one, other in zip(after.clusters, again.clusters, strict=True):
        np.testing.assert_array_equal(one.adapter["m.lora_A"], other.adapter["m.lora_A"])


def test_clusters_keep_their_ids() -> None:
    first = state("a", "b")
    one = play(first, [reply("a", adapter(0, 0), adapter(10, 1)), reply("b", adapter(10, 1), adapter(0, 0))], *KMEANS)
    ids = {value(cluster): cluster.id for cluster in one.clusters}
    two = play(one, [reply("a", adapter(9, 1), adapter(1, 0)), reply("b", adapter(1, 0), adapter(9, 1))], *KMEANS)
    assert {value(cluster): cluster.id for cluster in two.clusters} == {9.0: ids[10.0], 1.0: ids[0.0]}
    assert two.next_cluster_id == 2


def test_match_gives_new_ids_to_new_groups() -> None:
    clusters = [Cluster(3, adapter(0, 0), ()), Cluster(7, adapter(10, 0), ())]
    assert match_clusters([adapter(11, 0), adapter(50, 0), adapter(1, 0)], clusters, 8) == [7, 8, 3]
    assert match_clusters([adapter(9, 0)], clusters, 8) == [7]
    assert match_clusters([adapter(9, 0), adapter(1, 0)], [], 0) == [0, 1]


def test_fewer_updates_than_clusters_and_the_cluster_that_is_left_empty() -> None:
    before = play(state("a", "b"), [reply("a", adapter(0, 0)), reply("b", adapter(10, 1))], *KMEANS)
    ids = {value(cluster): cluster.id for cluster in before.clusters}
    after = play(before, [reply("a", adapter(9, 1))], *KMEANS)
    by_id = {cluster.id: cluster for cluster in after.clusters}
    assert by_id[ids[10.0]].members == (("a", 0), ("b", 0)), "b did not reply and stays where it was"
    assert by_id[ids[0.0]].members == (), "nobody is left"
    assert value(by_id[ids[0.0]]) == 0.0, "an empty cluster keeps its adapter"
    assert value(by_id[ids[10.0]]) == 9.0


def test_a_round_without_any_update_changes_the_number_alone() -> None:
    before = play(state("a", "b"), [reply("a", adapter(0, 0)), reply("b", adapter(10, 1))], *KMEANS)
    settings = server(*KMEANS)
    after, report = finish_round(before, plan_round(before, settings), [Reply("a", error="disk full")], settings)
    assert after.round_number == 2
    assert after.clusters == before.clusters
    assert (report.updates, report.k) == (0, None)
    assert set(report.rejections) == {Rejection("a", None, "disk full"), Rejection("b", None, "no reply")}


def test_a_rejected_slot_keeps_its_cluster() -> None:
    before = play(state("a", "b"), [reply("a", adapter(0, 0)), reply("b", adapter(10, 1))], *KMEANS)
    home = before.assignment()["a", 0]
    bad = reply("a", adapter(float("nan"), 0))
    after = play(before, [bad, reply("b", adapter(11, 1))], *KMEANS)
    assert after.assignment()["a", 0] == home


def test_requests_bring_each_adapter_once_and_v0_only_to_newcomers() -> None:
    first = state("a", "b")
    settings = server("method=fedit")
    requests = plan_round(first, settings)
    assert [request.client for request in requests] == ["a", "b"]
    assert all(request.initial is first.initial and not request.slots for request in requests)
    after = play(first, [reply("a", adapter(1, 1), adapter(2, 2))], "method=fedit")
    one, other = plan_round(after, settings)
    assert one.slots == {0: 0, 1: 0}
    assert list(one.adapters) == [0]
    assert one.initial is None
    assert other.slots == {}
    assert other.initial is first.initial
    assert plan_delivery(after, settings)[0].adapters[0] is after.clusters[0].adapter


def test_cohorts_are_seeded_and_everybodys_turn_comes() -> None:
    clients = tuple(f"c{number}" for number in range(10))
    cohorts = [draw_cohort(clients, 0.3, 0, number) for number in range(1, 40)]
    assert all(len(set(cohort)) == 3 and list(cohort) == sorted(cohort) for cohort in cohorts)
    assert cohorts == [draw_cohort(clients, 0.3, 0, number) for number in range(1, 40)]
    assert set().union(*cohorts) == set(clients)
    assert draw_cohort(clients, 0.01, 0, 1) != ()
    assert draw_cohort(clients, 1.0, 0, 1) == clients


def test_memory_adds_what_was_learned_since_the_round_began() -> None:
    """Round 1 from v0, round 2 from the cluster's mean: the products of both changes."""
    first = state("a")
    settings = ("method=fltac", "server.clustering.features=products", "server.clustering.k=1")
    one = play(first, [reply("a", adapter(1, 2))], *settings)
    two = play(one, [reply("a", adapter(3, 4, head=5))], *settings)
    held = two.memory["a", 0]
    np.testing.assert_allclose(held["body"], np.full((1, 6), 1 * 2 + (3 * 4 - 1 * 2)), atol=1e-5)
    head = (5.0 - first.initial["head.2.weight"]).ravel()
    np.testing.assert_allclose(held["head.2"], [[*head, 0.0, 0.0]], atol=1e-6)
    assert play(first, [reply("a", adapter(1, 2))], *KMEANS).memory == {}


def test_memory_of_a_holds_the_changes_of_a_alone() -> None:
    """From v0 to 1, then from the cluster's mean 1 to 3: both changes, whatever their sign; B plays no part."""
    first = state("a")
    one = play(first, [reply("a", adapter(1, 2))], "method=fltac", "server.clustering.k=1")
    two = play(one, [reply("a", adapter(3, 4))], "method=fltac", "server.clustering.k=1")
    rows = np.stack([1 - first.initial["m.lora_A"].ravel(), np.full(3, 2.0)])
    held = two.memory["a", 0]["body"]
    np.testing.assert_allclose(held.T @ held, rows.T @ rows, atol=1e-5)


def test_products_without_heads() -> None:
    first = state("a", heads={})
    body = {name: tensor for name, tensor in adapter(1, 2).items() if name in first.initial}
    products = "server.clustering.features=products"
    one = play(first, [reply("a", body)], "method=fltac", "server.clustering.k=1", products)
    assert one.memory["a", 0]["body"].shape == (1, 2 * 3), "as many numbers as the product has"


def test_slots_that_were_not_asked_are_regrouped_by_what_they_learned() -> None:
    """In round 2 only one client replies; the other's slots still belong to somebody."""
    settings = ("method=fltac", "server.clustering.k=2")
    other = {**adapter(1, -1), "m.lora_A": np.array([[1, -1, 0]], np.float32)}
    one = play(state("a", "b"), [reply("a", adapter(1, 1), other), reply("b", adapter(1, 1))], *settings)
    assert one.assignment()["a", 0] == one.assignment()["b", 0] != one.assignment()["a", 1]
    two = play(one, [reply("b", adapter(1, 2))], *settings)
    assert two.assignment() == one.assignment()
    assert two.received(("a", 0))["m.lora_B"][0, 0] == 2.0
    assert two.received(("a", 1))["m.lora_B"][0, 0] == -1.0


def test_rules_that_need_no_comparison() -> None:
    first = state("a", "b")
    replies = [reply("a", adapter(1, 1), adapter(2, 2)), reply("b", adapter(3, 3))]
    alone = play(first, replies, "method=local")
    assert sorted(value(cluster) for cluster in alone.clusters) == [1.0, 2.0, 3.0]
    again = play(alone, replies, "method=local")
    assert again.assignment() == alone.assignment()
    groups = {("a", 0): 0, ("a", 1): 1, ("b", 0): 1}
    told = play(first, replies, "method=oracle", groups=groups)
    assert told.assignment() == groups
    assert value(told.clusters[1]) == 2.5
    random = play(first, replies, "method=random")
    assert set(random.assignment().values()) <= {0, 1}
    assert play(random, replies, "method=random").assignment() == random.assignment()


def test_a_head_that_nobody_trained_this_round_is_kept() -> None:
    first = state("a", "b", heads={"2": (2, 3), "1": (1, 3)})
    other = adapter(3, 3, head=7, key="1", outputs=1)
    one = play(first, [reply("a", adapter(1, 1, head=5)), reply("b", other)], "method=fedit")
    two = play(one, [reply("b", adapter(4, 4, head=8, key="1", outputs=1))], "method=fedit")
    assert two.clusters[0].adapter["head.2.weight"][0, 0] == 5.0
    assert two.clusters[0].adapter["head.1.weight"][0, 0] == 8.0


def test_a_slot_that_changes_cluster_takes_its_trained_head_along() -> None:
    """Round 2: only b replies, and what it learns pulls a's slot, whose head has another shape, into its cluster."""
    settings = ("method=fltac", "server.clustering.k=1")
    first = state("a", "b", heads={"2": (2, 3), "3": (3, 3)})
    other = adapter(3, 3, head=5, key="3", outputs=3)
    one = play(first, [reply("a", other), reply("b", adapter(1, 1, head=2))], "method=fltac", "server.clustering.k=2")
    assert one.assignment()["a", 0] != one.assignment()["b", 0]
    two = play(one, [reply("b", adapter(1, 2, head=3))], *settings)
    assert two.assignment()["a", 0] == two.assignment()["b", 0]
    assert two.received(("a", 0))["head.3.weight"][0, 0] == 5.0
    assert two.received(("a", 0))["head.2.weight"][0, 0] == 3.0


def test_a_head_taken_from_v0_counts_as_not_learned() -> None:
    first = state("a", "b", heads={"2": (2, 3), "3": (3, 3)})
    one = play(first, [reply("a", adapter(1, 1, head=5))], "method=fltac", "server.clustering.k=1")
    held = {name: tensor for name, tensor in one.clusters[0].adapter.items() if "head" not in name}
    untouched = {name: tensor for name, tensor in first.initial.items() if "head.3" in name}
    two = play(one, [reply("b", {**first.initial, **held, **untouched})], "method=fltac", "server.clustering.k=1")
    assert not two.memory["b", 0]["head.3"].any()


def test_no_type_that_reaches_the_server_has_room_for_a_task() -> None:
    seen = [item for item in vars(records).values() if isinstance(item, type) and is_dataclass(item)]
    assert len(seen) > 5
    for item in [*seen, config.ServerSettings]:
        assert not [field.name for field in fields(item) if "task" in field.name or "label" in field.name]
    for path in Path(fltac.server.__path__[0]).glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "tasks" not in names, path


def test_builders_are_of_the_shapes_that_they_say() -> None:
    assert {name: item.shape for name, item in adapter(1, 1).items() if "lora" in name} == BODY
    assert adapter(1, 1)["head.2.weight"].shape == HEADS["2"]
