"""Which slots of two clients belong together: a kernel sharpened by what a client's slots are, of different tasks.

What two slots have in common says little by itself. Slots that learned much have something in common with all others,
and a client's slots compete: each of them is at most one of the other client's tasks. So

- what is to be expected, ``d_i d_j / sum(d)`` with ``d`` a slot's sum over the slots of other clients, is taken away
  (modularity: Newman, PNAS 103, 2006), and
- between each two clients a dual softmax follows: a pair counts as far as it is the best of its row and of its column.
  Beside the slots of the other client stands "none of them", which weighs as much as a pair of which nothing more than
  expected is known, for clients may have no task in common.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Rows = NDArray[np.int64]

STEEPEST = 30.0
"""Largest exponent: beyond, a pair is certain anyway."""


class Pairing:
    """The sharpened kernel of slots with some of them, the landmarks; all of a client's are among these or none."""

    def __init__(self, similarity: Matrix, owners: Sequence[str], sharpness: float) -> None:
        """Args:
        similarity: Of the landmarks with each other, ``[l, l]``.
        owners: For each landmark whose it is; those of one owner stand together.
        sharpness: What similarities are multiplied by before the softmax, in units of their root mean square.
        """
        self._owners, self._sharpness = np.asarray(owners), sharpness
        others = self._owners[:, None] != self._owners
        self._sums = _sums(similarity, others)
        self._total = float(self._sums.sum())
        more = self._more(similarity, others)
        self._unit = float(np.sqrt((more[others] ** 2).mean())) if others.any() else 0.0

    @property
    def works(self) -> bool:
        """Whether slots of different clients have anything in common that could be sharpened."""
        return self._total > 0 and self._unit > 0

    def __call__(self, similarity: Matrix, owners: Sequence[str], landmarks: Rows) -> Matrix:
        """Args:
        similarity: Of n slots with the landmarks, ``[n, l]``.
        owners: For each of the n whose it is; all slots of an owner, one after the other.
        landmarks: ``[l]`` their rows among the n; those outside of 0 to n - 1 are not among them.

        Returns:
            ``[n, l]``, from 0 to 1: a slot with itself 1, with another of its owner 0.
        """
        own = np.asarray(owners)
        others = own[:, None] != self._owners
        exponents = self._sharpness / self._unit * self._more(similarity, others)
        weights = np.exp(np.clip(exponents, -STEEPEST, STEEPEST)) * others
        of_row, of_column = _by_owner(weights.T, self._owners).T, _by_owner(weights, own)
        out = weights / np.sqrt((1 + of_row) * (1 + of_column))
        here = (landmarks >= 0) & (landmarks < len(own))
        out[landmarks[here], np.flatnonzero(here)] = 1.0
        return np.asarray(out)

    def _more(self, similarity: Matrix, others: NDArray[np.bool_]) -> Matrix:
        """What slots have in common beyond what is to be expected: ``[n, l]``."""
        if self._total <= 0:
            return np.zeros_like(similarity)
        return similarity - np.outer(_sums(similarity, others), self._sums / self._total)


def paired(similarity: Matrix, owners: Sequence[str], sharpness: float) -> Matrix:
    """The sharpened kernel of all slots: ``[n, n]``, symmetric; what was given where nothing could be sharpened.

    Args:
        similarity: ``[n, n]``.
        owners: For each slot whose it is; those of one owner stand together.
        sharpness: As for :class:`Pairing`; 0 for none.
    """
    if not sharpness:
        return similarity
    pairing = Pairing(similarity, owners, sharpness)
    return pairing(similarity, owners, np.arange(len(owners))) if pairing.works else similarity


def _sums(similarity: Matrix, others: NDArray[np.bool_]) -> Matrix:
    """Of each row with the landmarks of others, not below 0: ``[n]``."""
    return np.asarray(np.clip((similarity * others).sum(axis=1), 0.0, None))


def _by_owner(values: Matrix, owners: NDArray[np.str_]) -> Matrix:
    """For each row the sum over all rows of its owner; the same shape."""
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
    sizes = np.diff(np.r_[starts, len(owners)])
    return np.repeat(np.add.reduceat(values, starts, axis=0), sizes, axis=0)
