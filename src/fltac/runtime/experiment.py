"""A run from its configuration to its directory: ``run``, ``resume``, ``evaluate``, ``export``, ``partition_of``."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fltac.client.training import Trained
from fltac.config import Config
from fltac.data.encoded import majority_score
from fltac.data.partition import Partition
from fltac.errors import InputError
from fltac.evaluation import clustering_record, score_state
from fltac.model.lora import detach
from fltac.model.peft_format import CardFacts, export_adapter
from fltac.records import HEAD, Adapter, Cluster, Request, RoundReport, ServerState, head_keys
from fltac.runtime.checkpoint import latest_checkpoint, save_checkpoint
from fltac.runtime.loop import Record, federate
from fltac.runtime.progress import Progress, Silent
from fltac.runtime.run_directory import RunDirectory, create, open_existing, peak_rss_bytes, refuse_occupied
from fltac.runtime.setup import Experiment, choose_lanes, load_partition, prepare
from fltac.runtime.simulation import Simulation
from fltac.server.round import init_server
from fltac.wire.codec import decode_adapter, encode_adapter


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: The run directory.
        summary: What ``summary.json`` holds.
    """

    directory: Path
    summary: Mapping[str, Any]


def run(config: Config, out: str | Path | None = None, progress: Progress | None = None) -> RunResult:
    """Runs an experiment in this process.

    Args:
        config: From ``load_config``.
        out: The run directory, which must be empty or missing; default: ``output.dir``, else ``runs/<method>``.
        progress: Told what happens; default: nobody.

    Raises:
        InputError: the configuration, the data or the backbone is wrong, or the folder is not empty.
    """
    path = Path(out or config.output.dir or f"runs/{config.method}")
    refuse_occupied(path)
    experiment = prepare(config)
    directory = create(path, config, experiment.fingerprints, _gpu())
    directory.write_lanes({"lanes": choose_lanes(config.training), "threads": _threads(config)})
    state = _first_state(experiment)
    save_checkpoint(directory.path, state, {}, config.output.keep_checkpoints)
    return _continue(experiment, directory, state, progress or Silent())


def resume(directory: str | Path, progress: Progress | None = None) -> RunResult:
    """Continues a run after its last checkpoint; a finished run is returned as it is.

    Raises:
        InputError: not a run directory, a damaged checkpoint, or the data or the backbone have changed.
    """
    opened = open_existing(Path(directory))
    summary = opened.summary()
    if summary is not None:
        return RunResult(opened.path, summary)
    checkpoint = latest_checkpoint(opened.path)
    experiment = prepare(opened.config)
    _refuse_changed(opened, experiment)
    if opened.lanes() is None:
        opened.write_lanes({"lanes": choose_lanes(opened.config.training), "threads": _threads(opened.config)})
    if checkpoint is None:
        state = _first_state(experiment)
        save_checkpoint(opened.path, state, {}, opened.config.output.keep_checkpoints)
    else:
        state = checkpoint.state
    opened.cut_rounds(state.round_number)
    return _continue(experiment, opened, state, progress or Silent())


def evaluate(directory: str | Path, progress: Progress | None = None) -> Record:
    """Scores a run's newest checkpoint on all validation rows; writes ``evaluation.json`` beside it.

    Raises:
        InputError: as for ``resume``, or there is no checkpoint.
    """
    opened, experiment, state = _opened(Path(directory))
    _set_threads(opened)
    (progress or Silent()).message(f"evaluating round {state.round_number} of {opened.path}")
    record = {"round": state.round_number, **_judged(experiment, state, _no_report(state), None)}
    opened.write_evaluation(record)
    return record


def export(directory: str | Path, out: str | Path) -> list[Path]:
    """Writes every cluster's adapter of a run's newest checkpoint as a PEFT folder under ``out``.

    Raises:
        InputError: as for ``evaluate``, ``out`` is not empty, or the run trained the whole backbone.
    """
    refuse_occupied(Path(out))
    _, experiment, state = _opened(Path(directory))
    if experiment.config.training.trainable == "all":
        raise InputError(f"{directory}: training.trainable=all leaves no adapters to export")
    return _export(experiment, state, Path(out))


def partition_of(config: Config) -> Partition:
    """The partition that a run of this configuration would use."""
    return load_partition(config)[1]


def _first_state(experiment: Experiment) -> ServerState:
    settings = experiment.config.server_settings
    return init_server(settings, experiment.model.body_shapes, experiment.head_shapes, experiment.clients)


def _opened(path: Path) -> tuple[RunDirectory, Experiment, ServerState]:
    opened = open_existing(path)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise InputError(f"{path}: has no checkpoint; `fltac resume {path}` starts the run")
    experiment = prepare(opened.config)
    _refuse_changed(opened, experiment)
    return opened, experiment, checkpoint.state


def _continue(experiment: Experiment, directory: RunDirectory, state: ServerState, progress: Progress) -> RunResult:
    config, model = experiment.config, experiment.model
    plan = _set_threads(directory)
    total = sum(len(client.slots) for client in experiment.clients.values())
    done = {"slots": 0, "of": total}

    def on_trained(trained: Trained) -> None:
        done["slots"] += 1
        progress.slots_done(done["slots"], trained.loss, done["of"])

    def on_round(number: int, requests: Sequence[Request]) -> None:
        done["slots"] = 0
        done["of"] = sum(len(experiment.clients[request.client].slots) for request in requests)
        progress.round_started(number, len(requests))

    def judge(state: ServerState, report: RoundReport, last: bool) -> Record:
        every = config.evaluation.every
        if last:
            return _judged(experiment, state, report, None)
        if every and report.round_number % every == 0:
            return _judged(experiment, state, report, config.evaluation.max_rows)
        clustering = clustering_record(state, report, experiment.holdings)
        return {"tasks": None, "mean_score": None, "clustering": clustering}

    def keep(state: ServerState, record: Record) -> None:
        # The record first: a kill between the two leaves a line too many, which resume cuts.
        directory.append_round(record)
        save_checkpoint(directory.path, state, {}, config.output.keep_checkpoints)
        progress.round_finished(record)

    received = decode_adapter(encode_adapter(state.initial, config.wire.dtype))
    simulation = Simulation(experiment.clients, model, config, int(plan["lanes"]), received, on_trained)
    groups = experiment.groups if config.server.clustering.rule == "given" else None
    for line in _truncation(experiment):
        progress.message(line)
    progress.start(config.rounds, total)
    try:
        state = federate(state, config.rounds, config, simulation, judge, keep, on_round, groups)
        records = directory.rounds()
        last = records[-1] if records else _untrained_record(experiment, state)
        if config.output.adapters and config.training.trainable == "lora":
            _export(experiment, state, directory.path / "adapters")
        summary = _summary(experiment, records, last)
        directory.write_summary(summary)
    finally:
        progress.close()
        model.restore()
    return RunResult(directory.path, summary)


def _truncation(experiment: Experiment) -> list[str]:
    """One line for each split with rows that were cut."""
    return [
        f"{name}: {split.truncated} of {len(split)} {which} rows are cut at {int(split.lengths.max())} tokens"
        for name, task in experiment.tasks.items()
        for which, split in (("training", task.train), ("validation", task.validation))
        if split.truncated
    ]


def _judged(experiment: Experiment, state: ServerState, report: RoundReport, max_rows: int | None) -> Record:
    scores = score_state(experiment.model, state, experiment.holdings, experiment.tasks, experiment.config, max_rows)
    return {
        "tasks": {name: score.record() for name, score in scores.items()},
        "mean_score": sum(score.score for score in scores.values()) / len(scores),
        "clustering": clustering_record(state, report, experiment.holdings),
    }


def _no_report(state: ServerState) -> RoundReport:
    return RoundReport(state.round_number, (), 0, (), None, None)


def _untrained_record(experiment: Experiment, state: ServerState) -> Record:
    """The record of a run without rounds: everybody holds v0."""
    return {
        "round": 0,
        "clients": 0,
        "updates": 0,
        "rejected": 0,
        **_judged(experiment, state, _no_report(state), None),
        "bytes": {"up": 0, "down": 0},
        "loss": None,
    }


def _summary(experiment: Experiment, records: Sequence[Record], last: Record) -> dict[str, Any]:
    config = experiment.config
    return {
        "method": config.method,
        "rounds": config.rounds,
        "seed": config.federation.seed,
        **{key: value for key, value in last.items() if key != "seconds"},
        "bytes_total": {way: sum(record["bytes"][way] for record in records) for way in ("up", "down")},
        "seconds_total": {
            part: sum(record["seconds"][part] for record in records) for part in ("train", "server", "evaluate")
        },
        "slot_steps": _slot_steps(experiment),
        "trainable_parameters": _trainable_parameters(experiment),
        "baselines": {"majority": {name: majority_score(task) for name, task in experiment.tasks.items()}},
        "truncated_rows": {
            name: {"train": task.train.truncated, "validation": task.validation.truncated}
            for name, task in experiment.tasks.items()
        },
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _slot_steps(experiment: Experiment) -> int:
    """Optimizer steps of all local tasks in all rounds, with everybody taking part: the budget of a method."""
    steps = sum(
        local.steps for client in experiment.clients.values() for locals_ in client.slots.values() for local in locals_
    )
    return steps * experiment.config.rounds


def _trainable_parameters(experiment: Experiment) -> dict[str, int]:
    """Parameters of one slot's adapter, by the shapes of the heads it holds."""
    body = experiment.model.body_shapes.values()
    size = sum(int(torch.Size(shape).numel()) for shape in body)
    out = {}
    for client in experiment.clients.values():
        for locals_ in client.slots.values():
            keys = {local.head_key: experiment.head_shapes[local.head_key] for local in locals_}
            label = "+".join(f"{outputs}x{hidden}" for outputs, hidden in sorted(keys.values()))
            out[label] = size + sum(outputs * hidden + outputs for outputs, hidden in keys.values())
    return dict(sorted(out.items()))


def _export(experiment: Experiment, state: ServerState, out: Path) -> list[Path]:
    """One folder for each cluster; one for each head where a cluster's adapter has several.

    The backbone in memory may be rounded to bfloat16 and carries lanes, so both are undone first; the run is over.
    """
    model, config = experiment.model, experiment.config
    detach(experiment.backbone.model, model.layers)
    try:
        folders = []
        for cluster in state.clusters or (Cluster(0, state.initial, ()),):
            keys = head_keys(cluster.adapter)
            for key in keys:
                name = f"cluster-{cluster.id}" + (f"-head-{key}" if len(keys) > 1 else "")
                card = CardFacts(
                    method=config.method, rounds=state.round_number, members=len(cluster.members), cluster=cluster.id
                )
                adapter = _with_one_head(cluster.adapter, key)
                backbone, targets = experiment.backbone, list(experiment.modules)
                export_adapter(out / name, adapter, key, backbone, config.lora, targets, card)
                folders.append(out / name)
        return folders
    finally:
        for path, layer in model.layers.items():
            parent, _, name = path.rpartition(".")
            setattr(experiment.backbone.model.get_submodule(parent), name, layer)


def _with_one_head(adapter: Adapter, key: str) -> Adapter:
    other = [name for name in adapter if name.startswith(HEAD) and not name.startswith(f"{HEAD}{key}.")]
    return {name: tensor for name, tensor in adapter.items() if name not in other}


def _refuse_changed(opened: RunDirectory, experiment: Experiment) -> None:
    """Raises InputError where the data or the backbone are not those that the run started with."""
    stored = (opened.manifest() or {}).get("fingerprints", {})
    for name, value in experiment.fingerprints.items():
        if name in stored and stored[name] != value:
            raise InputError(
                f"{opened.path}: {name} has changed since this run started "
                f"(fingerprint {stored[name][:12]}, now {value[:12]}); start a new run"
            )


def _threads(config: Config) -> int:
    return config.training.threads or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def _set_threads(directory: RunDirectory) -> Mapping[str, Any]:
    plan = directory.lanes() or {}
    torch.set_num_threads(int(plan.get("threads", _threads(directory.config))))
    return plan


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
