"""Clusters keep their identity: the groups of a round are matched with the clusters of the round before."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fltac.records import Adapter, Cluster, SlotKey
from fltac.server.clustering import squared_distances
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
    if not clusters:
        return _ids(np.zeros((len(means), 0)), clusters, next_id)
    flat = flattened([*means, *(cluster.adapter for cluster in clusters)], head=False).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    costs = np.asarray(squared_distances(flat[: len(means)], flat[len(means) :]), dtype=np.float64)
    return _ids(costs, clusters, next_id)


def match_by_members(groups: Sequence[Sequence[SlotKey]], clusters: Sequence[Cluster], next_id: int) -> list[int]:
    """As :func:`match_clusters`, at the most slots that stay in their cluster.

    Args:
        groups: The slots of each group of this round.
        clusters: Of the round before.
        next_id: The first id that was never used.
    """
    stay = [[len(set(group) & set(cluster.members)) for cluster in clusters] for group in groups]
    return _ids(-np.array(stay, dtype=np.float64).reshape(len(groups), len(clusters)), clusters, next_id)


def _ids(costs: NDArray[np.float64], clusters: Sequence[Cluster], next_id: int) -> list[int]:
    """The least sum of costs ``[groups, clusters]``."""
    ids = [-1] * len(costs)
    if clusters:
        for group, index in zip(*linear_sum_assignment(costs), strict=True):
            ids[group] = clusters[index].id
    for group, number in enumerate(ids):
        if number < 0:
            ids[group], next_id = next_id, next_id + 1
    return ids
