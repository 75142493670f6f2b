"""K-means, plain and with cannot-link: adapters of one client belong to different tasks by construction.

The constrained assignment step is one minimum-cost matching for each client (Hungarian method), so that its
slots fall into different clusters. A client with more slots than clusters fills each cluster at most
ceil(slots / K) times.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score

Labels = NDArray[np.int64]
Points = NDArray[np.floating]

ITERATIONS = 100


def group(points: Points, k: int, owners: Sequence[str] | None, starts: int, seed: int) -> Labels:
    """Groups points by K-means.

    Args:
        points: ``[n, d]``.
        k: Number of clusters; where there are fewer points, each is alone.
        owners: For each point whose it is, for cannot-link; None without.
        starts: Seeded starts; the solution with the least sum of squares wins.
        seed: Of all starts.

    Returns:
        int64 ``[n]``, numbers from 0; some may be unused (points that are all alike).
    """
    if len(points) <= k:
        return np.arange(len(points))
    plain = _plain(points, k, starts, seed)
    if owners is None:
        return plain
    members = [np.flatnonzero(np.asarray(owners) == owner) for owner in dict.fromkeys(owners)]
    centres = [_means(points, plain, np.zeros((k, points.shape[1])))]
    state = np.random.RandomState(seed % 2**32)
    centres += [kmeans_plusplus(points, k, random_state=state)[0] for _ in range(starts)]
    solutions = [_constrained(points, start, members) for start in centres]
    return min(solutions, key=lambda solution: solution[1])[0]


def _plain(points: Points, k: int, starts: int, seed: int) -> Labels:
    with warnings.catch_warnings():
        # Fewer distinct points than clusters is a case of its own, not a fault: some clusters stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(k, n_init=starts, random_state=seed % 2**32).fit_predict(points)
    return np.asarray(found, dtype=np.int64)


def _constrained(points: Points, centres: Points, members: Sequence[Labels]) -> tuple[Labels, float]:
    """Lloyd's iterations with one matching a client; returns labels and the sum of squared distances."""
    labels = np.full(len(points), -1, dtype=np.int64)
    for _ in range(ITERATIONS):
        costs = squared_distances(points, centres)
        assigned = assign_distinct(costs, members)
        if (assigned == labels).all():
            break
        labels = assigned
        centres = _means(points, labels, centres)
    costs = squared_distances(points, centres)
    return labels, float(costs[np.arange(len(points)), labels].sum())


def assign_distinct(costs: Points, members: Sequence[Labels]) -> Labels:
    """Assigns each client's points to different clusters at least cost.

    Args:
        costs: ``[n, k]``.
        members: For each client the indices of its points; together all n.

    Returns:
        int64 ``[n]``.
    """
    n, k = costs.shape
    labels = np.empty(n, dtype=np.int64)
    for rows in members:
        own = costs[rows]
        if len(rows) > k:
            own = np.tile(own, (1, -(-len(rows) // k)))
        chosen_rows, chosen = linear_sum_assignment(own)
        labels[rows[chosen_rows]] = chosen % k
    return labels


def squared_distances(points: Points, centres: Points) -> Points:
    """``[n, k]``, not below 0."""
    cross = points @ centres.T
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    return np.asarray(np.clip(squares - 2 * cross, 0.0, None))


def _means(points: Points, labels: Labels, previous: Points) -> Points:
    """Each cluster's mean; an empty cluster keeps its previous centre."""
    centres = np.array(previous, dtype=np.float64)
    for label in np.unique(labels):
        centres[label] = points[labels == label].mean(axis=0)
    return centres


def silhouette(points: Points, labels: Labels) -> float | None:
    """Mean silhouette; None for fewer than two clusters or as many as points, where it is not defined."""
    count = len(np.unique(labels))
    if not 2 <= count < len(points):
        return None
    return float(silhouette_score(points, labels))
