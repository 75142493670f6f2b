"""Clusters that are split in two again and again: clustered federated learning (Sattler et al., arXiv 1910.01991).

In ``ServerState.memory`` each slot has the tensor ``largest``: float32 ``[1]``, the largest norm of the mean update
that its cluster has had.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.cluster.hierarchy
from numpy.typing import NDArray
from scipy.spatial.distance import squareform

from fltac.config import ClusteringConfig, ServerSettings
from fltac.records import Adapter, Cluster, ServerState, is_base, is_head
from fltac.server.aggregation import weights_of
from fltac.server.grouping import Evidence, Grouping
from fltac.server.products import RENEWING, most_similar

Matrix = NDArray[np.float64]

LARGEST = "largest"
IDENTICAL = 1e-6
"""Halves whose closest updates differ in cosine by less than this are not told apart."""


def bisect_clusters(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """Splits each cluster that has come to rest while its members still pull apart.

    As in the paper: all slots begin in one cluster. An update is the change of all trained numbers (factors, and
    heads with ``head``) since the round began. A cluster is split where the norm of its mean update, weighted as the
    aggregation is, is below eps1 and the largest norm of an update above eps2; into the halves whose largest cosine
    between them is the smallest that can be (:func:`bisect`). Both halves go on from the means of their own updates.
    It needs no K, and sends nothing that the default does not.

    Where the paper leaves things open, or differs:
        - eps1 and eps2 are relative to the largest norm that the cluster's mean update has had, its ancestors'
          included: the paper advises a tenth of that for eps1 and one to ten times eps1 for eps2, and leaves both to
          be tuned. A larger eps1 splits earlier.
        - The paper's further condition on the gap between the halves takes the noise of the updates as known; only
          its limit for none is here: identical updates are not split.
        - The larger half keeps the id (of equal ones, that with the first slot), the other gets a new one. Slots
          without an update stay with the id; they may be split off when they take part again.
        - A slot that comes later has begun from v0. It joins the cluster whose adapter has changed since v0 in the
          most similar direction (with flora and flexlora, whose factors are no sum of changes: whose product is most
          similar), where the paper walks down the tree of earlier splits, and has no say in a split of this round.
        - A cluster is split at most once in a round. A stale update counts with the change since what it began from.
    """
    state, head = evidence.state, settings.clustering.head
    clusters = state.clusters or (Cluster(0, state.initial, ()),)
    home = state.assignment() if state.clusters else {update.key: 0 for update in evidence.updates}
    labels = {update.key: home[update.key] for update in evidence.updates if update.key in home}
    memory, next_id = dict(state.memory), max(1, state.next_cluster_id)
    largest = {cluster.id: _largest(cluster, state) for cluster in clusters}
    for cluster in clusters:
        own = [update for update in evidence.updates if home.get(update.key) == cluster.id]
        if own:
            bases = [evidence.began[update.key] for update in own]
            products = inner_products([update.adapter for update in own], bases, state.initial, head)
            norms = update_norms(products, weights_of(own, settings.aggregation.weighting, {}))
            largest[cluster.id] = max(largest[cluster.id], norms.mean)
            if _pulls_apart(norms, largest[cluster.id], settings.clustering):
                away = smaller_half(bisect(cosines(products)))
                labels |= {update.key: next_id for update, leaves in zip(own, away, strict=True) if leaves}
                next_id += bool(away.any())
        for key in {*cluster.members, *(update.key for update in own)}:
            memory[key] = {LARGEST: np.array([largest[cluster.id]], dtype=np.float32)}
    for update in evidence.updates:
        if update.key not in home:
            if settings.aggregation.rule in RENEWING:
                joined = most_similar(update.adapter, clusters, settings.seed)
            else:
                joined = nearest(update.adapter, evidence.began[update.key], clusters, state.initial, head)
            labels[update.key] = joined
            memory[update.key] = {LARGEST: np.array([largest[joined]], dtype=np.float32)}
    return Grouping(labels, identities=True, clustered=True, memory=memory)


def _largest(cluster: Cluster, state: ServerState) -> float:
    return max((float(state.memory[key][LARGEST][0]) for key in cluster.members if key in state.memory), default=0.0)


def _pulls_apart(norms: "Norms", largest: float, rule: ClusteringConfig) -> bool:
    return norms.mean < rule.eps1 * largest and norms.largest > rule.eps2 * largest


class Norms(NamedTuple):
    """Of a cluster's updates: of their weighted mean, and of the longest one."""

    mean: float
    largest: float


def update_norms(products: Matrix, weights: Sequence[float]) -> Norms:
    """The norms that decide a split.

    Args:
        products: ``[n, n]``, the updates' inner products.
        weights: Positive, one for each update; not normalised.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    squared = float(shares @ products @ shares)
    return Norms(max(0.0, squared) ** 0.5, float(np.sqrt(products.diagonal().max())))


def inner_products(adapters: Sequence[Adapter], bases: Sequence[Adapter], initial: Adapter, head: bool) -> Matrix:
    """The inner products of all pairs of changes.

    Args:
        adapters: n of them.
        bases: What each began from; a head that one lacks began as v0's.
        initial: v0.
        head: Whether heads count.

    Returns:
        float64 ``[n, n]``; a tensor that one of a pair lacks counts as zeros.
    """
    out = np.zeros((len(adapters), len(adapters)))
    names = {name for adapter in adapters for name in adapter if not is_base(name)}
    for name in sorted(name for name in names if head or not is_head(name)):
        rows = [row for row, adapter in enumerate(adapters) if name in adapter]
        values = np.stack(
            [(adapters[row][name] - bases[row].get(name, initial[name])).ravel() for row in rows], dtype=np.float64
        )
        out[np.ix_(rows, rows)] += values @ values.T
    return out


def cosines(products: Matrix) -> Matrix:
    """``[n, n]``; 0 with an update that is zero."""
    norms = np.sqrt(products.diagonal())
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 1e-12)
    return np.asarray(np.clip(products * np.outer(scale, scale), -1.0, 1.0))


def bisect(similarity: Matrix) -> NDArray[np.bool_]:
    """The two halves whose largest similarity between them is the smallest that can be.

    Merging the most similar pair again and again until two groups are left gives them (the paper's Algorithm 1),
    which is single linkage.

    Args:
        similarity: ``[n, n]``, symmetric, in [-1, 1].

    Returns:
        bool ``[n]``, True for the half without the first; all False where there is only one, or the halves cannot be
        told apart.
    """
    n = len(similarity)
    if n < 2:
        return np.zeros(n, dtype=np.bool_)
    distances = 1.0 - (similarity + similarity.T) / 2
    np.fill_diagonal(distances, 0.0)
    tree = scipy.cluster.hierarchy.linkage(squareform(distances, checks=False), "single")
    if tree[-1, 2] < IDENTICAL:
        return np.zeros(n, dtype=np.bool_)
    labels = scipy.cluster.hierarchy.cut_tree(tree, n_clusters=2)[:, 0]
    return np.asarray(labels != labels[0])


def smaller_half(second: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Who leaves: the smaller half; of equal ones, that without the first."""
    return ~second if second.sum() * 2 > len(second) else second


def nearest(adapter: Adapter, began: Adapter, clusters: Sequence[Cluster], initial: Adapter, head: bool) -> int:
    """The id of the cluster that has changed since v0 in the direction most similar to an adapter's change.

    The adapter began from v0, too, perhaps at a smaller rank.
    """
    adapters = [adapter, *(cluster.adapter for cluster in clusters)]
    similarity = cosines(inner_products(adapters, [began, *[initial] * len(clusters)], initial, head))
    return clusters[int(similarity[0, 1:].argmax())].id
