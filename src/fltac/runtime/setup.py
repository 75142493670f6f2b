"""From a configuration to everything that a run needs: tasks, backbone, partition, clients, the truth about them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fltac.builtin import builtin_folder
from fltac.client.client import Client, LocalTask, head_shapes, local_steps, local_task
from fltac.config import Config, to_yaml
from fltac.data.encoded import EncodedTask, Split, load_tasks
from fltac.data.partition import Partition, make_partition
from fltac.errors import InputError
from fltac.evaluation import Holding
from fltac.model.backbone import Backbone, Kind, load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.targets import find_targets, layer_shapes
from fltac.paths import BUILTIN, resolve
from fltac.records import SlotKey
from fltac.runtime.lane_setup import PRECISIONS, admit_to_prefix, available_cores, choose_precision, try_backbone
from fltac.server.cohort import draw_cohort


@dataclass(frozen=True)
class Experiment:
    """A run's parts.

    Attributes:
        config: The configuration.
        tasks: Encoded, by name.
        partition: Which training rows each client holds of each task.
        backbone: Frozen.
        modules: The adapted modules' paths and (in_features, out_features); empty for full fine-tuning.
        model: The backbone with its lanes.
        clients: By id; those without any rows are left out.
        holdings: The truth about every local task.
        head_shapes: Head key to (outputs, hidden).
    """

    config: Config
    tasks: Mapping[str, EncodedTask]
    partition: Partition
    backbone: Backbone
    modules: Mapping[str, tuple[int, int]]
    model: LaneModel
    clients: Mapping[str, Client]
    holdings: Sequence[Holding]
    head_shapes: Mapping[str, tuple[int, int]]

    @property
    def groups(self) -> dict[SlotKey, int]:
        """The true task of every slot as an opaque number."""
        numbers = {name: number for number, name in enumerate(self.tasks)}
        return {holding.key: numbers[holding.task] for holding in self.holdings}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the configuration, the backbone's weights and every task's encoded rows."""
        config = hashlib.sha256(to_yaml(self.config).encode()).hexdigest()
        out = {"config": config, "backbone": self.backbone.fingerprint}
        for name, task in self.tasks.items():
            out[f"{name}.train"] = task.train.fingerprint
            out[f"{name}.validation"] = task.validation.fingerprint
        return out


def backbone_folder(config: Config) -> str:
    """Where the backbone lies; a builtin one is made at first use."""
    name = config.backbone.name
    if name.startswith(BUILTIN):
        return str(builtin_folder(name))
    return resolve(name, "backbone.name")


def load_partition(config: Config) -> tuple[dict[str, EncodedTask], Partition]:
    """Loads and encodes the tasks, and splits their training rows over the clients.

    Raises:
        InputError: there are no tasks, or something is wrong with them.
    """
    if not config.tasks:
        raise InputError("tasks: there are none; only the coordinator of a federation can do without")
    tasks = load_tasks(config, backbone_folder(config))
    labels = {name: np.asarray(task.train.labels) for name, task in tasks.items()}
    refuse_skew_without_classes(config, {name: task.outputs for name, task in tasks.items()})
    lengths = {name: task.train.lengths for name, task in tasks.items()}
    return tasks, make_partition(config, labels, lengths)


def refuse_skew_without_classes(config: Config, outputs: Mapping[str, int]) -> None:
    """Raises InputError for a partition by classes of tasks that have none; ``outputs`` is by task."""
    partition = config.federation.partition
    for name, count in outputs.items():
        if not count and partition.client_skew == "labels":
            raise InputError(f"federation.partition.client_skew: got 'labels', but the task {name} has no classes")
        if not count and partition.rule == "label-skew":
            raise InputError(f"federation.partition.rule: got 'label-skew', but the task {name} has no classes")


def prepare(config: Config) -> Experiment:
    """Builds everything.

    Raises:
        InputError: anything in the configuration, the data or the backbone is wrong.
    """
    tasks, partition = load_partition(config)
    backbone, modules, model = build_model(config, tasks)
    clients, holdings = build_clients(config, partition, tasks)
    admit_to_prefix(model, _visits(config, clients, tasks), config.training.prefix_cache * 2**20)
    held = [local for client in clients.values() for locals_ in client.slots.values() for local in locals_]
    heads = head_shapes(held, backbone.hidden)
    return Experiment(
        config, tasks, partition, backbone, modules, model, clients, holdings, dict(sorted(heads.items()))
    )


def build_model(
    config: Config, tasks: Mapping[str, EncodedTask]
) -> tuple[Backbone, dict[str, tuple[int, int]], LaneModel]:
    """Loads the backbone for some tasks, as :func:`wrapped_backbone`, and tries it on them.

    Raises:
        InputError: the tasks are of several kinds, or the backbone cannot be used for them.
    """
    kinds = {task.kind for task in tasks.values()}
    if len(kinds) > 1:
        named = ", ".join(f"{task.name} ({task.kind})" for task in tasks.values())
        raise InputError(f"tasks: one backbone reads one kind, got {named}")
    kind = kinds.pop()
    if config.backbone.kind not in ("auto", kind):
        raise InputError(f"backbone.kind: got {config.backbone.kind!r}; allowed with {kind} tasks are auto, {kind}")
    if kind == "causal-lm" and config.training.loss != "plain":
        raise InputError(f"training.loss: got {config.training.loss!r}; allowed with causal-lm tasks is plain")
    backbone, modules, model = wrapped_backbone(config, kind)
    try_backbone(model, next(iter(tasks.values())), config)
    return backbone, modules, model


def wrapped_backbone(config: Config, kind: Kind) -> tuple[Backbone, dict[str, tuple[int, int]], LaneModel]:
    """Loads the backbone in float32 and wraps it.

    Returns:
        The backbone, the adapted modules with (in_features, out_features), and the backbone with its lanes.

    Raises:
        InputError: it cannot be loaded, or is of another kind.
    """
    if kind == "causal-lm" and config.server.clustering.profile_rows:
        raise InputError("server.clustering.profile_rows: causal-lm tasks have no profiles; allowed with them is 0")
    backbone = load_backbone(config.backbone, kind, backbone_folder(config))
    full = config.training.trainable == "all"
    paths = [] if full else find_targets(backbone.model, config.lora.targets, config.lora.layers)
    modules = layer_shapes(backbone.model, paths)
    precision = choose_precision(config.training, backbone.device)
    dtype = torch.float64 if precision == torch.float64 else torch.float32
    model = LaneModel(backbone, modules, config.lora.rank, config.lora.scaling, dtype)
    return backbone, modules, model


def resolved(experiment: Experiment) -> Experiment:
    """With the device, precision and threads that were chosen written into the configuration.

    So a run is continued with what it began with, or refused, whatever machine it is continued on.
    """
    config, backbone = experiment.config, experiment.backbone
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    training = config.training.model_copy(
        update={
            "precision": names[choose_precision(config.training, backbone.device)],
            "packing": experiment.model.packs,
            "threads": config.training.threads or available_cores(),
        }
    )
    device = config.backbone.model_copy(update={"device": backbone.device.type})
    return replace(experiment, config=config.model_copy(update={"training": training, "backbone": device}))


def _visits(config: Config, clients: Mapping[str, Client], tasks: Mapping[str, EncodedTask]) -> list[tuple[Split, int]]:
    """The splits that a run reads, each with the most rows that it reads of it."""
    out, rule = [], config.server.clustering
    # Beside batches, rows that profiles are of, and that candidates are scored on where none are held back.
    beside = rule.profile_rows + (0 if rule.held_back or not rule.scores else rule.assignment_rows * config.rounds)
    for name, task in tasks.items():
        batches = config.gradient_batches
        held = [
            min(len(local.rows), (local.steps * config.rounds + batches) * config.training.batch_size + beside)
            + len(local.held)
            for client in clients.values()
            for locals_ in client.slots.values()
            for local in locals_
            if local.task.name == name
        ]
        out += [(task.train, sum(held)), (task.validation, len(task.validation))]
    return out


def rounds_taken(config: Config, clients: Sequence[str]) -> dict[str, int]:
    """In how many of the federation's rounds each of the clients (sorted) is drawn into the cohort."""
    federation, seed = config.federation, config.server_settings.seed
    cohorts = [
        draw_cohort(clients, federation.participation, seed, number, federation.quorum)
        for number in range(1, federation.rounds + 1)
    ]
    return {client: sum(client in cohort for cohort in cohorts) for client in clients}


def build_clients(
    config: Config, partition: Partition, tasks: Mapping[str, EncodedTask]
) -> tuple[dict[str, Client], list[Holding]]:
    """Makes the participants and notes the truth about them.

    With ``federation.pool`` there is one for each task, which makes in one round the steps that the task's slots
    (``sum``), or one slot (``single``), would make over all rounds.
    """
    if config.pooled:
        return _pooled_clients(config, partition, tasks)
    shared = config.training.adapters == "shared"
    numbers = {name: number for number, name in enumerate(tasks)}
    clients, holdings = {}, []
    for client in partition.clients:
        slots: dict[int, tuple[LocalTask, ...]] = {}
        for index, name in enumerate(partition.client_tasks(client)):
            task, rows = tasks[name], partition.rows[client, name]
            told = shared and config.training.heads == "per-task"
            key = f"{task.outputs}-{numbers[name]}" if told and task.outputs else task.head_key
            slot = 0 if shared else index
            before = slots.get(slot, ())
            slots[slot] = (*before, local_task(task, rows, key, config, client, slot + len(before)))
            holdings.append(Holding(client, slot, name, key))
        if slots:
            clients[client] = Client(client, slots)
    for client in config.lora.ranks:
        if client not in partition.clients:
            raise InputError(f"lora.ranks.{client}: no client has this id; there are {', '.join(partition.clients)}")
    return clients, holdings


def _pooled_clients(
    config: Config, partition: Partition, tasks: Mapping[str, EncodedTask]
) -> tuple[dict[str, Client], list[Holding]]:
    clients: dict[str, Client] = {}
    holdings: list[Holding] = []
    rounds = rounds_taken(config, sorted({client for client, _ in partition.rows}))
    for name, task in tasks.items():
        parts = {client: rows for (client, held), rows in partition.rows.items() if held == name}
        if not parts:
            continue
        made = [local_steps(config.training, len(rows)) * rounds[client] for client, rows in parts.items()]
        steps = max(1, sum(made) if config.federation.pool == "sum" else max(made))
        rows = np.sort(np.concatenate(list(parts.values())))
        client, key = f"pool-{len(clients)}", task.head_key
        local = LocalTask(task, rows, key, steps)
        clients[client] = Client(client, {0: (local,)})
        holdings.append(Holding(client, 0, name, key))
    return clients, holdings
