"""K-means, plain and with cannot-link: adapters of one client belong to different tasks by construction.

The constrained assignment step is one minimum-cost matching for each client, so that its slots fall into different
clusters. A client with more slots than clusters fills each cluster at most ceil(slots / K) times.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

Labels = NDArray[np.int64]
Points = NDArray[np.floating]

ITERATIONS = 100
SAMPLE = 2000
"""Points from which many starts are tried, and whose silhouette is taken; all points up to this many."""
ARRANGEMENTS = 720
"""Up to so many ways to place a client's points they are all compared, for many clients at once."""
BLOCK = 2**18
"""Numbers of an intermediate result at a time."""


def group(points: Points, k: int, owners: Sequence[str] | None, starts: int, seed: int) -> Labels:
    """Groups points by K-means.

    Args:
        points: ``[n, d]``.
        k: Number of clusters; where there are fewer points, each is alone.
        owners: For each point whose it is, for cannot-link; None without.
        starts: Seeded starts; the solution with the least sum of squares wins. Of more than ``SAMPLE`` points
            they are tried on a seeded sample (whole owners, for cannot-link), and the best goes on with all points.
        seed: Of all starts.

    Returns:
        int64 ``[n]``, numbers from 0; some may be unused (points that are all alike).
    """
    if len(points) <= k:
        return np.arange(len(points))
    rows = sample(len(points), owners, seed, SAMPLE)
    part, small = points[rows], len(rows) < len(points)
    if owners is None:
        plain = _plain(part, k, "k-means++", starts, seed)
        return _plain(points, k, _means(part, plain, part[:k]), 1, seed) if small else plain
    seeds = first_centres(part, k, starts, seed)
    free = _best(part, seeds, ())
    centres = np.stack([_means(part, free, part[:k]), *seeds])
    if small:
        labels = _best(part, centres, teams_of([owners[row] for row in rows]))
        centres = _means(part, labels, part[:k])[None]
    return _best(points, centres, teams_of(owners))


def first_centres(points: Points, k: int, starts: int, seed: int) -> Points:
    """Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, section 8), all starts at once.

    Each next centre is that of a few points, drawn with a probability that grows as the squared distance to the
    nearest centre, which leaves the least sum of such distances. For many starts on few points, where one call of
    scikit-learn for each start takes longer than all the rest.

    Args:
        points: ``[n, d]``, at least k.
        k: Centres.
        starts: How many times.
        seed: Of all.

    Returns:
        ``[starts, k, d]``, each one of the points.
    """
    draw, trials, every = np.random.default_rng(seed), 2 + int(math.log(k)), np.arange(starts)
    chosen = np.empty((starts, k), dtype=np.int64)
    chosen[:, 0] = draw.integers(len(points), size=starts)
    nearest = squared_distances(points, points[chosen[:, 0]])  # [n, starts]
    for step in range(1, k):
        sums = nearest.cumsum(axis=0)
        wanted = draw.random((trials, starts)) * sums[-1]
        tried = np.stack([(sums <= row).sum(axis=0) for row in wanted])  # [trials, starts]
        tried = np.minimum(tried, len(points) - 1)
        near = squared_distances(points, points[tried.ravel()]).reshape(len(points), trials, starts)
        near = np.minimum(near, nearest[:, None])
        best = near.sum(axis=0).argmin(axis=0)
        chosen[:, step], nearest = tried[best, every], near[:, best, every]
    return np.asarray(points[chosen])


def sample(n: int, owners: Sequence[str] | None, seed: int, count: int) -> Labels:
    """About ``count`` seeded points of n, in their order: all if they are few; all of an owner or none."""
    if n <= count:
        return np.arange(n)
    draw = np.random.default_rng(seed)
    if owners is None:
        return np.sort(draw.permutation(n)[:count])
    names, of = np.unique(np.asarray(owners), return_inverse=True)
    order = draw.permutation(len(names))
    enough = np.searchsorted(np.cumsum(np.bincount(of)[order]), count) + 1
    return np.flatnonzero(np.isin(of, order[:enough]))


def _plain(points: Points, k: int, init: Any, starts: int, seed: int) -> Labels:
    with warnings.catch_warnings():
        # Fewer distinct points than clusters is a case of its own, not a fault: some clusters stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(k, init=init, n_init=starts, random_state=seed % 2**32).fit_predict(points)
    return np.asarray(found, dtype=np.int64)


def _best(points: Points, starts: Points, teams: Sequence[Labels]) -> Labels:
    """The first solution with the least sum of squares; ``starts`` is ``[s, k, d]``, ``teams`` may be ()."""
    size = max(1, BLOCK // (len(points) * starts.shape[1]))
    found = [_lloyd(points, starts[first : first + size], teams) for first in range(0, len(starts), size)]
    labels, sums = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.asarray(labels[sums.argmin()])


def _lloyd(points: Points, centres: Points, teams: Sequence[Labels]) -> tuple[Labels, Points]:
    """Lloyd's iterations from several starts side by side, each until nothing moves.

    Args:
        points: ``[n, d]``.
        centres: ``[starts, k, d]``.
        teams: As :func:`teams_of` gives them, for one matching a client; () without.

    Returns:
        int64 ``[starts, n]``, and the sums of squared distances ``[starts]``.
    """
    starts, k, _ = centres.shape
    labels, each = np.full((starts, len(points)), -1, dtype=np.int64), np.arange(starts)[:, None]
    # To the matchings a client of each start is one more client.
    teams = [(len(points) * each[:, None] + rows).reshape(-1, rows.shape[1]) for rows in teams]
    for _ in range(ITERATIONS):
        # Squared distances less each point's own square, which is the same for all centres.
        costs = (centres**2).sum(axis=-1)[:, None] - 2 * (points @ centres.transpose(0, 2, 1))
        assigned = assign_distinct(costs.reshape(-1, k), teams).reshape(labels.shape)
        if (assigned == labels).all():
            break
        labels = assigned
        centres = _means(points, labels, centres)
    return labels, np.square(points - centres[each, labels]).sum(axis=(1, 2))


def keep_or_move(points: Points, before: Labels, found: Labels, owners: Sequence[str] | None, share: float) -> Labels:
    """The grouping of the round before, unless the one that was found is better by more than a share.

    Args:
        points: ``[n, d]``.
        before: ``[n]`` the groups of the round before; -1 for a point that had none, which joins the nearest.
        found: ``[n]``.
        owners: As for :func:`group`.
        share: Of the sum of squared distances.

    Returns:
        One of the two, ``before`` with all points in a group.
    """
    known = before >= 0
    if not known.any():
        return found
    names, of = np.unique(before[known], return_inverse=True)
    centres = _means(points[known], of, np.zeros((len(names), points.shape[1])))
    costs = squared_distances(points, centres)
    held = np.where(known, np.searchsorted(names, before), -1)
    joined = costs.argmin(axis=1) if owners is None else _beside(costs, held, owners)
    kept = np.where(known, held, joined)
    return names[kept] if _spread(points, found) > (1 - share) * _spread(points, kept) else found


def _beside(costs: Points, held: Labels, owners: Sequence[str]) -> Labels:
    """The cheapest placement in which the points that have a group keep it, one matching for each owner."""
    fixed = np.where(held >= 0)[0]
    bound = np.array(costs)
    bound[fixed] += costs.sum() + 1.0
    bound[fixed, held[fixed]] = 0.0
    return assign_distinct(bound, teams_of(owners))


def _spread(points: Points, labels: Labels) -> float:
    """The sum of squared distances from the groups' means."""
    _, of = np.unique(labels, return_inverse=True)
    means = _means(points, of, np.zeros((int(of.max()) + 1, points.shape[1])))
    return float(((points - means[of]) ** 2).sum())


def teams_of(owners: Sequence[str]) -> list[Labels]:
    """The indices of each owner's points, owners with equally many together: int64 ``[owners, points]`` each."""
    _, of, counts = np.unique(np.asarray(owners), return_inverse=True, return_counts=True)
    by_owner = np.split(np.argsort(of, kind="stable"), np.cumsum(counts)[:-1])
    return [np.array([rows for rows in by_owner if len(rows) == size]) for size in np.unique(counts)]


def assign_distinct(costs: Points, teams: Sequence[Labels]) -> Labels:
    """Assigns each client's points to different clusters at least cost.

    Args:
        costs: ``[n, k]``.
        teams: As :func:`teams_of` gives them; together all n points.

    Returns:
        int64 ``[n]``. Where a client's cheapest clusters are all different they are the answer; only the others
        need a matching.
    """
    labels = np.asarray(costs.argmin(axis=1), dtype=np.int64)
    for rows in teams:
        wanted = np.sort(labels[rows], axis=1)
        clash = rows[(wanted[:, 1:] == wanted[:, :-1]).any(axis=1)]
        if len(clash):
            labels[clash] = _matchings(costs[clash])
    return labels


def _matchings(costs: Points) -> Labels:
    """The cheapest placement of each client's points: ``[clients, points, k]`` to int64 ``[clients, points]``."""
    clients, size, k = costs.shape
    if size <= k and math.perm(k, size) <= ARRANGEMENTS:
        ways = np.array(list(permutations(range(k), size)))
        out = np.empty((clients, size), dtype=np.int64)
        for start in range(0, clients, BLOCK // len(ways)):
            block = slice(start, start + BLOCK // len(ways))
            totals = sum(costs[block, point][:, ways[:, point]] for point in range(size))
            out[block] = ways[np.argmin(totals, axis=1)]
        return out
    copies = -(-size // k)
    return np.array([linear_sum_assignment(np.tile(own, (1, copies)))[1] % k for own in costs])


def squared_distances(points: Points, centres: Points) -> Points:
    """``[n, k]``, not below 0."""
    cross = points @ centres.T
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    return np.asarray(np.clip(squares - 2 * cross, 0.0, None))


def _means(points: Points, labels: Labels, previous: Points) -> Points:
    """Each cluster's mean, of one labelling or several: ``[..., k, d]``; an empty cluster keeps its previous centre."""
    centres = np.array(previous, dtype=np.float64)
    members = (labels[..., None, :] == np.arange(centres.shape[-2])[:, None]).astype(np.float64)
    sizes = members.sum(axis=-1)
    held = sizes > 0
    centres[held] = (members @ points)[held] / sizes[held][:, None]
    return centres


def silhouette(points: Points, labels: Labels, seed: int) -> float | None:
    """Mean silhouette; None for fewer than two clusters or as many as points, where it is not defined.

    Of more than ``SAMPLE`` points, the mean over a seeded sample of them, each compared with all points.
    """
    names, own = np.unique(labels, return_inverse=True)
    n, count = len(points), len(names)
    if not 2 <= count < n:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:SAMPLE])
    members = np.eye(count)[own]  # [n, count]
    sizes = members.sum(axis=0)
    total = 0.0
    for start in range(0, len(rows), max(1, BLOCK // n)):
        block = rows[start : start + max(1, BLOCK // n)]
        sums = np.sqrt(squared_distances(points[block], points)) @ members  # [block, count]
        mine = (np.arange(len(block)), own[block])
        # A point's distance to itself is rounding at most; it is not one of the others.
        inside = sums[mine] / np.maximum(sizes[own[block]] - 1, 1)
        means = sums / sizes
        means[mine] = np.inf
        outside = means.min(axis=1)
        value = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-300)
        total += float(value[sizes[own[block]] > 1].sum())
    return total / len(rows)
