"""How the members of a group become one adapter: the mean of the factors, tensor by tensor (arXiv 2305.05644)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fltac.records import Adapter, FloatArray, Update


def weights_of(updates: Sequence[Update], weighting: Literal["examples", "uniform"]) -> list[float]:
    """By data size (Eq. 2 of arXiv 2404.15384) or equal (its Algorithm 3); not normalised."""
    return [float(update.examples) if weighting == "examples" else 1.0 for update in updates]


def mean_adapter(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, FloatArray]:
    """The weighted mean.

    Args:
        adapters: At least one; the same body, perhaps different heads.
        weights: Positive, one for each adapter.

    Returns:
        Each tensor averaged, in float64, over those adapters that have it: heads of different keys are never
        mixed. Float32, in the order of first occurrence.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    out: dict[str, FloatArray] = {}
    for name in names:
        held = [(weight, adapter[name]) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter]
        total = np.zeros(held[0][1].shape, dtype=np.float64)
        for weight, tensor in held:
            total += weight * tensor
        out[name] = (total / sum(weight for weight, _ in held)).astype(np.float32)
    return out
