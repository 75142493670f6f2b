"""One client: its slots, the trainings that a request asks for, and the reply."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from fltac.client.batches import BatchKey, make_batches
from fltac.client.training import Step, Trained, TrainJob
from fltac.config import Config, TrainingConfig
from fltac.data.encoded import EncodedTask
from fltac.records import HEAD, Adapter, Reply, Request, Update
from fltac.seeding import derive, generator


@dataclass(frozen=True)
class LocalTask:
    """One task of a client: its rows of the task's training split, its head (empty: none) and its steps in a round."""

    task: EncodedTask
    rows: NDArray[np.int64]
    head_key: str
    steps: int


@dataclass(frozen=True)
class Client:
    """A participant. ``slots`` maps an anonymous number to the local tasks that share that slot's adapter."""

    id: str
    slots: Mapping[int, tuple[LocalTask, ...]]


def head_shapes(tasks: Iterable[LocalTask], hidden: int) -> dict[str, tuple[int, int]]:
    """The heads that some local tasks use: key to (outputs, hidden); nothing for a task without a head."""
    return {local.head_key: (local.task.outputs, hidden) for local in tasks if local.head_key}


def local_steps(config: TrainingConfig, rows: int) -> int:
    """Steps of a slot with so many rows in one round: ``steps`` (tau, default 20), or passes over the rows."""
    if config.epochs is not None:
        return max(1, ceil(config.epochs * rows / config.batch_size))
    return config.steps or 20


def start_adapter(request: Request, slot: int, heads: Sequence[str], initial: Adapter) -> Adapter:
    """What a slot continues from: its cluster's adapter, or v0 if it has none yet.

    Args:
        request: From the server.
        slot: The slot.
        heads: The head keys that its tasks use, empty ones for tasks without; other heads are left out. A head that
            the cluster's adapter lacks is taken from v0.
        initial: v0, from this request or kept from an earlier one.
    """
    cluster = request.slots.get(slot)
    received = initial if cluster is None else request.adapters[cluster]
    names = [f"{HEAD}{key}.{part}" for key in sorted(set(heads) - {""}) for part in ("weight", "bias")]
    body = {name: tensor for name, tensor in received.items() if not name.startswith(HEAD)}
    return body | {name: received[name] if name in received else initial[name] for name in names}


def plan_jobs(client: Client, request: Request, initial: Adapter, config: Config) -> list[TrainJob]:
    """The trainings of one client in one round, one for each slot."""
    jobs = []
    seed, number = config.federation.seed, request.round_number
    for slot, tasks in sorted(client.slots.items()):
        start = start_adapter(request, slot, [task.head_key for task in tasks], initial)
        jobs.append(
            TrainJob(
                client=client.id,
                slot=slot,
                start=start,
                steps=_steps(client.id, slot, tasks, number, config),
                examples=sum(len(task.rows) for task in tasks),
                dropout_seed=derive(seed, "dropout", number, client.id, slot),
            )
        )
    return jobs


def label_shares(local: LocalTask, config: TrainingConfig) -> NDArray[np.float64] | None:
    """The shares of the classes among a slot's rows, one row more of each, so that none is 0; None if not needed."""
    if config.loss == "plain":
        return None
    labels = local.task.train.labels[local.rows]
    assert local.task.outputs, "a task without classes has the plain loss alone"
    if np.issubdtype(labels.dtype, np.floating):
        return None
    counts = np.bincount(labels.astype(np.int64), minlength=local.task.outputs) + 1.0
    return np.asarray(counts / counts.sum())


def reply_of(client: Client, trained: Sequence[Trained]) -> Reply:
    """The upload of all of a client's slots."""
    updates = tuple(Update(client.id, result.job.slot, result.adapter, result.job.examples) for result in trained)
    return Reply(client.id, updates)


def _steps(client: str, slot: int, tasks: Sequence[LocalTask], number: int, config: Config) -> list[Step]:
    """A slot's batches; those of several tasks in one slot (shared adapter) in a seeded random order."""
    seed, training = config.federation.seed, config.training
    steps: list[Step] = []
    for index, local in enumerate(tasks):
        key = BatchKey(seed, number, client, slot + index)
        batches = make_batches(
            local.rows, local.task.train.lengths, local.steps, training.batch_size, training.batching, key
        )
        shares = label_shares(local, training)
        steps += [Step(local.task, local.head_key, rows, shares) for rows in batches]
    if len(tasks) > 1:
        order = generator(seed, "interleave", number, client, slot).permutation(len(steps))
        steps = [steps[position] for position in order]
    return steps
