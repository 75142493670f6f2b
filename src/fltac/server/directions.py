"""What was learned in several rounds, without signs: the leading directions of all changes together.

The sign of a change of A says which way a slot's labels pushed, and may turn from one round to the next: summed, two
rounds that learned the same would cancel. Their second moments ``sum_t x_t x_t^T`` do not, and one slot's are compared
with another's by the cosine of these matrices, rooted. After one round that is the absolute cosine of the changes.
Of a second moment its leading directions are kept, as rows ``F`` with ``F^T F`` its best approximation of that rank.
"""

import numpy as np
from numpy.typing import NDArray

from fltac.records import FloatArray

DIRECTIONS = 3
"""Kept of each matrix, at least 2: with three, groups replayed on five rounds are as right as with all
(``docs/clustering.md``)."""


def added(held: FloatArray, changes: FloatArray) -> FloatArray:
    """The leading directions of what n slots held and of one more change of each.

    Args:
        held: float32 ``[n, directions, width]``; zeros where there is nothing yet.
        changes: float32 ``[n, width]``.

    Returns:
        float32 ``[n, directions, width]``. Signs and order say nothing.
    """
    rows = np.concatenate([changes[:, None], held], axis=1)
    moments = np.einsum("ntw,nsw->nts", rows, rows, dtype=np.float64, optimize=True)
    turns = np.linalg.eigh(moments)[1][:, :, 1:]  # all but the least
    return np.asarray(np.einsum("nst,nsw->ntw", turns.astype(np.float32), rows, optimize=True))


def squared_agreement(left: FloatArray, right: FloatArray) -> NDArray[np.float64]:
    """The inner products of second moments: ``|F G^T|^2``, the squares of all inner products of rows summed.

    Args:
        left: ``[n, directions, width]``.
        right: ``[m, directions, width]``.

    Returns:
        float64 ``[n, m]``.
    """
    total = np.zeros((len(left), len(right)), dtype=np.float32)
    for first in np.moveaxis(left, 1, 0):
        for second in np.moveaxis(right, 1, 0):
            inner = first @ second.T
            total += np.square(inner, out=inner)
    return total.astype(np.float64)


def squared_lengths(rows: FloatArray) -> NDArray[np.float64]:
    """The same of each slot with itself: float64 ``[n]`` of ``[n, directions, width]``."""
    moments = np.einsum("ntw,nsw->nts", rows, rows, dtype=np.float64, optimize=True)
    return np.asarray(np.einsum("nts,nts->n", moments, moments))
