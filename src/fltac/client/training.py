"""Local training: adapters side by side in lanes through one pass of the frozen backbone.

The loss of a batch is the sum of the lanes' own mean losses, so each lane's gradient is what it would be alone.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fltac.client.optimizer import LaneOptimizer
from fltac.config import TrainingConfig
from fltac.data.encoded import EncodedTask
from fltac.model.lanes import LaneModel
from fltac.records import Adapter


@dataclass(frozen=True)
class Step:
    """One batch of one adapter's training: rows of a task's training split, through one of its heads."""

    task: EncodedTask
    head_key: str
    rows: NDArray[np.int64]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.task.train.lengths[self.rows].max())


@dataclass(frozen=True)
class TrainJob:
    """One adapter's training in one round."""

    client: str
    slot: int
    start: Adapter
    steps: Sequence[Step]
    examples: int
    dropout_seed: int

    @property
    def tokens(self) -> float:
        """Mean length of the batches in tokens."""
        return float(np.mean([step.length for step in self.steps]))


@dataclass(frozen=True)
class Trained:
    """A job's result: the adapter in float32 and the mean loss over its steps."""

    job: TrainJob
    adapter: Adapter
    loss: float


def plan_lanes(jobs: Sequence[TrainJob], lanes: int) -> list[list[TrainJob]]:
    """Groups jobs that train side by side: by batch size, then steps and length, at most ``lanes`` in a group.

    A fixed function of the jobs, whatever their order. In a group the longest training comes first.
    """
    ordered = sorted(jobs, key=lambda job: (len(job.steps[0].rows), len(job.steps), job.tokens, job.client, job.slot))
    groups: list[list[TrainJob]] = []
    for job in ordered:
        full = not groups or len(groups[-1]) == lanes
        if full or len(groups[-1][0].steps[0].rows) != len(job.steps[0].rows):
            groups.append([])
        groups[-1].append(job)
    return [sorted(group, key=lambda job: -len(job.steps)) for group in groups]


def train(
    model: LaneModel,
    jobs: Sequence[TrainJob],
    config: TrainingConfig,
    dropout: float,
    lanes: int,
    on_trained: Callable[[Trained], None] = lambda _: None,
) -> list[Trained]:
    """Trains all jobs.

    Args:
        model: The backbone with its lanes.
        jobs: In any order.
        config: The ``training`` section.
        dropout: Of the adapters' inputs.
        lanes: How many jobs may share a pass.
        on_trained: Called for each job when it is done.

    Returns:
        One result for each job, in the order of ``jobs``.
    """
    results: dict[tuple[str, int], Trained] = {}
    for group in plan_lanes(jobs, lanes):
        for trained in train_group(model, group, config, dropout):
            results[trained.job.client, trained.job.slot] = trained
            on_trained(trained)
    return [results[job.client, job.slot] for job in jobs]


def train_group(model: LaneModel, group: Sequence[TrainJob], config: TrainingConfig, dropout: float) -> list[Trained]:
    """Trains the jobs of one group side by side, the longest training first; returns results in that order."""
    model.load([job.start for job in group])
    counts = [len(job.steps) for job in group]
    optimizer = LaneOptimizer(config, model.values, model.gradients, counts)
    model.lanes.dropout = dropout
    model.lanes.generators = [torch.Generator().manual_seed(job.dropout_seed) for job in group]
    losses = torch.zeros(len(group), dtype=torch.float64)
    for number in range(counts[0]):
        active = sum(count > number for count in counts)
        steps = [job.steps[number] for job in group[:active]]
        loss = lane_losses(model, steps)
        with warnings.catch_warnings():
            # The gradients' strides are those of the matrix that the optimizer works on.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            loss.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step(active)
        losses[:active] += loss.detach().double().cpu()
    model.lanes.dropout = 0.0
    return [Trained(job, model.read(lane), float(losses[lane]) / counts[lane]) for lane, job in enumerate(group)]


def lane_losses(model: LaneModel, steps: Sequence[Step]) -> Tensor:
    """Each lane's mean loss on its batch: ``[lanes]``."""
    lengths = [step.length for step in steps]
    batch = stack_batches([step.task.train.batch(step.rows, max(lengths)) for step in steps], model)
    model.lanes.lengths = lengths if steps[0].task.kind == "text" else ()
    features = model.features(batch, len(steps))
    rows = len(steps[0].rows)
    losses = []
    for lane, step in enumerate(steps):
        logits = model.logits(features[lane * rows : (lane + 1) * rows], lane, step.head_key)
        labels = torch.from_numpy(np.asarray(step.task.train.labels[step.rows])).to(logits.device)
        losses.append(loss_of(logits, labels))
    return torch.stack(losses)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``[b, classes]`` with int64 labels ``[b]``; mean squared error of ``[b, 1]`` with floats."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def stack_batches(batches: Sequence[dict[str, NDArray[np.generic]]], model: LaneModel) -> dict[str, Tensor]:
    """Puts the lanes' batches one after the other on the model's device."""
    device = model.backbone.device
    return {
        name: torch.from_numpy(np.concatenate([batch[name] for batch in batches])).to(device) for name in batches[0]
    }
