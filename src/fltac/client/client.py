"""One client: its slots, the trainings that a request asks for, and the reply."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from fltac.client.batches import BatchKey, hold_back, make_batches
from fltac.client.losses import Step
from fltac.client.training import Trained, TrainJob
from fltac.config import Config, TrainingConfig
from fltac.data.augment import Views, draw_views
from fltac.data.encoded import EncodedTask
from fltac.records import HEAD, LORA_A, Adapter, FloatArray, Reply, Request, Update, at_rank, is_head
from fltac.seeding import derive, generator


@dataclass(frozen=True)
class LocalTask:
    """One task of a client: its rows of the task's training split, its head (empty: none) and its steps in a round.

    ``held`` are rows of that split that are not trained on, to score adapters.
    """

    task: EncodedTask
    rows: NDArray[np.int64]
    head_key: str
    steps: int
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))


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


def local_task(
    task: EncodedTask, rows: NDArray[np.int64], head_key: str, config: Config, client: str, number: int
) -> LocalTask:
    """A task of a client in a federation.

    Args:
        task: Encoded.
        rows: All that the client holds of its training split.
        head_key: Of the head that it is trained through.
        config: Gives the steps, and the share that is held back.
        client: The client's id.
        number: The slot, plus the task's place among those that share it.
    """
    trained, held = hold_back(rows, config.server.clustering.held_back, config.federation.seed, client, number)
    return LocalTask(task, trained, head_key, local_steps(config.training, len(trained)), held)


def start_adapter(request: Request, slot: int, heads: Sequence[str], initial: Adapter) -> Adapter:
    """What a slot continues from: its cluster's adapter, or v0 if it has none yet.

    Args:
        request: From the server.
        slot: The slot.
        heads: The head keys that its tasks use, empty ones for tasks without; other heads are left out. A head that
            the cluster's adapter lacks is taken from v0, and so are factors that it lacks since they are never trained.
        initial: v0, from this request or kept from an earlier one.
    """
    cluster = request.slots.get(slot)
    received = initial if cluster is None else request.adapters[cluster]
    if cluster is not None:
        constant = {name: tensor for name, tensor in initial.items() if not is_head(name) and name not in received}
        received = {**received, **constant}
    names = [f"{HEAD}{key}.{part}" for key in sorted(set(heads) - {""}) for part in ("weight", "bias")]
    body = {name: tensor for name, tensor in received.items() if not name.startswith(HEAD)}
    return body | {name: received[name] if name in received else initial[name] for name in names}


def plan_jobs(client: Client, request: Request, initial: Adapter, config: Config) -> list[TrainJob]:
    """The trainings of one client in one round, one for each slot."""
    jobs = []
    number, seed = request.round_number, config.federation.seed
    for slot, tasks in sorted(client.slots.items()):
        start = start_adapter(request, slot, [task.head_key for task in tasks], initial)
        start = at_rank(start, config.lora.rank_of(client.id))
        jobs.append(
            TrainJob(
                client=client.id,
                slot=slot,
                start=start,
                steps=draw_steps(client.id, slot, tasks, number, config.training, seed=seed),
                examples=sum(len(task.rows) for task in tasks),
                dropout_seed=derive(seed, "dropout", number, client.id, slot),
                frozen=config.server.aggregation.frozen(number),
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


def reply_of(
    client: Client,
    trained: Sequence[Trained],
    request: Request | None = None,
    profiles: Mapping[int, FloatArray] | None = None,
    gradients: Mapping[int, Adapter] | None = None,
) -> Reply:
    """The upload of all of a client's slots: of each what was trained, at the rank that it was sent.

    With the clusters that the slots chose, where a request let them choose, and by slot profiles and gradients, if
    there are any.
    """
    chosen = request.slots if request is not None and request.candidates else {}
    said, seen = profiles or {}, gradients or {}
    updates = tuple(
        Update(
            client.id,
            slot,
            _uploaded(one),
            one.job.examples,
            chosen.get(slot),
            said.get(slot),
            seen.get(slot),
        )
        for one in trained
        for slot in [one.job.slot]
    )
    return Reply(client.id, updates)


def _uploaded(trained: Trained) -> Adapter:
    ranks = {len(tensor) for name, tensor in trained.job.start.items() if name.endswith(LORA_A)}
    kept = {name: tensor for name, tensor in trained.adapter.items() if not trained.job.freezes(name)}
    return at_rank(kept, ranks.pop()) if ranks else kept


def draw_steps(
    client: str,
    slot: int,
    tasks: Sequence[LocalTask],
    number: int,
    training: TrainingConfig,
    *,
    seed: int,
    count: int | None = None,
) -> list[Step]:
    """A slot's batches; those of several tasks in one slot (shared adapter) in a seeded random order.

    Args:
        client: The client's id.
        slot: The slot.
        tasks: That share it.
        number: The round.
        training: Of the run.
        seed: Of the batches.
        count: So many of each task; None: as many as it makes in a round.
    """
    steps: list[Step] = []
    for index, local in enumerate(tasks):
        key, made = BatchKey(seed, number, client, slot + index), local.steps if count is None else count
        batches = make_batches(local.rows, local.task.train.lengths, made, training.batch_size, training.batching, key)
        shares = label_shares(local, training)
        views: list[Views | None] = [None] * made
        if training.augment != "none":
            draw = generator(seed, "augment", number, client, slot + index)
            views = [*draw_views(made, training.batch_size, local.task.mirror, draw)]
        steps += [
            Step(local.task, local.head_key, rows, shares, view) for rows, view in zip(batches, views, strict=True)
        ]
    if len(tasks) > 1:
        order = generator(seed, "interleave", number, client, slot).permutation(len(steps))
        steps = [steps[position] for position in order]
    return steps
