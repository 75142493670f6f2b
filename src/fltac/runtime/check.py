"""A data owner's trial before it joins: its file is read, three steps are trained on each task, nothing is sent."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fltac.client.client import head_shapes, plan_jobs, reply_of
from fltac.client.gradients import gradients, plan_gradients
from fltac.client.training import Trained, TrainJob, train
from fltac.config import Config
from fltac.data.encoded import majority_score
from fltac.records import Request
from fltac.runtime.owner import Owner, load_owner
from fltac.runtime.run_directory import peak_rss_bytes
from fltac.server.round import init_server
from fltac.wire.codec import encode_reply

TRIAL_STEPS = 3


@dataclass(frozen=True)
class TaskCheck:
    """What was found about one local task.

    Attributes:
        task: Its name, which stays on this machine.
        slot: The number under which the server knows it.
        rows: Training rows.
        validation_rows: Rows that it is scored on.
        outputs: Number of classes, or 1 for a regression.
        metric: What it is scored by.
        majority: Validation score of always answering the most frequent class, or the mean; None without classes.
        steps: Optimizer steps in a round.
        seconds: What a round should take, from the trial steps.
        loss: Mean loss of the trial steps.
    """

    task: str
    slot: int
    rows: int
    validation_rows: int
    outputs: int
    metric: str
    majority: float | None
    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class ClientCheck:
    """What was found about a client file.

    Attributes:
        client: The client's id.
        tasks: By slot.
        seconds: What a round should take: the first, in which gradients are made where they are compared.
        peak_memory_bytes: The most that the process has held in memory, backbone and encoded rows included; on a GPU
            also ``peak_gpu_bytes``.
        upload_bytes: Size of the message that the first round uploads.
        threads: CPU threads that are used.
        device: Where the backbone is.
    """

    client: str
    tasks: tuple[TaskCheck, ...]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    upload_bytes: int
    threads: int
    device: str

    def record(self) -> Mapping[str, Any]:
        """As JSON."""
        return asdict(self)


def check_client(config: Config, client_file: Path) -> ClientCheck:
    """Reads a client file and everything that it names, and trains a few steps from a random adapter.

    Args:
        config: The coordinator's.
        client_file: The owner's ``client.yaml``.

    Raises:
        InputError: the file, its data or the backbone is wrong, or the method cannot be federated.
    """
    owner = load_owner(config, client_file)
    torch.set_num_threads(owner.threads)
    request = _first_request(owner)
    trained, seconds, seen = [], {}, {}
    for job in plan_jobs(owner.client, request, request.initial or {}, owner.config):
        _trained(owner, _short(job, 1))  # The first pass of all takes longer than those after it.
        begun = time.perf_counter()
        trained.append(_trained(owner, _short(job)))
        seconds[job.slot] = (time.perf_counter() - begun) / len(_short(job).steps) * len(job.steps)
    for job in plan_gradients(owner.client, request, request.initial or {}, owner.config):
        gradients(owner.model, [_short(job, 1)], owner.config.training, owner.plan)
        begun = time.perf_counter()
        (found,) = gradients(owner.model, [_short(job)], owner.config.training, owner.plan)
        seen[job.slot] = found.directions
        seconds[job.slot] += (time.perf_counter() - begun) / len(_short(job).steps) * len(job.steps)
    cuda = owner.backbone.device.type == "cuda"
    return ClientCheck(
        client=owner.client.id,
        tasks=tuple(_task(owner, name, trained, seconds) for name in owner.tasks),
        seconds=sum(seconds.values()),
        peak_memory_bytes=peak_rss_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        upload_bytes=len(encode_reply(reply_of(owner.client, trained, gradients=seen), owner.config.wire_dtype)),
        threads=owner.threads,
        device=owner.backbone.device.type,
    )


def _short(job: TrainJob, steps: int = TRIAL_STEPS) -> TrainJob:
    return replace(job, steps=job.steps[:steps])


def _first_request(owner: Owner) -> Request:
    """That of a first round, with an adapter as a server would draw it."""
    hidden = owner.backbone.hidden
    heads = head_shapes([local for own in owner.client.slots.values() for local in own], hidden)
    settings, shapes = owner.config.server_settings, owner.model.body_shapes
    initial = init_server(settings, shapes, dict(sorted(heads.items())), [owner.client.id]).initial
    asked = owner.config.gradient_batches > 0
    return Request(1, owner.client.id, {}, {}, initial, gradients=asked)


def _trained(owner: Owner, job: TrainJob) -> Trained:
    config = owner.config
    return train(owner.model, [job], config.training, config.lora.dropout, owner.plan)[0]


def _task(owner: Owner, name: str, trained: list[Trained], seconds: Mapping[int, float]) -> TaskCheck:
    task = owner.tasks[name]
    ((slot, local),) = [
        (slot, local) for slot, own in owner.client.slots.items() for local in own if local.task.name == name
    ]
    return TaskCheck(
        task=name,
        slot=slot,
        rows=len(task.train),
        validation_rows=len(task.validation),
        outputs=task.outputs,
        metric=task.metric,
        majority=majority_score(task),
        steps=local.steps,
        seconds=seconds[slot] * local.steps / sum(other.steps for other in owner.client.slots[slot]),
        loss=next(result.loss for result in trained if result.job.slot == slot),
    )
