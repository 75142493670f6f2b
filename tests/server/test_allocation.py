"""FedLEASE's allocation against an agglomeration and a silhouette written down here, and what it keeps."""

import numpy as np
import pytest

from fltac.records import Adapter, Reply, ServerState
from fltac.server.allocation import average_linkage, b_distances
from fltac.server.round import finish_round, init_server, plan_round
from server.builders import adapter, planted, reply, server, state


def agglomerated(distances: np.ndarray, count: int) -> list[set[int]]:
    """Average linkage by its definition: merge the two groups with the least mean distance between their members."""
    groups = [{number} for number in range(len(distances))]
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        i, j = min(pairs, key=lambda pair: np.mean([distances[a, b] for a in groups[pair[0]] for b in groups[pair[1]]]))
        groups = [*(group for number, group in enumerate(groups) if number not in (i, j)), groups[i] | groups[j]]
    return sorted(groups, key=min)


def silhouette(distances: np.ndarray, groups: list[set[int]]) -> float:
    values = []
    for own in groups:
        for point in own:
            if len(own) == 1:
                values.append(0.0)
                continue
            inside = np.mean([distances[point, other] for other in own - {point}])
            outside = min(np.mean([distances[point, b] for b in other]) for other in groups if other is not own)
            values.append((outside - inside) / max(inside, outside))
    return float(np.mean(values))


def labels_of(groups: list[set[int]], n: int) -> list[int]:
    return [next(number for number, group in enumerate(groups) if point in group) for point in range(n)]


def two_layers(seed: int, n: int = 9) -> list[Adapter]:
    draw = np.random.default_rng(seed)
    return [
        {
            f"{layer}.lora_{part}": draw.normal(size=shape).astype(np.float32)
            for layer in "lm"
            for part, shape in (("A", (2, 5)), ("B", (4, 2)))
        }
        for _ in range(n)
    ]


def test_distances_are_the_mean_over_layers_of_one_minus_the_cosine_of_b() -> None:
    adapters = two_layers(0)
    found = b_distances(adapters)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            each = []
            for layer in "lm":
                a, b = one[f"{layer}.lora_B"].ravel(), other[f"{layer}.lora_B"].ravel()
                each.append(1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))
            assert found[i, j] == pytest.approx(np.mean(each), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_groups_and_their_number_are_those_of_the_definition(seed: int) -> None:
    distances = b_distances(two_layers(seed))
    n = len(distances)
    tried = {count: agglomerated(distances, count) for count in range(1, n + 1)}
    for count, groups in tried.items():
        assert average_linkage(distances, count, 8)[0].tolist() == labels_of(groups, n)
    scores = {count: silhouette(distances, tried[count]) for count in range(2, 7)}
    best = max(scores, key=lambda count: scores[count])
    assert scores[best] > 0
    labels, score = average_linkage(distances, None, 6)
    assert labels.tolist() == labels_of(tried[best], n)
    assert score == pytest.approx(scores[best])


@pytest.mark.parametrize(
    ("distances", "k", "expected"),
    [
        (np.zeros((1, 1)), None, [0]),
        (np.zeros((1, 1)), 4, [0]),
        (np.zeros((4, 4)), None, [0, 0, 0, 0]),
        (1 - np.eye(4), None, [0, 0, 0, 0]),
        (np.array([[0.0, 2.0], [2.0, 0.0]]), None, [0, 0]),
        (np.array([[0.0, 2.0], [2.0, 0.0]]), 5, [0, 1]),
    ],
)
def test_one_slot_identical_ones_zeros_and_more_clusters_than_slots(
    distances: np.ndarray, k: int | None, expected: list[int]
) -> None:
    assert average_linkage(distances, k, 8)[0].tolist() == expected


def test_a_b_of_zeros_is_at_distance_one_from_all() -> None:
    np.testing.assert_allclose(b_distances([adapter(1, 0), adapter(1, 0), adapter(1, 2)]), 1 - np.eye(3))


def planted_state(k: str = "null") -> tuple[ServerState, list[Reply], list[int]]:
    updates, truth = planted(5, 3, noise=0.2)
    names = sorted({item.client for item in updates})
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    settings = server("method=fedlease", f"server.clustering.k={k}")
    first = init_server(settings, body, {"2": (2, 12)}, names)
    replies = [Reply(name, tuple(item for item in updates if item.client == name)) for name in names]
    after, report = finish_round(first, plan_round(first, settings), replies, settings)
    assert report.k == (3 if k == "null" else int(k))
    assert report.silhouette is not None
    return after, replies, truth


@pytest.mark.parametrize("k", ["null", "2"])
def test_planted_tasks_are_found_and_then_kept(k: str) -> None:
    after, replies, truth = planted_state(k)
    found = after.assignment()
    keys = [item.key for one in replies for item in one.updates]
    if k == "null":
        assert len({(found[key], task) for key, task in zip(keys, truth, strict=True)}) == 3
    settings = server("method=fedlease", f"server.clustering.k={k}")
    turned = [Reply(one.client, tuple(_turned(item) for item in one.updates)) for one in replies[1:]]
    again, report = finish_round(after, plan_round(after, settings), turned, settings)
    assert again.assignment() == found, "whatever is uploaded, also where a client did not reply"
    assert report.silhouette is None


def _turned(item):  # type: ignore[no-untyped-def]
    return type(item)(item.client, item.slot, {name: -tensor for name, tensor in item.adapter.items()}, 1)


def test_who_comes_later_joins_the_cluster_with_the_nearest_b() -> None:
    settings = server("method=fedlease", "server.clustering.k=2")
    first = state("a", "b", "c")
    wide = {**adapter(1, 1), "m.lora_B": np.array([[1.0], [-1.0]], np.float32)}
    one, _ = finish_round(first, plan_round(first, settings), [reply("a", adapter(1, 1)), reply("b", wide)], settings)
    assert one.assignment() == {("a", 0): 0, ("b", 0): 1}
    near = {**adapter(9, 1), "m.lora_B": np.array([[3.0], [-2.0]], np.float32)}
    two, _ = finish_round(one, plan_round(one, settings), [reply("c", near, adapter(1, 4))], settings)
    assert two.assignment() == {("a", 0): 0, ("b", 0): 1, ("c", 0): 1, ("c", 1): 0}
