"""Local training: adapters side by side in lanes through one pass of the frozen backbone.

The loss of a batch is the sum of the lanes' own mean losses, so each lane's gradient is what it would be alone.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fltac.client.crew import Crew
from fltac.client.losses import Step, lane_losses
from fltac.client.memory import give_back
from fltac.client.optimizer import LaneOptimizer
from fltac.client.schedule import POOL, LanePlan, plan_passes
from fltac.config import TrainingConfig
from fltac.model.lanes import LaneModel
from fltac.records import Adapter, SlotKey, is_head


@dataclass(frozen=True)
class TrainJob:
    """One adapter's training in one round."""

    client: str
    slot: int
    start: Adapter
    steps: Sequence[Step]
    examples: int
    dropout_seed: int
    frozen: str | None = None
    """The ending of the names of factors that are not trained."""

    @property
    def key(self) -> SlotKey:
        """Whose it is."""
        return self.client, self.slot

    def freezes(self, name: str) -> bool:
        """Whether a tensor stays as it is."""
        return self.frozen is not None and name.endswith(self.frozen) and not is_head(name)

    @property
    def rows(self) -> int:
        """Rows in each batch."""
        return len(self.steps[0].rows)

    @cached_property
    def padded_sizes(self) -> NDArray[np.int64]:
        """Tokens of each batch when it is padded to its longest row: ``[steps]``."""
        return np.array([step.length * len(step.rows) for step in self.steps], dtype=np.int64)

    @cached_property
    def packed_sizes(self) -> NDArray[np.int64]:
        """Tokens of each batch's rows: ``[steps]``."""
        return np.array([step.tokens for step in self.steps], dtype=np.int64)


@dataclass(frozen=True)
class Trained:
    """A job's result: the adapter in float32 and the mean loss over its steps."""

    job: TrainJob
    adapter: Adapter
    loss: float


Result = TypeVar("Result")
OnPass = Callable[[int, Tensor], None]
"""Told after a pass how many adapters were in it, and their losses; reading those waits for a GPU."""


def no_report(active: int, losses: Tensor) -> None:
    """Says nothing."""


def train(
    model: LaneModel,
    jobs: Sequence[TrainJob],
    config: TrainingConfig,
    dropout: float,
    plan: LanePlan,
    on_pass: OnPass = no_report,
) -> list[Trained]:
    """Trains all jobs.

    Args:
        model: The backbone with its lanes.
        jobs: In any order.
        config: The ``training`` section.
        dropout: Of the adapters' inputs.
        plan: How large a pass may be.
        on_pass: Called after each pass.

    Returns:
        One result for each job, in the order of ``jobs``.
    """
    results = {trained.job.key: trained for trained in train_each(model, jobs, config, dropout, plan, on_pass)}
    return [results[job.key] for job in jobs]


def train_each(
    model: LaneModel,
    jobs: Sequence[TrainJob],
    config: TrainingConfig,
    dropout: float,
    plan: LanePlan,
    on_pass: OnPass = no_report,
) -> Iterator[Trained]:
    """As :func:`train`, but yields each result when its pool is done, so that not all need to be in memory."""

    def work(own: LaneModel, pool: Sequence[TrainJob], watched: OnPass) -> list[Trained]:
        return train_pool(own, pool, config, dropout, plan, watched)

    for done in over_pools(model, jobs, plan, work, on_pass):
        yield from done


def over_pools(
    model: LaneModel,
    jobs: Sequence[TrainJob],
    plan: LanePlan,
    work: Callable[[LaneModel, Sequence[TrainJob], OnPass], Result],
    on_pass: OnPass,
    size: int = POOL,
) -> Iterator[Result]:
    """Does something with all jobs, those together that are in memory together; yields what came of each such pool.

    Args:
        model: The backbone with its lanes.
        jobs: In any order.
        plan: How large a pass may be, and how many run side by side.
        work: Given a model, a pool and what to tell of each pass.
        on_pass: What to tell.
        size: The most jobs of a pool.
    """
    # One adapter at a time needs no others in memory; with full fine-tuning each is as large as the backbone.
    todo = pools(jobs, 1 if plan.lanes == 1 else size, plan)
    with warnings.catch_warnings():
        # The gradients' strides are those of the matrix that the optimizer works on.
        warnings.filterwarnings("ignore", message="grad and param do not obey")
        workers = min(plan.workers, len(todo))
        if workers <= 1:
            for pool in todo:
                yield work(model, pool, on_pass)
            return
        with Crew(model, workers, plan.workers // workers) as crew:
            watched = crew.watched(on_pass)
            yield from crew.map(lambda own, pool: work(own, pool, watched), todo)


def pools(jobs: Sequence[TrainJob], size: int, plan: LanePlan) -> list[list[TrainJob]]:
    """Groups jobs that are in memory together, at most ``size``: near in steps; a fixed function of the jobs.

    Where rows are padded, also of equal batch sizes and near in length. With several workers there are at least as
    many, as far as there are jobs, the largest first.
    """

    def order(job: TrainJob) -> tuple[int | float | str, ...]:
        if plan.packed:
            return (len(job.steps), *job.key)
        return (job.rows, len(job.steps), float(job.padded_sizes.mean()), *job.key)

    def tokens(pool: Sequence[TrainJob]) -> int:
        return sum(int((job.packed_sizes if plan.packed else job.padded_sizes).sum()) for job in pool)

    out: list[list[TrainJob]] = []
    for _, same in groupby(sorted(jobs, key=order), key=lambda job: 0 if plan.packed else job.rows):
        own = list(same)
        if len(own) <= size:
            # Few enough for any cut: into equal parts of all tokens, by where the middle of each job falls.
            each = np.array([tokens([job]) for job in own])
            part = ((np.cumsum(each) - each / 2) / max(1, each.sum()) * plan.workers).astype(int).tolist()
            out += [[job for job, _ in pool] for _, pool in groupby(zip(own, part, strict=True), key=itemgetter(1))]
        else:
            count = min(len(own), -(-len(own) // (size * plan.workers)) * plan.workers)
            edges = [number * len(own) // count for number in range(count + 1)]
            out += [own[start:stop] for start, stop in pairwise(edges)]
    return out if plan.workers == 1 else sorted(out, key=tokens, reverse=True)


def passes_of(pool: Sequence[TrainJob], plan: LanePlan) -> list[list[int]]:
    """The passes in order, each the numbers of its jobs: those with the same head side by side, as one product."""
    passes = plan_passes([job.packed_sizes if plan.packed else job.padded_sizes for job in pool], plan)
    return [sorted(numbers, key=lambda number: (pool[number].steps[0].head_key, number)) for numbers in passes]


def train_pool(
    model: LaneModel,
    pool: Sequence[TrainJob],
    config: TrainingConfig,
    dropout: float,
    plan: LanePlan,
    on_pass: OnPass = no_report,
) -> list[Trained]:
    """Trains jobs (of one batch size, where rows are padded) through common passes; returns results in their order."""
    passes = passes_of(pool, plan)
    model.load([job.start for job in pool], max(map(len, passes)))
    frozen = model.columns(pool[0].freezes)  # The same for all jobs of a round.
    optimizer = LaneOptimizer(config, model.rows(), [len(job.steps) for job in pool], frozen)
    generators = [torch.Generator().manual_seed(job.dropout_seed) for job in pool]
    model.lanes.dropout = dropout
    sums = torch.zeros(len(pool), dtype=torch.float32, device=model.values.device)
    for made, numbers in enumerate(passes, start=1):
        model.activate(numbers)
        model.lanes.generators = [generators[number] for number in numbers]
        losses = lane_losses(model, [pool[number].steps[optimizer.done[number]] for number in numbers], config.loss)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        active = len(numbers)
        optimizer.step(numbers, model.values[:active], model.gradients[:active])
        sums[numbers] += losses.detach().float()
        on_pass(active, losses.detach())
        if model.packs:
            give_back(made)
    model.lanes.dropout = 0.0
    totals = sums.tolist()
    return [Trained(job, model.read(number), totals[number] / len(job.steps)) for number, job in enumerate(pool)]
