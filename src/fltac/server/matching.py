"""Clusters keep their identity: the groups of a round are matched with the clusters of the round before."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fltac.records import Adapter, Cluster
from fltac.server.clustering import squared_distances
from fltac.server.products import images
from fltac.server.similarity import flattened


def match_clusters(means: Sequence[Adapter], clusters: Sequence[Cluster], next_id: int) -> list[int]:
    """Gives each group the id of a cluster, at the least sum of squared distances between their factors.

    Args:
        means: The mean adapter of each group of this round.
        clusters: Of the round before.
        next_id: The first id that was never used.

    Returns:
        One id for each group, all different. Groups left over where there are more groups than clusters get new
        ids in their order; clusters left over keep their adapter without members.
    """
    adapters = [*means, *(cluster.adapter for cluster in clusters)]
    return _matched(flattened(adapters, head=False).astype(np.float64), clusters, next_id)


def match_products(adapters: Sequence[Adapter], clusters: Sequence[Cluster], next_id: int, seed: int) -> list[int]:
    """As :func:`match_clusters`, by the distances of the products, bases included (``seed``: of their estimate)."""
    points = images([*adapters, *(cluster.adapter for cluster in clusters)], seed)
    return _matched(points, clusters, next_id)


def _matched(points: NDArray[np.float64], clusters: Sequence[Cluster], next_id: int) -> list[int]:
    """The least sum of squared distances; ``points`` are those of the groups, then those of the clusters."""
    count = len(points) - len(clusters)
    ids = [-1] * count
    if clusters:
        points = points - points.mean(axis=0)
        costs = squared_distances(points[:count], points[count:])
        for group, index in zip(*linear_sum_assignment(costs), strict=True):
            ids[group] = clusters[index].id
    for group, number in enumerate(ids):
        if number < 0:
            ids[group], next_id = next_id, next_id + 1
    return ids
