"""How far a cluster's product is from the exact mean of its members' products, without forming any.

For each adapted matrix the difference is a sum of low-rank products, written as ``L R`` with stacked factors. With few
columns its squared norm is the sum over ``(L^T L) * (R R^T)``, in float64. With many it is the mean over seeded normal
vectors z of ``|L (R z)|^2``, which is unbiased.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fltac.records import Adapter, FloatArray, base_of, lora_modules, without_base
from fltac.seeding import generator
from fltac.server.aggregation.means import BLOCK
from fltac.server.aggregation.parts import Matrix, Part, columns

EXACT = 96
"""Up to so many columns inner products of all of them are taken."""
PROBES = 32
"""Vectors for more columns: the norms of 24 matrices together are right to about 2.5 %."""


def product_error(groups: Sequence[tuple[Sequence[Part], Adapter]], seed: int) -> float | None:
    """``||product - mean of products|| / ||mean of products||``, over all clusters and adapted matrices together.

    Bases count as part of the products. The factor in front of B A cancels.

    Args:
        groups: For each cluster its members and what the rule made of them, before any server optimizer.
        seed: Of the probes.

    Returns:
        None where there are no factors or the mean is zero everywhere.
    """
    missed = whole = 0.0
    probes = _Probes(seed)
    for parts, result in groups:
        for module in lora_modules(result):
            one, other = _squares(parts, result, module, probes)
            missed, whole = missed + one, whole + other
    return float(np.sqrt(max(missed, 0.0) / whole)) if whole > 0 else None


class _Probes:
    """Of each matrix, the same for all clusters."""

    def __init__(self, seed: int) -> None:
        self._seed, self._drawn = seed, dict[str, FloatArray]()

    def of(self, module: str, inputs: int) -> FloatArray:
        """float32 ``[inputs, PROBES]``."""
        if module not in self._drawn:
            draw = generator(self._seed, f"probes {module}")
            self._drawn[module] = draw.standard_normal((inputs, PROBES), dtype=np.float32)
        return self._drawn[module]


def _squares(parts: Sequence[Part], result: Adapter, module: str, probes: _Probes) -> tuple[float, float]:
    """The squared norms of what one matrix's product misses, and of the mean."""
    lefts, rights, each = columns(parts, module)
    members = len(each)
    own_lefts, own_rights, own = columns([Part(without_base(result), base_of(result), 1.0)], module)
    if members + len(own) <= EXACT:
        scale = np.concatenate([each, -own])
        out = np.concatenate([*lefts, *own_lefts], dtype=np.float64) * scale[:, None]
        into = np.concatenate([*rights, *own_rights], dtype=np.float64)
        gram = (out @ out.T) * (into @ into.T)
        return float(gram.sum()), float(gram[:members, :members].sum())
    drawn = probes.of(module, rights[0].shape[1])
    mean = _images(lefts, rights, each, drawn)
    return _mean_square(mean - _images(own_lefts, own_rights, own, drawn)), _mean_square(mean)


def _images(lefts: Sequence[FloatArray], rights: Sequence[FloatArray], each: Matrix, probes: FloatArray) -> FloatArray:
    """What a sum of products makes of the probes: ``[out, probes]``; some at a time, so that they stay in the cache."""
    total, start = np.zeros((lefts[0].shape[1], probes.shape[1]), dtype=np.float32), 0
    for first in range(0, len(lefts), BLOCK):
        left, right = (np.concatenate(blocks[first : first + BLOCK]) for blocks in (lefts, rights))
        share = each[start : start + len(right), None].astype(np.float32)
        start += len(right)
        total += left.T @ ((right @ probes) * share)
    return total


def _mean_square(images: NDArray[np.floating[Any]]) -> float:
    """The mean over the probes of the squared length of what becomes of them, ``[out, probes]``."""
    return float(np.square(images, dtype=np.float64).sum() / images.shape[1])
