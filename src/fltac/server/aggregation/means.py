"""Weighted means of adapters, tensor by tensor."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fltac.records import Adapter, FloatArray, Update

BLOCK = 128
"""Adapters gathered at a time."""


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
    totals: dict[str, NDArray[np.float64]] = {}
    shares = dict.fromkeys((name for adapter in adapters for name in adapter), 0.0)
    # Some adapters at a time, with all their tensors: those of one lie close together.
    for start in range(0, len(adapters), BLOCK):
        part, given = adapters[start : start + BLOCK], weights[start : start + BLOCK]
        for name in shares:
            held = [tensor for adapter in part if (tensor := adapter.get(name)) is not None]
            if not held:
                continue
            missing = len(held) < len(part)
            own = [weight for adapter, weight in zip(part, given, strict=True) if name in adapter] if missing else given
            share = np.array(own, dtype=np.float64)
            rows = np.stack(held).reshape(len(held), -1)
            total = totals.setdefault(name, np.zeros(held[0].shape, dtype=np.float64))
            total += (share @ rows.astype(np.float64)).reshape(total.shape)
            shares[name] += float(share.sum())
    return {name: (totals[name] / share).astype(np.float32) for name, share in shares.items()}
