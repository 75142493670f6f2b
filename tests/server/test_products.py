"""Adapters compared by their products: identities and latecomers where factors say little."""

from dataclasses import replace

import numpy as np
import pytest

from fltac.records import Adapter, Cluster, ServerState
from fltac.server.matching import match_clusters, match_products
from fltac.server.products import PROBES, images, most_similar
from fltac.server.round import finish_round, plan_round
from server.builders import adapter, reply, server, state


def wide(seed: int, inputs: int, base: int = 0) -> Adapter:
    draw = np.random.default_rng(seed)
    shapes = {"m.lora_A": (2, inputs), "m.lora_B": (9, 2)}
    if base:
        shapes |= {"m.base_A": (base, inputs), "m.base_B": (9, base)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def product(item: Adapter) -> np.ndarray:
    out = item["m.lora_B"].astype(np.float64) @ item["m.lora_A"]
    return out + item["m.base_B"].astype(np.float64) @ item["m.base_A"] if "m.base_A" in item else out


@pytest.mark.parametrize(("inputs", "tolerance"), [(PROBES, 1e-5), (300, 0.2)])
def test_images_are_as_far_apart_as_products(inputs: int, tolerance: float) -> None:
    one, other = wide(0, inputs), wide(1, inputs, base=3)
    first, second = images([one, other], seed=5)
    exact = np.linalg.norm(product(one) - product(other))
    assert np.linalg.norm(first - second) == pytest.approx(exact, rel=tolerance)


def turned(item: Adapter) -> Adapter:
    """Other factors of the same product."""
    return {**item, "m.lora_A": -item["m.lora_A"], "m.lora_B": -item["m.lora_B"]}


def test_a_product_finds_its_cluster_whatever_the_signs_of_its_factors() -> None:
    clusters = [Cluster(3, adapter(2, 4), ()), Cluster(7, adapter(-2, 4), ())]
    groups = [turned(adapter(2, 4.1)), turned(adapter(-2, 4.1)), adapter(0, 0)]
    assert match_products(groups, clusters, 8, seed=0) == [3, 7, 8]
    assert match_clusters(groups[:2], clusters, 8) == [7, 3], "what the factors say"
    assert match_products(groups, [], 8, seed=0) == [8, 9, 10]
    assert most_similar(groups[1], clusters, seed=0) == 7
    assert most_similar(groups[2], clusters, seed=0) == 3, "a product of zeros is like no other: the first"


def grown(before: ServerState, *clients: str) -> ServerState:
    return replace(before, clients=(*before.clients, *clients))


@pytest.mark.parametrize("rule", ["flora", "flexlora"])
@pytest.mark.parametrize("clustering", ["fedlease", "cfl"])
def test_a_latecomer_joins_the_cluster_that_computes_what_it_does(rule: str, clustering: str) -> None:
    """With flora all clusters have the same factors; with flexlora those of one may have either sign."""
    settings = server(
        f"server.aggregation.rule={rule}",
        f"method={clustering}",
        "server.clustering.k=2",
        "server.clustering.eps1=3",
        "server.clustering.eps2=0",
        "server.clustering.head=false",
    )
    up = {**adapter(1, 1), "m.lora_B": np.array([[4.0], [0.5]], np.float32)}
    down = {**adapter(1, 1), "m.lora_B": np.array([[0.5], [-4.0]], np.float32)}
    first = state("a", "b")
    after, _ = finish_round(first, plan_round(first, settings), [reply("a", up), reply("b", down)], settings)
    home = after.assignment()
    assert home["a", 0] != home["b", 0]
    late = grown(after, "late", "later")
    replies = [reply("late", turned(down), up), reply("later", down, turned(up))]
    found = finish_round(late, plan_round(late, settings), replies, settings)[0].assignment()
    assert [found["late", 0], found["late", 1]] == [home["b", 0], home["a", 0]]
    assert [found["later", 0], found["later", 1]] == [home["b", 0], home["a", 0]]


@pytest.mark.parametrize("rule", ["flora", "flexlora"])
def test_clusters_keep_their_ids_when_half_of_the_slots_are_heard(rule: str) -> None:
    settings = server(
        f"server.aggregation.rule={rule}", "server.clustering.rule=kmeans", "server.clustering.head=false"
    )
    current = state("a", "b", "c", "d")
    up, down = adapter(1, 4), adapter(1, -4)
    replies = [reply(client, up if client in "ad" else down) for client in "abcd"]
    current, _ = finish_round(current, plan_round(current, settings), replies, settings)
    home = current.assignment()
    assert home["a", 0] == home["d", 0] != home["b", 0] == home["c", 0]
    again = [reply("c", turned(down)), reply("d", turned(up))]
    after, _ = finish_round(current, plan_round(current, settings), again, settings)
    assert after.assignment() == home
