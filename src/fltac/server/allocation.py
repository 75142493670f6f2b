"""Clusters found once and then kept: the allocation of experts in FedLEASE (arXiv 2509.15087)."""

from collections.abc import Sequence

import numpy as np
import scipy.cluster.hierarchy
from numpy.typing import NDArray
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score

from fltac.config import ServerSettings
from fltac.records import LORA_B, Adapter, Cluster, lora_modules
from fltac.server.grouping import Evidence, Grouping
from fltac.server.products import RENEWING, most_similar

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


def allocate(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """Clusters the first uploads by the cosine of B; from then on every slot stays where it is.

    As in the paper: slots train from v0 (its warm-up), the distance of two is the mean over the adapted matrices of
    1 - cos(B), clustering is agglomerative with average linkage, and K has the best silhouette of 2 to ``k_max``
    (or is given). Within a cluster A and B are averaged. It sends nothing that the default does not.

    After FedLEASE; the differences:
        - Its mixture of experts on the client, a router over all clusters' adapters of which each client uses as many
          as it likes, is not here: a client gets its own cluster's adapter alone, and none of the others' is sent.
        - The warm-up is the first round in which an update can be used; the paper's has a length of its own.
        - Where no K has a silhouette above 0, or there are fewer than three slots, there is one cluster.
        - A slot that comes later, trained from v0 as all were, joins the cluster whose mean B is nearest; with flora
          and flexlora, which keep no mean B, the one whose product is most similar.
        - Heads are averaged with their cluster, and never compared.
    """
    state = evidence.state
    if state.clusters:
        home = state.assignment()
        labels = {
            update.key: home[update.key] if update.key in home else _nearest(update.adapter, state.clusters, settings)
            for update in evidence.updates
        }
        return Grouping(labels, identities=True, clustered=True)
    distances = b_distances([update.adapter for update in evidence.updates])
    k = settings.clustering.k
    found, score = average_linkage(distances, None if k == "auto" else k, settings.clustering.k_max)
    keys = [update.key for update in evidence.updates]
    first = {key: int(label) for key, label in zip(keys, found, strict=True)}
    return Grouping(first, identities=True, clustered=True, silhouette=score)


def b_distances(adapters: Sequence[Adapter]) -> Matrix:
    """The mean over the adapted matrices of 1 - cos(B): float64 ``[n, n]``; the cosine with a B of zeros is 0."""
    modules = lora_modules(adapters[0])
    total = np.zeros((len(adapters), len(adapters)))
    for module in modules:
        rows = np.stack([adapter[module + LORA_B].ravel() for adapter in adapters]).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)
        total += unit @ unit.T
    distances = np.clip(1.0 - total / max(1, len(modules)), 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def average_linkage(distances: Matrix, k: int | None, k_max: int) -> tuple[Labels, float | None]:
    """Cuts the tree of average linkage.

    Args:
        distances: ``[n, n]``, symmetric, with a diagonal of zeros.
        k: Number of clusters, at most n are made; None: that of the best silhouette.
        k_max: The most that are tried.

    Returns:
        int64 ``[n]``, numbered from 0 by the first slot of each, and the mean silhouette; None where it is not defined.
    """
    n = len(distances)
    if n == 1:
        return np.zeros(1, dtype=np.int64), None
    tree = scipy.cluster.hierarchy.linkage(squareform(distances, checks=False), "average")
    if k is not None:
        labels = _cut(tree, min(k, n))
        return labels, _silhouette(distances, labels)
    best, score = np.zeros(n, dtype=np.int64), 0.0
    for count in range(2, min(k_max, n - 1) + 1):
        labels = _cut(tree, count)
        found = _silhouette(distances, labels)
        if found is not None and found > score:
            best, score = labels, found
    return best, score if best.any() else None


def _cut(tree: Matrix, count: int) -> Labels:
    labels = scipy.cluster.hierarchy.cut_tree(tree, n_clusters=count)[:, 0]
    _, first, of = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(first.argsort().argsort()[of], dtype=np.int64)


def _silhouette(distances: Matrix, labels: Labels) -> float | None:
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(distances, labels, metric="precomputed"))


def _nearest(adapter: Adapter, clusters: Sequence[Cluster], settings: ServerSettings) -> int:
    """The id of the cluster whose mean has the nearest B."""
    if settings.aggregation.rule in RENEWING:
        return most_similar(adapter, clusters, settings.seed)
    distances = b_distances([adapter, *(cluster.adapter for cluster in clusters)])[0, 1:]
    return clusters[int(distances.argmin())].id
