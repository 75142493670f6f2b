"""A causal language model's predictions of the tokens that are asked for, and of no others.

Only a response's tokens have labels. The hidden states that predict them are picked out before the model's output
layer, whose products over a large vocabulary would else be most of the work and of the memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fltac.model.attention import attending
from fltac.model.backbone import Backbone, at_least_float32
from fltac.model.packing import PackedBatch

LABELS = "labels"
IGNORED = -100
"""The label of a token that is not asked for, as in transformers. A row's first token never is."""

AHEAD = 1e-6
"""Share by which a prediction may change with tokens that come after it: by rounding alone."""


@dataclass(frozen=True)
class Predicted:
    """Predictions of the tokens that a batch asks for.

    Attributes:
        logits: ``[n, vocabulary]`` in float32, or float64 where the backbone is.
        tokens: int64 ``[n]``: the tokens.
        rows: int64 ``[n]``: the row of each; ascending.
        count: Rows of the batch.
    """

    logits: Tensor
    tokens: Tensor
    rows: Tensor
    count: int

    def row_losses(self) -> tuple[Tensor, Tensor]:
        """For each row the sum of its tokens' negative log-likelihoods ``[count]``, and their number."""
        losses = F.cross_entropy(self.logits, self.tokens, reduction="none")
        zeros = losses.new_zeros(self.count)
        return zeros.index_add(0, self.rows, losses), zeros.index_add(0, self.rows, torch.ones_like(losses))

    def row_means(self) -> Tensor:
        """For each row the mean of its logits ``[count, vocabulary]``: what trials of a backbone compare."""
        total = self.logits.new_zeros(self.count, self.logits.shape[1]).index_add(0, self.rows, self.logits)
        return total / torch.bincount(self.rows, minlength=self.count).clamp(min=1).unsqueeze(1)


def predict(backbone: Backbone, batch: Mapping[str, Tensor] | PackedBatch, first_position: int = 0) -> Predicted:
    """Runs a causal language model.

    Args:
        backbone: Of kind ``causal-lm``.
        batch: ``input_ids``, ``labels`` and, if padded, ``attention_mask``, int64 ``[b, length]``, padded on the
            right; or packed rows.
        first_position: The position id of a packed row's first token.
    """
    packed = isinstance(batch, PackedBatch)
    inputs = dict(batch.inputs if isinstance(batch, PackedBatch) else batch)
    labels = inputs.pop(LABELS)
    wanted = labels.flatten()[1:] != IGNORED  # the token before a wanted one predicts it
    places = wanted.nonzero().squeeze(1)
    tokens = labels.flatten()[1:][places]
    with _picked(backbone.model, places, labels.numel()) as picked:
        if isinstance(batch, PackedBatch):
            positions = (batch.rows.positions + first_position).unsqueeze(0)
            with attending(batch.rows):
                logits = backbone.model(**inputs, position_ids=positions).logits
        else:
            logits = backbone.model(**inputs).logits
    logits = logits.reshape(-1, logits.shape[-1])
    if not picked:
        logits = logits.index_select(0, places)
    rows = batch.rows.row_of_token[places] if isinstance(batch, PackedBatch) else places // labels.shape[1]
    count = len(batch.rows.lengths) if isinstance(batch, PackedBatch) else len(labels)
    assert len(logits) == len(tokens), f"{len(logits)} predictions of {len(tokens)} tokens, packed: {packed}"
    return Predicted(at_least_float32(logits), tokens, rows, count)


@contextmanager
def _picked(model: nn.Module, places: Tensor, total: int) -> Iterator[list[bool]]:
    """Inside, the output layer gets the hidden states at some places only; the list is empty where it got all."""
    done: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        if states.dim() != 3 or states.shape[0] * states.shape[1] != total:
            return None
        done.append(True)
        return (states.reshape(total, -1).index_select(0, places).unsqueeze(0), *args[1:])

    output = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(output, nn.Module):
        yield done
        return
    handle = output.register_forward_pre_hook(pick)
    try:
        yield done
    finally:
        handle.remove()


@torch.no_grad()
def reads_ahead(backbone: Backbone, batch: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a prediction depends on the token that it predicts, as in an encoder that was loaded as a decoder.

    Args:
        backbone: In float32, its adapters switched off.
        batch: One row at least, as a split makes it.
    """
    row = {name: np.array(value[:1]) for name, value in batch.items()}
    last = int(row["attention_mask"].sum()) - 1
    row[LABELS][:] = IGNORED
    row[LABELS][0, last] = row["input_ids"][0, last]
    changed = {name: value.copy() for name, value in row.items()}
    changed["input_ids"][0, last] = (row["input_ids"][0, last] + 1) % backbone.model.config.vocab_size
    one, other = (
        predict(backbone, {name: torch.from_numpy(value).to(backbone.device) for name, value in each.items()}).logits
        for each in (row, changed)
    )
    return bool((one - other).abs().max() > AHEAD * one.abs().max())
