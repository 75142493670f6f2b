"""How many groups the uploads support, and how sure each slot's group is.

K is chosen by prediction. The adapted matrices (and the heads) are different views of what a slot has learned: groups
are found in some of them, and in the others each slot is predicted by the mean of the other members of its group.
Groups of different tasks predict badly; groups split without need predict badly as well, for the mean of few members
is noise. So the best K is the one whose averages help the members most, which is what they are averaged for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fltac.server.clustering import Labels, Points, group, squared_distances

Matrix = NDArray[np.float64]

PATIENCE = 3
"""So many K in a row without a better prediction end the search."""


@dataclass(frozen=True)
class Choice:
    """The chosen number of groups.

    Attributes:
        k: The number.
        residuals: For each K that was tried, the mean squared error of the prediction, where 1 is the mean square of
            a slot's own features in the view.
    """

    k: int
    residuals: dict[int, float]

    @property
    def residual(self) -> float:
        """Of the chosen one."""
        return self.residuals[self.k]


def choose_k(
    views: Sequence[tuple[Callable[[int], Points], Matrix]],
    owners: Sequence[str] | None,
    starts: int,
    seed: int,
    before: int | None = None,
    share: float = 0.0,
    given: int | None = None,
) -> Choice:
    """Chooses K by how well groups found in one view predict in another.

    Args:
        views: Pairs of (points to group for a K: ``[n, d]``, kernel to predict in: ``[n, n]``).
        owners: For each slot whose it is, for cannot-link, which bounds K from below; None without.
        starts: Of K-means.
        seed: Of K-means.
        before: The K of the round before.
        share: It stays unless another one lowers the error by more than this share.
        given: The only K to try.

    Returns:
        The K with the least error; the smallest of equals.
    """
    n = len(views[0][1])
    least = 1 if owners is None else int(np.unique(np.asarray(owners), return_counts=True)[1].max())
    found: dict[int, float] = {}
    for k in range(least, max(least, n // 2) + 1) if given is None else [given]:
        found[k] = float(
            np.mean(
                [
                    held_out_residual(kernel, group(points(k), k, owners, starts, seed) if k > 1 else np.zeros(n, int))
                    for points, kernel in views
                ]
            )
        )
        best = min(found, key=lambda number: (found[number], number))
        if k - best >= PATIENCE and (before is None or k >= before):
            break
    if before in found and found[best] >= (1 - share) * found[before]:
        best = before
    return Choice(best, found)


def held_out_residual(kernel: Matrix, labels: Labels) -> float:
    """The mean squared distance of each slot from the mean of the others in its group.

    Args:
        kernel: Inner products of the slots, ``[n, n]``.
        labels: ``[n]``.

    Returns:
        In units of the kernel's mean diagonal; a slot alone is predicted by the mean of all others. 0 for a kernel
        that is zero.
    """
    n, own = len(kernel), np.diag(kernel)
    if n < 2 or own.sum() <= 0:
        return 0.0
    _, of = np.unique(labels, return_inverse=True)
    sizes = np.bincount(of)[of]
    member = np.eye(of.max() + 1)[of]
    with_group = (kernel @ member)[np.arange(n), of]  # of each slot with the sum of its group, itself included
    of_group = np.einsum("ng,ng->g", member, kernel @ member)[of]  # of the group's sum with itself
    alone = sizes == 1
    sums = np.where(alone, kernel.sum(axis=1), with_group)
    squares = np.where(alone, kernel.sum(), of_group)
    others = np.where(alone, n, sizes) - 1
    cross = (sums - own) / others
    mean = (squares - 2 * sums + own) / others**2
    return float((own - 2 * cross + mean).mean() / own.mean())


def confidence(points: Points, labels: Labels) -> NDArray[np.float64]:
    """How much nearer each slot is to its group than to the next: ``[n]``, 0 for a coin's toss, 1 for no doubt.

    ``1 - d_own / d_next`` with distances to the groups' means, a slot's own without itself; negative for a slot that
    lies nearer to another group (cannot-link may ask for that). 0 where there is one group, or a slot is alone in
    its own.
    """
    names, of = np.unique(labels, return_inverse=True)
    out = np.zeros(len(points))
    if len(names) < 2:
        return out
    member = np.eye(len(names))[of]
    sizes = member.sum(axis=0)
    means = (member.T @ points) / sizes[:, None]
    distances = np.sqrt(squared_distances(points, means))
    rows, own = np.arange(len(points)), sizes[of]
    # Without the slot itself its group's mean lies m / (m - 1) times as far away.
    mine = distances[rows, of] * own / np.maximum(own - 1, 1)
    distances[rows, of] = np.inf
    rest = distances.min(axis=1)
    shared = own > 1
    scale = np.maximum(np.maximum(mine, rest), 1e-300)
    out[shared] = ((rest - mine) / scale)[shared]
    return out
