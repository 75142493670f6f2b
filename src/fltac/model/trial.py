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
from fltac.records import LORA_B

LaneBatch = Mapping[str, NDArray[Any]]

MIXING = 0.01
"""A lane's features that differ from those it gives alone by more than this share of what its adapter changes in them
have seen another lane's rows."""
ROUNDING = 1e-4
"""The same as a share of the features is rounding alone, for adapters that change next to nothing."""
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What a model may answer to being run in a way that it was not written for."""


def load_random(model: LaneModel, lanes: int) -> None:
    """Loads adapters with random numbers, so that each lane gives features of its own.

    Their products are a few times as large as a layer's input. With far larger ones attention turns the rounding of
    another kernel into other features; with smaller ones what a single layer mixes up is hardly seen.
    """
    draw = np.random.default_rng(0)

    def random(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        spread = 2.0 * shape[1] ** -0.5 / (model.scaling if name.endswith(LORA_B) else 1.0)
        out: NDArray[np.float32] = (spread * draw.normal(size=shape)).astype(np.float32)
        return out

    shapes = model.body_shapes.items()
    model.load([{name: random(name, shape) for name, shape in shapes} for _ in range(lanes)])


@torch.no_grad()
def keeps_lanes_apart(model: LaneModel, batches: Sequence[LaneBatch]) -> bool:
    """Whether rows of different lanes in one pass give what they give alone, as on nearly all architectures.

    Not so where an attention layer gets its rows in another order than the model (Longformer).

    Args:
        model: With lanes; its adapters are replaced.
        batches: One for each lane, as for ``LaneModel.stack``.
    """
    load_random(model, len(batches))
    together, bare = (model.features(model.stack(batches), active) for active in (len(batches), 0))
    alone = []
    for lane, batch in enumerate(batches):
        model.activate([lane])
        alone.append(model.features(model.stack([batch]), 1))
    model.lanes.active = 0
    apart = torch.cat(alone)
    changed, largest = (apart - bare).abs().max(), apart.abs().max()
    return bool((together - apart).abs().max() <= torch.maximum(MIXING * changed, ROUNDING * largest))


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
