"""A simulation's partition as files: what each data owner of a federation with the same rows would hold."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from numpy.typing import NDArray

from fltac.config import Config, FederationConfig, to_yaml
from fltac.config.clustering import COUNTING
from fltac.data.encoded import load_tasks
from fltac.data.image import image_files
from fltac.data.loading import RawSplit, RawTask, load_rows
from fltac.data.partition import Partition, make_partition
from fltac.data.tasks import Kind, resolve_task
from fltac.errors import InputError
from fltac.records import CLIENT_ID
from fltac.runtime.atomic import TEMPORARY, sync_folder, write_new
from fltac.runtime.owner import refuse_not_federated
from fltac.runtime.run_directory import refuse_occupied
from fltac.runtime.setup import backbone_folder, refuse_skew_without_classes

COORDINATOR = "coordinator.yaml"
CLIENT = "client.yaml"
ROWS_PER_GROUP = 4096


def write_partition(config: Config, out: Path) -> list[Path]:
    """Writes a folder for each client that holds rows, and ``coordinator.yaml``; all of it or nothing.

    A client's rows of a task lie in the order of the task's training split, beside all of the task's validation
    rows. A class number means the same at every client, whatever classes it holds.

    Args:
        config: Of a run.
        out: Empty or missing.

    Returns:
        The clients' folders.

    Raises:
        InputError: the config or its data is wrong, a client's id cannot be a folder's name, or ``out`` is not empty
            or cannot be written.
    """
    refuse_occupied(out)
    refuse_not_federated(config)
    tasks = {
        name: load_rows(resolve_task(name, task, config.data_root), config.federation.seed)
        for name, task in config.tasks.items()
    }
    refuse_skew_without_classes(config, {name: task.outputs for name, task in tasks.items()})
    used = _used_rows(config, tasks)
    partition = make_partition(config, {name: task.train.labels[used[name]] for name, task in tasks.items()})
    for client in partition.clients:
        if not CLIENT_ID.fullmatch(client):
            raise InputError(
                f"federation.partition.table: client {client!r}; in a federation an id is up to 64 letters, digits, "
                "dots, hyphens and underscores, a letter or digit first"
            )
    holders = [client for client in partition.clients if partition.client_tasks(client)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=out.parent))
        try:
            draft.chmod(0o755)
            for client in holders:
                _write_client(draft / client, client, partition, tasks, used, config.server.clustering.profile_rows > 0)
            kinds = {task.task.kind for task in tasks.values()}
            write_new(draft / COORDINATOR, to_yaml(coordinator_config(config, kinds)).encode())
            sync_folder(draft)
            draft.replace(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    return [out / client for client in holders]


def _used_rows(config: Config, tasks: Mapping[str, RawTask]) -> dict[str, NDArray[np.int64]]:
    """Which training rows a simulation splits: all but those of causal-lm tasks that are left out when encoded."""
    used = {name: np.arange(len(task.train.labels)) for name, task in tasks.items()}
    if any(task.task.kind == "causal-lm" for task in tasks.values()):
        for name, task in load_tasks(config, backbone_folder(config)).items():
            used[name] = used[name] if task.train.raw_rows is None else task.train.raw_rows
    return used


def coordinator_config(config: Config, kinds: Iterable[Kind] = ()) -> Config:
    """The config without what only the data owners may know: the tasks, where they lie and who holds them.

    That they are ``causal-lm`` tasks is said: the same backbone may be an encoder to others.
    """
    federation = config.federation.model_copy(update={"partition": FederationConfig().partition})
    given = config.server.clustering.k if config.server.clustering.rule in COUNTING else config.clusters or "auto"
    clustering = config.server.clustering.model_copy(update={"k": given})
    server = config.server.model_copy(update={"clustering": clustering})
    backbone = config.backbone.model_copy(update={"kind": "causal-lm"}) if "causal-lm" in kinds else config.backbone
    update: dict[str, Any] = {
        "tasks": {},
        "data_root": None,
        "backbone": backbone,
        "federation": federation,
        "server": server,
    }
    return config.model_copy(update=update)


def _write_client(
    folder: Path,
    client: str,
    partition: Partition,
    tasks: Mapping[str, RawTask],
    used: Mapping[str, NDArray[np.int64]],
    profile: bool,
) -> None:
    folder.mkdir()
    own: dict[str, dict[str, Any]] = {}
    for slot, name in enumerate(partition.client_tasks(client)):
        task = tasks[name]
        rows = used[name][partition.rows[client, name]]
        train, validation = f"slot-{slot}-train.parquet", f"slot-{slot}-validation.parquet"
        _write_rows(folder / train, task, task.train, rows)
        _write_rows(folder / validation, task, task.validation, np.arange(len(task.validation.labels)))
        setting = task.task
        own[name] = {
            "slot": slot,
            "kind": setting.kind,
            "path": train,
            "validation_path": validation,
            "columns": list(setting.columns),
            "metric": setting.metric,
        }
        if setting.kind == "causal-lm":
            own[name] |= asdict(setting.prompting)
        else:
            own[name]["label"] = setting.label
            if not setting.regression:
                own[name]["labels"] = class_names(task)
            if not setting.mirror:
                own[name]["mirror"] = False
    tree: dict[str, Any] = {"client": client, "tasks": own}
    if profile:
        tree["limits"] = {"profile": True}
    write_new(folder / CLIENT, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
    sync_folder(folder)


def class_names(task: RawTask) -> list[str]:
    """The classes in the order of their numbers; those without names are called by their number."""
    return list(task.label_names or map(str, range(task.outputs)))


def _write_rows(file: Path, task: RawTask, split: RawSplit, rows: NDArray[np.int64]) -> None:
    """Some rows of a split: its texts or image files, and its labels as names (numbers for a regression)."""
    setting = task.task
    if setting.kind == "image":
        values = {setting.columns[0]: pa.array(_chosen(split, rows), pa.binary())}
    else:
        chosen = split.data.select(rows).with_format("arrow")[:]
        values = {name: chosen.column(name) for name in setting.columns}
    if task.outputs == 0:
        pyarrow.parquet.write_table(pa.table(values), file, row_group_size=ROWS_PER_GROUP)
        return
    labels = split.labels[rows]
    names = [] if setting.regression else class_names(task)
    stored = pa.array(labels) if setting.regression else pa.array([names[number] for number in labels.tolist()])
    table = pa.table({**values, setting.label: stored})
    pyarrow.parquet.write_table(table, file, row_group_size=ROWS_PER_GROUP)


def _chosen(split: RawSplit, rows: NDArray[np.int64]) -> list[bytes]:
    wanted = set(rows.tolist())
    return [data for row, data in enumerate(image_files(split)) if row in wanted]
