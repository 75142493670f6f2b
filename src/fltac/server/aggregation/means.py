"""Weighted means of adapters, tensor by tensor."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fltac.records import Adapter, FloatArray, SlotKey, Update

BLOCK = 128
"""Adapters gathered at a time."""
DOUBTFUL = 0.02
"""The least confidence that a member is weighted by: a cluster of nothing but doubtful members is their mean."""


def weights_of(
    updates: Sequence[Update],
    weighting: Literal["examples", "uniform", "confidence"],
    confidence: Mapping[SlotKey, float],
) -> list[float]:
    """Weights of members of clusters; not normalised.

    Args:
        updates: The members'.
        weighting: ``examples``: by data size (Eq. 2 of arXiv 2404.15384); ``uniform``: equal (its Algorithm 3);
            ``confidence``: by data size times confidence, which counts as at least ``DOUBTFUL``.
        confidence: Of slots in their clusters (``server.choosing.confidence``); one that is not there counts whole.
    """
    if weighting == "uniform":
        return [1.0] * len(updates)
    weights = [float(update.examples) for update in updates]
    if weighting == "examples":
        return weights
    sure = [max(DOUBTFUL, confidence.get(update.key, 1.0)) for update in updates]
    return [weight * share for weight, share in zip(weights, sure, strict=True)]


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
    shares = dict.fromkeys(chain.from_iterable(adapters), 0.0)
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
            rows = np.concatenate(held, axis=None, dtype=np.float64).reshape(len(held), -1)
            total = totals.setdefault(name, np.zeros(held[0].shape, dtype=np.float64))
            total += (share @ rows).reshape(total.shape)
            shares[name] += float(share.sum())
    return {name: (totals[name] / share).astype(np.float32) for name, share in shares.items()}


def shrunk(adapter: Adapter, overall: Adapter, share: float) -> dict[str, FloatArray]:
    """An adapter moved towards another one by a share of the way; what the other one lacks stays as it is."""
    return {
        name: tensor if name not in overall else ((1 - share) * tensor + share * overall[name]).astype(np.float32)
        for name, tensor in adapter.items()
    }
