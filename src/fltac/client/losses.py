"""One step of lanes: each one's batch, and the loss of its adapter on it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fltac.config.training import Loss
from fltac.data.augment import Views, seen
from fltac.data.encoded import EncodedTask, Split
from fltac.model.lanes import LaneModel
from fltac.model.prefix import RowKey

WIDE_HEAD = 16
"""Outputs past which a head is work enough alone: on a CPU one product for all lanes' is slower then."""


@dataclass(frozen=True)
class Step:
    """One batch of one adapter's training: rows of a task's training split, through one of its heads.

    ``shares`` are those of the classes among all the slot's rows, ``[outputs]``, where the loss asks for them;
    ``views`` is what the images are seen as, where they are augmented.
    """

    task: EncodedTask
    head_key: str
    rows: NDArray[np.int64]
    shares: NDArray[np.float64] | None = None
    views: Views | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.task.train.lengths[self.rows].max())

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.task.train.lengths[self.rows].sum())


def lane_losses(model: LaneModel, steps: Sequence[Step], loss: Loss = "plain") -> Tensor:
    """Each lane's mean loss on its batch: ``[lanes]``; of a causal language model the mean over response tokens."""
    lengths = [step.length for step in steps]
    longest = None if model.packs else max(lengths)
    batch = model.stack([_inputs(step, longest) for step in steps])
    model.lanes.lengths = lengths if steps[0].task.kind != "image" else ()
    # What the frozen layers make of a row is kept for the row, not for a view of it.
    kept = model.prefix is not None and all(step.views is None for step in steps)
    keys = [key for step in steps for key in row_keys(step.task.train, step.rows)] if kept else []
    sizes = [len(step.rows) for step in steps]
    if steps[0].task.kind == "causal-lm":
        sums, counts = model.predictions(batch, len(steps), keys).row_losses()
        each = zip(torch.split(sums, sizes), torch.split(counts, sizes), strict=True)
        return torch.stack([own.sum() / count.sum() for own, count in each])
    features = torch.split(model.features(batch, len(steps), keys), sizes)
    return torch.cat([_common_losses(model, features, steps, lanes, loss) for lanes in alike_lanes(model, steps)])


def alike_lanes(model: LaneModel, steps: Sequence[Step]) -> list[list[int]]:
    """Neighbouring lanes whose heads are applied in one product: few outputs, in the same place, and as many rows with
    labels of one kind."""

    def kind(lane: int) -> Hashable:
        step = steps[lane]
        weight, bias = model.head_parts(lane, step.head_key)
        if weight.shape[0] > WIDE_HEAD:
            return lane
        return weight, bias, len(step.rows), step.task.train.labels.dtype.kind, step.shares is None

    return [list(lanes) for _, lanes in groupby(range(len(steps)), key=kind)]


def _common_losses(
    model: LaneModel, features: Sequence[Tensor], steps: Sequence[Step], lanes: Sequence[int], loss: Loss
) -> Tensor:
    """The losses of lanes that are alike: ``[lanes]``."""
    own, first = [steps[lane] for lane in lanes], lanes[0]
    if len(lanes) == 1:
        logits = model.logits(features[first], first, own[0].head_key).unsqueeze(0)
    else:
        parts = model.head_parts(first, own[0].head_key)
        logits = model.lane_logits(torch.stack([features[lane] for lane in lanes]), first, parts)
    labels = np.stack([np.asarray(step.task.train.labels[step.rows]) for step in own])
    shares = None if own[0].shares is None else np.stack([step.shares for step in own if step.shares is not None])
    return loss_of(logits, torch.from_numpy(labels).to(logits.device), loss, shares)


def _inputs(step: Step, longest: int | None) -> dict[str, NDArray[Any]]:
    batch = step.task.train.batch(step.rows, longest)
    return batch if step.views is None else seen(batch, step.views)


def row_keys(split: Split, rows: NDArray[np.int64]) -> list[RowKey]:
    """What rows are known by where results of frozen layers are kept."""
    return [(split.fingerprint, row) for row in rows.tolist()]


def loss_of(logits: Tensor, labels: Tensor, loss: Loss = "plain", shares: NDArray[np.float64] | None = None) -> Tensor:
    """The mean losses of batches.

    Args:
        logits: ``[..., b, classes]``; ``[..., b, 1]`` with a regression.
        labels: int64 ``[..., b]`` class numbers; floats make it a mean squared error.
        loss: ``logit-adjusted``: cross entropy of ``logits + log(shares)`` (arXiv 2007.07314, eq. 10, tau = 1).
            ``balanced``: each row times 1 / (classes * share of its class), which is 1 on average over the slot's rows.
        shares: Of the classes among the slot's rows, ``[..., classes]``; not needed for ``plain``.

    Returns:
        ``[...]``: of each batch.
    """
    if labels.is_floating_point():
        return ((logits.squeeze(-1) - labels.to(logits.dtype)) ** 2).mean(-1)
    own = None if shares is None else torch.from_numpy(shares).to(logits)
    if own is not None and loss == "logit-adjusted":
        logits = logits + own.log().unsqueeze(-2)
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    if own is not None and loss == "balanced":
        each = each / (own.shape[-1] * own.gather(-1, labels))
    return each.mean(-1)
