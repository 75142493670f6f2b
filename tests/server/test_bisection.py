"""Clustered federated learning against all bipartitions, dense norms and hand-made rounds."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fltac.records import Adapter, Cluster, LateReply, Reply, ServerState
from fltac.server.bisection import LARGEST, bisect, cosines, inner_products, nearest, smaller_half, update_norms
from fltac.server.cohort import admit
from fltac.server.round import finish_round, plan_round
from fltac.server.rules import RULES
from server.builders import adapter, planted, reply, server, state, update

CFL = ("method=cfl", "server.clustering.eps1=0.5", "server.clustering.eps2=0.5", "server.clustering.head=false")


def play(before: ServerState, replies: list[Reply], *overrides: str) -> ServerState:
    settings = server(*CFL, *overrides)
    return finish_round(before, plan_round(before, settings), replies, settings)[0]


def by_b(value: float) -> Adapter:
    """An adapter that differs from others in B alone, so that changes are one number."""
    return adapter(1.0, value)


def first_round(clients: str = "abcde") -> ServerState:
    """All move B by 10, from 0, and A to 1: the mean's norm is the largest there can be."""
    return play(state(*clients), [reply(client, by_b(10)) for client in clients])


def test_the_halves_are_the_best_of_all_bipartitions() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        rows = draw.normal(size=(7, 4))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        similarity = rows @ rows.T
        everyone = set(range(7))
        worst = {
            frozenset(half): max(similarity[i, j] for i in half for j in everyone - set(half))
            for size in (1, 2, 3)
            for half in combinations(range(7), size)
        }
        found = bisect(similarity)
        half = set(np.flatnonzero(found))
        across = max(similarity[i, j] for i in half for j in everyone - half)
        assert not found[0]
        assert across == pytest.approx(min(worst.values()), abs=1e-12)


def test_products_norms_and_cosines_are_those_of_flattened_changes() -> None:
    updates, _ = planted(3, 2)
    updates = [*updates, update("odd", 0, {**updates[0].adapter, "head.2.weight": updates[1].adapter["head.2.weight"]})]
    bases = [adapter_like(item.adapter, seed) for seed, item in enumerate(updates)]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    for head in (True, False):
        names = [name for name in sorted(updates[0].adapter) if head or "lora" in name]
        flat = np.array(
            [
                np.concatenate([(item.adapter[name] - base[name]).ravel() for name in names])
                for item, base in zip(updates, bases, strict=True)
            ],
            dtype=np.float64,
        )
        products = inner_products([item.adapter for item in updates], bases, bases[0], head)
        np.testing.assert_allclose(products, flat @ flat.T, rtol=1e-6)
        norms = update_norms(products, weights)
        assert norms.mean == pytest.approx(np.linalg.norm(np.average(flat, axis=0, weights=weights)), rel=1e-5)
        assert norms.largest == pytest.approx(np.linalg.norm(flat, axis=1).max(), rel=1e-6)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        np.testing.assert_allclose(cosines(products), unit @ unit.T, atol=1e-6)


def adapter_like(tensors: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=tensor.shape).astype(np.float32) for name, tensor in tensors.items()}


def test_a_head_that_a_base_lacks_began_as_v0s_and_other_shapes_have_no_product() -> None:
    initial = {**adapter(0, 0, head=1), **adapter(0, 0, head=2, key="1", outputs=1)}
    bare = {name: tensor for name, tensor in adapter(1, 1).items() if "lora" in name}
    one, other = adapter(1, 1, head=3), adapter(1, 1, head=5, key="1", outputs=1)
    products = inner_products([one, other], [bare, bare], initial, True)
    # Heads of 2 x 3 numbers moved by 2, and of 1 x 3 moved by 3; the factors stayed.
    np.testing.assert_allclose(products, [[6 * 4, 0], [0, 3 * 9]])


def test_the_first_round_is_one_cluster_and_keeps_its_means_norm() -> None:
    after = first_round()
    assert set(after.assignment().values()) == {0}
    initial = after.initial["m.lora_A"]
    norm = np.sqrt(2 * 10.0**2 + ((1.0 - initial) ** 2).sum())
    assert after.memory["a", 0][LARGEST][0] == pytest.approx(norm, rel=1e-6)


def test_a_cluster_at_rest_whose_members_pull_apart_is_split_once() -> None:
    """Three move B up by 6, two down by 6: the mean moves by 1.2 sqrt(2), less than half of round 1's."""
    before = first_round()
    moved = [reply(client, by_b(16)) for client in "ace"] + [reply(client, by_b(4)) for client in "bd"]
    after = play(before, moved)
    assert after.assignment() == {("a", 0): 0, ("c", 0): 0, ("e", 0): 0, ("b", 0): 1, ("d", 0): 1}
    means = {cluster.id: float(cluster.adapter["m.lora_B"][0, 0]) for cluster in after.clusters}
    assert means == {0: 16.0, 1: 4.0}
    assert after.next_cluster_id == 2
    assert after.memory["b", 0][LARGEST] == before.memory["b", 0][LARGEST], "both halves have their ancestor's past"
    again = play(after, [reply(client, by_b(17)) for client in "ace"] + [reply(client, by_b(3)) for client in "bd"])
    assert again.assignment() == after.assignment()
    third = play(again, [reply("a", by_b(23)), *(reply(client, by_b(11)) for client in "ce"), reply("b", by_b(3))])
    assert third.assignment()["a", 0] == 2, "the smaller half gets the next id"


@pytest.mark.parametrize(
    ("up", "overrides"),
    [
        (16.0, ("server.clustering.eps1=0.05",)),  # not at rest
        (11.0, ()),  # at rest, but nobody pulls
        (16.0, ("server.clustering.eps2=0.9",)),
    ],
)
def test_clusters_that_are_not_split(up: float, overrides: tuple[str, ...]) -> None:
    before = first_round()
    moved = [reply(client, by_b(up)) for client in "ace"] + [reply(client, by_b(20 - up)) for client in "bd"]
    assert set(play(before, moved, *overrides).assignment().values()) == {0}


def test_the_mean_is_weighted_as_the_aggregation_is() -> None:
    """With weights 5 to 1 the mean moves by 4 of 6: not at rest; unweighted it does not move at all."""
    before = first_round("ab")
    moved = [reply("a", by_b(16), examples=5), reply("b", by_b(4))]
    larger = ("server.clustering.eps1=0.3", "server.clustering.eps2=0.3")
    assert set(play(before, moved, *larger).assignment().values()) == {0}
    uniform = play(before, moved, *larger, "server.aggregation.weighting=uniform")
    assert uniform.assignment() == {("a", 0): 0, ("b", 0): 1}


def test_who_is_absent_stays_and_who_comes_later_joins_the_nearest() -> None:
    before = first_round()
    moved = [reply(client, by_b(16)) for client in "ac"] + [reply("b", by_b(4))]
    after = play(before, moved)
    assert after.assignment() == {("a", 0): 0, ("c", 0): 0, ("d", 0): 0, ("e", 0): 0, ("b", 0): 1}
    down = play(after, [reply("b", by_b(-8))])
    later = play(down, [reply("b", by_b(-8)), Reply("x", (update("x", 0, by_b(-3)), update("x", 1, by_b(3))))])
    assert "x" not in later.clients, "a client that was not asked has no say"
    known = admit(down, [], server(*CFL))
    joined = ServerState(**{**known.__dict__, "clients": (*known.clients, "x")})
    found = play(joined, [reply("x", by_b(-3), by_b(3))]).assignment()
    assert (found["x", 0], found["x", 1]) == (1, 0)


@pytest.mark.parametrize("b", [0.0, 5.0])
def test_identical_and_zero_updates_are_never_split(b: float) -> None:
    current = state("a", "b")
    for _ in range(3):
        same = {**current.received(("a", 0)), "m.lora_B": np.full((2, 1), b, np.float32)}
        current = play(current, [reply("a", same), reply("b", same)], "server.clustering.eps1=9")
        assert current.assignment() == {("a", 0): 0, ("b", 0): 0}


def test_one_slot_alone() -> None:
    current = state("a")
    for b in (10.0, 11.0):
        current = play(current, [reply("a", by_b(b))], "server.clustering.eps1=9", "server.clustering.eps2=0")
        assert current.assignment() == {("a", 0): 0}


def test_of_equal_halves_that_without_the_first_leaves() -> None:
    assert smaller_half(np.array([False, True, True])).tolist() == [True, False, False]
    assert smaller_half(np.array([False, True])).tolist() == [False, True]
    assert set(RULES) >= {"cfl", "ifca", "fedlease"}


def test_a_latecomer_is_compared_without_the_frozen_part_of_clusters() -> None:
    fedex = ("server.aggregation.rule=fedex",)
    after = play(state("a", "b"), [reply("a", adapter(1, 10)), reply("b", adapter(2, 5))], *fedex)
    assert any(".base_" in name for name in after.clusters[0].adapter)
    grown = replace(after, clients=("a", "b", "late"))
    done = play(grown, [reply("late", by_b(5))], *fedex)
    assert done.assignment()["late", 0] == 0


def test_a_latecomer_of_a_smaller_rank_is_compared_by_what_it_trained() -> None:
    """Its update is filled up with zeros; the rows of v0 that it never had are no change."""
    first = {"m.lora_A": np.full((2, 3), 9, np.float32), "m.lora_B": np.zeros((2, 2), np.float32)}
    began = {**first, "m.lora_A": np.array([[9, 9, 9], [0, 0, 0]], np.float32)}
    own = {**began, "m.lora_A": np.array([[10, 9, 9], [0, 0, 0]], np.float32)}
    like = {**first, "m.lora_A": np.array([[11, 9, 9], [9, 9, 9]], np.float32)}
    unlike = {**first, "m.lora_A": np.array([[9, 9, 9], [1, 1, 1]], np.float32)}
    assert nearest(own, began, [Cluster(4, unlike, ()), Cluster(6, like, ())], first, False) == 6


def test_a_late_first_update_of_a_smaller_rank_began_from_what_of_v0_it_was_sent() -> None:
    ranks = ("server.aggregation.rule=hetlora", "lora.rank=2", "lora.ranks={late: 1}", "federation.stale=use")
    settings = server(*CFL, *ranks)
    head = {name: tensor for name, tensor in adapter(0, 0).items() if "head" in name}
    first = {"m.lora_A": np.full((2, 3), 9, np.float32), "m.lora_B": np.zeros((2, 2), np.float32), **head}
    begin = replace(state("late"), initial=first)
    (slow,) = plan_round(begin, settings)
    like = {**first, "m.lora_A": np.array([[11, 9, 9], [9, 9, 9]], np.float32)}
    unlike = {**first, "m.lora_A": np.array([[9, 9, 9], [1, 1, 1]], np.float32)}
    clusters = Cluster(4, unlike, (("a", 0),)), Cluster(6, like, (("b", 0),))
    now = replace(begin, round_number=1, clients=("a", "b", "late"), clusters=clusters, next_cluster_id=7)
    assert slow.initial is not None
    trained = {**slow.initial, "m.lora_A": np.array([[10, 9, 9]], np.float32)}
    late = LateReply(slow, reply("late", trained))
    after, report = finish_round(now, plan_round(now, settings), [reply("a", unlike)], settings, None, [late])
    assert report.stale == 1
    assert after.assignment()["late", 0] == 6


def test_with_a_server_optimizer_a_half_goes_on_from_where_its_members_were() -> None:
    adam = ("server.aggregation.optimizer=fedadam",)
    before = play(state(*"abcde"), [reply(client, by_b(10)) for client in "abcde"], *adam)
    moved = {cluster.id: replace(cluster, adapter=by_b(10)) for cluster in before.clusters}
    before = replace(before, clusters=tuple(moved.values()))
    replies = [reply(client, by_b(16)) for client in "ace"] + [reply(client, by_b(4)) for client in "bd"]
    after = play(before, replies, *adam)
    assert after.assignment()["b", 0] == 1
    b = float(after.clusters[1].adapter["m.lora_B"][0, 0])
    # One step of FedAdam from 10 towards 4: m = -.1 * 6, v = .01 * 36.
    assert b == pytest.approx(10 - 0.01 * 0.6 / (0.6 + 1e-3), abs=1e-4)
