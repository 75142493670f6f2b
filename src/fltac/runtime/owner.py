"""A data owner's tasks in memory: its client file, its rows, the backbone, and what they come to as a client."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fltac.client.client import Client, LocalTask, local_task
from fltac.client.schedule import LanePlan
from fltac.config import Config
from fltac.config.client_file import ClientFile, load_client_file
from fltac.data.encoded import EncodedTask, load_tasks
from fltac.errors import InputError
from fltac.model.backbone import Backbone
from fltac.model.lanes import LaneModel
from fltac.runtime.lane_setup import admit_to_prefix, available_cores, choose_plan
from fltac.runtime.setup import backbone_folder, build_model


@dataclass(frozen=True)
class Owner:
    """What is loaded from a client file for a coordinator's config.

    Attributes:
        config: The coordinator's, with this client's tasks and its place of the backbone.
        file: The client file.
        stamp: Of the client file and the data when they were read.
        tasks: Encoded, by name, by ascending slot number.
        client: Slots with their rows: all rows of each task's training split.
        backbone: Frozen.
        model: The backbone with its lanes.
        plan: How large a pass may be; its adapters are all this client's.
        threads: CPU threads to compute with.
    """

    config: Config
    file: ClientFile
    stamp: str
    tasks: Mapping[str, EncodedTask]
    client: Client
    backbone: Backbone
    model: LaneModel
    plan: LanePlan
    threads: int


def refuse_not_federated(config: Config) -> None:
    """Raises InputError for methods that need all rows, or their tasks' names, in one place."""
    if config.pooled:
        raise InputError(f"federation.pool: got {config.federation.pool!r}; in a federation only none is allowed")
    if config.training.adapters == "shared" and config.training.heads == "per-task":
        raise InputError("training.heads: got 'per-task'; in a federation, where slots are anonymous, only per-shape")
    if config.server.clustering.rule == "given":
        raise InputError("server.clustering.rule: got 'given' (oracle); in a federation nobody knows the true tasks")


def load_owner(config: Config, client_file: Path) -> Owner:
    """Reads a client file, encodes its rows and loads the backbone.

    Args:
        config: The coordinator's; its own tasks and its ``data_root`` do not matter here.
        client_file: The owner's file.

    Raises:
        InputError: the file, its data or the backbone is wrong, the config's method cannot be federated, or it asks
            for more steps than the owner allows.
    """
    refuse_not_federated(config)
    # The stamp first: what changes after it is noticed at the next question.
    stamp = load_client_file(client_file).stamp()
    file = load_client_file(client_file)
    own = _limited(file.applied(config), file.limits.steps)
    tasks = load_tasks(own, backbone_folder(own))
    backbone, _, model = build_model(own, tasks)
    splits = [(split, len(split)) for task in tasks.values() for split in (task.train, task.validation)]
    admit_to_prefix(model, splits, own.training.prefix_cache * 2**20)
    threads = file.limits.threads or own.training.threads or available_cores()
    return Owner(
        config=own,
        file=file,
        stamp=stamp,
        tasks=tasks,
        client=_client(own, file, tasks),
        backbone=backbone,
        model=model,
        plan=choose_plan(own.training, model, next(iter(tasks.values())), threads),
        threads=threads,
    )


def _limited(config: Config, steps: int | None) -> Config:
    """With no more batches of gradients than an owner gives steps: fewer say less, but are as good a reply."""
    clustering = config.server.clustering
    if steps is None or clustering.gradient_batches <= steps:
        return config
    fewer = clustering.model_copy(update={"gradient_batches": steps})
    return config.model_copy(update={"server": config.server.model_copy(update={"clustering": fewer})})


def _client(config: Config, file: ClientFile, tasks: Mapping[str, EncodedTask]) -> Client:
    """All tasks in one slot where adapters are shared, as in a simulation; else each in its own."""
    shared = config.training.adapters == "shared"
    slots: dict[int, tuple[LocalTask, ...]] = {}
    for name, task in tasks.items():
        slot = 0 if shared else file.slots[name]
        before, most = slots.get(slot, ()), file.limits.steps
        rows = np.arange(len(task.train))
        local = local_task(task, rows, task.head_key, config, file.id, slot + len(before))
        if most is not None and local.steps > most:
            raise InputError(f"training: {local.steps} steps of the task {name} in a round; limits.steps allows {most}")
        slots[slot] = (*before, local)
    return Client(file.id, slots)
