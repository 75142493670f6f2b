"""What a backbone can take, found by trying it on a few rows before a run starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fltac.model.first_token import possible_cuts
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import TOLERANCE
from fltac.model.prefix import Prefix, find_prefix

LaneBatch = Mapping[str, NDArray[Any]]

MIXING = 0.1
"""Features of a lane that differ by more than this share from those it gives alone have seen another lane's rows."""
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What a model may answer to being run in a way that it was not written for."""


def load_random(model: LaneModel, lanes: int) -> None:
    """Loads adapters with random numbers, so that each lane gives features of its own."""
    draw = np.random.default_rng(0)
    shapes = model.body_shapes.items()
    model.load([{name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes} for _ in range(lanes)])


@torch.no_grad()
def keeps_lanes_apart(model: LaneModel, batches: Sequence[LaneBatch]) -> bool:
    """Whether rows of different lanes in one pass give what they give alone, as on nearly all architectures.

    Not so where an attention layer gets its rows in another order than the model (Longformer).

    Args:
        model: With lanes; its adapters are replaced.
        batches: One for each lane, as for ``LaneModel.stack``.
    """
    load_random(model, len(batches))
    together = model.features(model.stack(batches), len(batches))
    alone = []
    for lane, batch in enumerate(batches):
        model.activate([lane])
        alone.append(model.features(model.stack([batch]), 1))
    model.lanes.active = 0
    apart = torch.cat(alone)
    return bool((together - apart).abs().max() <= MIXING * apart.abs().max())


@torch.no_grad()
def take_shortcuts(model: LaneModel, batches: Sequence[LaneBatch]) -> None:
    """Sets ``model.cut`` and ``model.prefix`` where they change nothing.

    Args:
        model: In float32, with lanes, with rows packed or padded as they will be; its adapters are replaced.
        batches: As for :func:`keeps_lanes_apart`.
    """
    load_random(model, len(batches))
    stacked = model.stack(batches)
    reference = model.features(stacked, len(batches))
    rows = len(reference)

    def unchanged() -> bool:
        try:
            found = model.features(stacked, len(batches), [("trial", row) for row in range(rows)])
        except FAILURES:
            return False
        return _equal(found, reference)

    if model.backbone.pooling == "cls":
        for cut in possible_cuts(model.backbone.model, list(model.layers)):
            model.cut = cut
            if unchanged():
                break
            model.cut = None
    prefix = find_prefix(model.backbone.model, model.layers)
    if prefix is not None:
        model.prefix = prefix
        prefix.admitted.add("trial")
        model.prefix = _emptied(prefix) if unchanged() else None
    model.lanes.active = 0


def _emptied(prefix: Prefix) -> Prefix:
    prefix.admitted.clear()
    prefix.kept.clear()
    return prefix


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
