"""Handwritten digits that come with scikit-learn: one half pretrains a backbone, the other holds four tasks.

The tasks ask different yes-or-no questions about the same images, so they contradict each other: an adapter
that answers one of them is wrong about the others.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fltac.seeding import generator

POSITIVE: dict[str, frozenset[int]] = {
    "digits-parity": frozenset({1, 3, 5, 7, 9}),
    "digits-high": frozenset({5, 6, 7, 8, 9}),
    "digits-loop": frozenset({0, 4, 6, 8, 9}),
    "digits-three": frozenset({0, 3, 6, 9}),
}
"""The digits with label 1: odd, at least five, with a closed loop, multiples of three."""

LEVELS = 16
"""The largest value of a pixel in scikit-learn's file."""

SPLIT_SEED = 0
"""Fixed: a backbone that is pretrained once must not have seen the images of any run's tasks."""


def task_rows(name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The rows of a task; all tasks have the same images in the same order.

    Args:
        name: One of ``POSITIVE``.

    Returns:
        Images uint8 ``[898, 8, 8]`` and labels int64 ``[898]``, 0 or 1.
    """
    positive = sorted(POSITIVE[name])
    images, digits = _rows(1)
    return images, np.isin(digits, positive).astype(np.int64)


def pretraining_rows() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The rows that no task has.

    Returns:
        Images uint8 ``[899, 8, 8]`` and the digits that they show, int64 ``[899]``.
    """
    return _rows(0)


def halves(digits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits all rows in two, for each digit as equally as its count allows.

    Args:
        digits: int64 ``[n]``.

    Returns:
        Row numbers of the pretraining half and of the tasks' half, int64, each ascending.
    """
    order = generator(SPLIT_SEED, "digits-halves").permutation(len(digits))
    # Every second row of a list ordered by digit: each digit's rows alternate between the halves.
    order = order[np.argsort(digits[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def _rows(half: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 ``[n, 8, 8]`` from 0 to 255 and digits int64 ``[n]`` of one half."""
    loaded = load_digits()
    digits = loaded.target.astype(np.int64)
    rows = halves(digits)[half]
    levels = loaded.images[rows].astype(np.int64)
    return ((levels * 255 + LEVELS // 2) // LEVELS).astype(np.uint8), digits[rows]
