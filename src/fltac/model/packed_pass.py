"""Runs a backbone on packed rows, where it can be run so at all."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fltac.model.attention import NAME, UnpackableError, attending
from fltac.model.backbone import Backbone, at_least_float32, pooled
from fltac.model.causal import predict
from fltac.model.packing import PackedBatch, PackedRows, pack

TOLERANCE = 1e-3
"""Largest difference between packed and padded features, as a share of the largest feature, in float32."""


def pooled_packed(backbone: Backbone, batch: PackedBatch, first_position: int) -> Tensor:
    """Runs the backbone on packed rows.

    Args:
        backbone: One for which :func:`first_position` found a number.
        batch: The rows.
        first_position: That number.

    Returns:
        float ``[rows, hidden]`` in float32, or float64 where the backbone is; for a causal language model
        ``[rows, vocabulary]``, the mean logits.
    """
    if backbone.kind == "causal-lm":
        return predict(backbone, batch, first_position).row_means()
    positions = (batch.rows.positions + first_position).unsqueeze(0)
    with attending(batch.rows):
        out = backbone.model(**batch.inputs, position_ids=positions)
    return pool(out.last_hidden_state[0], batch.rows, backbone)


def pooled_padded(backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """The same of padded rows."""
    return predict(backbone, batch).row_means() if backbone.kind == "causal-lm" else pooled(backbone, batch)


def pool(states: Tensor, rows: PackedRows, backbone: Backbone) -> Tensor:
    """What a head reads of ``[tokens, hidden]``: ``[rows, hidden]``. ``[rows, hidden]`` holds first tokens only."""
    if backbone.pooling == "cls":
        cut = len(states) == len(rows.lengths)
        return at_least_float32(states if cut else states.index_select(0, rows.first_tokens))
    states = at_least_float32(states)
    total = states.new_zeros(len(rows.lengths), states.shape[1]).index_add(0, rows.row_of_token, states)
    return total / rows.counts


@torch.no_grad()
def first_position(backbone: Backbone, batch: Mapping[str, NDArray[Any]]) -> int | None:
    """Whether packed rows give what padded rows give, found by trying.

    Args:
        backbone: In float32, its adapters switched off.
        batch: A few padded rows of different lengths, arrays ``[b, length]``.

    Returns:
        The position id of a row's first token (0, or one more than the padding token's as in RoBERTa); None where
        the backbone cannot be run on packed rows: it does not use torch's attention, takes no ``position_ids``,
        attends in a window, pools by a module of its own, or gives other features.
    """
    model = backbone.model
    if model.config._attn_implementation != NAME or backbone.kind == "image" or backbone.pooling == "pooler":
        return None
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    device = backbone.device
    padded = pooled_padded(backbone, {name: torch.from_numpy(value).to(device) for name, value in batch.items()})
    packed = pack([batch], device)
    padding = getattr(model.config, "pad_token_id", None) or 0
    for first in (0, padding + 1):
        try:
            features = pooled_packed(backbone, packed, first)
        except (UnpackableError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            continue
        if features.shape == padded.shape and (features - padded).abs().max() <= TOLERANCE * padded.abs().max():
            return first
    return None
