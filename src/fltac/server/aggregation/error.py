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
from fltac.server.aggregation.parts import Part, columns

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
    for parts, result in groups:
        for module in lora_modules(result):
            one, other = _squares(parts, result, module, seed)
            missed, whole = missed + one, whole + other
    return float(np.sqrt(max(missed, 0.0) / whole)) if whole > 0 else None


def _squares(parts: Sequence[Part], result: Adapter, module: str, seed: int) -> tuple[float, float]:
    """The squared norms of what one matrix's product misses, and of the mean."""
    lefts, rights, each = columns(parts, module)
    members = len(each)
    own_lefts, own_rights, own = columns([Part(without_base(result), base_of(result), 1.0)], module)
    left, right = np.concatenate([*lefts, *own_lefts]), np.concatenate([*rights, *own_rights])
    scale = np.concatenate([each, -own])
    if len(scale) <= EXACT:
        out, into = left.astype(np.float64) * scale[:, None], right.astype(np.float64)
        gram = (out @ out.T) * (into @ into.T)
        return float(gram.sum()), float(gram[:members, :members].sum())
    probes = generator(seed, f"probes {module}").standard_normal((right.shape[1], PROBES), dtype=np.float32)
    low: FloatArray = (right @ probes) * scale[:, None].astype(np.float32)
    mean = left[:members].T @ low[:members]
    return _mean_square(mean + left[members:].T @ low[members:]), _mean_square(mean)


def _mean_square(images: NDArray[np.floating[Any]]) -> float:
    """The mean over the probes of the squared length of what becomes of them, ``[out, probes]``."""
    return float(np.square(images, dtype=np.float64).sum() / images.shape[1])
