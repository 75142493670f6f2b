"""A federation's run at its coordinator: from its config to a run directory, over whatever carries the messages.

It is the simulation's loop, server, records and checkpoints. Of the tasks it knows what the data owners' nodes say:
numbered slots. Where its config names tasks of its own, with public rows, the clusters are scored on these too.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fltac.config import Config
from fltac.config.metrics import HIGHEST_LOSS
from fltac.data.encoded import encoder_fingerprint, load_tasks
from fltac.data.partition import Partition
from fltac.model.backbone import Kind
from fltac.records import RoundReport, ServerState
from fltac.runtime.experiment import RunResult
from fltac.runtime.export import export_clusters
from fltac.runtime.federation import Federation
from fltac.runtime.lane_setup import available_cores
from fltac.runtime.loop import Record, as_sent, federate
from fltac.runtime.owner import refuse_not_federated
from fltac.runtime.post import Post
from fltac.runtime.progress import Progress
from fltac.runtime.public_scores import public_scores, slot_scores
from fltac.runtime.roll import Reference
from fltac.runtime.run_directory import CONFIG, RunDirectory, create, open_existing
from fltac.runtime.session import keep_first, keeper, last_state, only_one, refuse_changed
from fltac.runtime.setup import Experiment, backbone_folder, build_model, wrapped_backbone
from fltac.runtime.summary import summarised
from fltac.server.round import init_server, plan_delivery


def coordinate(
    config: Config, path: Path, post: Post, progress: Progress, again: Mapping[str, object] | None = None
) -> RunResult:
    """Runs a federation, or goes on with the one that ``path`` holds.

    Args:
        config: The coordinator's; its tasks, if any, have public rows and belong to nobody.
        path: The run directory: empty, missing, or of a run with this config.
        post: What carries the messages.
        progress: Told what happens.
        again: How the run is started again, kept in the run directory.

    Raises:
        InputError: the config or the backbone is wrong, the folder holds something else, or another process works
            on this run.
    """
    refuse_not_federated(config)
    old = (path / CONFIG).is_file()
    directory = open_existing(path, config) if old else None
    finished = None if directory is None else directory.summary()
    if finished is not None:
        progress.message(f"{path} is finished")
        return RunResult(path, finished)
    experiment, tokenizer = open_coordinator(config)
    fingerprints = {**experiment.fingerprints, "tokenizer": tokenizer}
    if directory is None:
        directory = create(path, config, fingerprints, None)
    with only_one(path):
        refuse_changed(directory, fingerprints)
        directory.write_federation(again or {})
        reference = Reference(
            backbone=experiment.backbone.fingerprint,
            tokenizer=tokenizer,
            body_shapes=experiment.model.body_shapes,
            hidden=experiment.backbone.hidden,
            highest_score=HIGHEST_LOSS if metric_of(experiment) == "loss" else 1.0,
        )
        federation = Federation(post, config, reference, progress.message)
        state = last_state(directory)
        if state is None:
            state = _first_state(experiment, federation, progress)
            keep_first(directory, state)
        elif state.round_number:
            progress.message(f"{path}: goes on after round {state.round_number}")
        return _run(experiment, directory, federation, state, progress)


def open_coordinator(config: Config) -> tuple[Experiment, str]:
    """The run's parts as far as the coordinator has them, and the fingerprint of its tokenizer or image settings.

    Raises:
        InputError: the config, a public task or the backbone is wrong.
    """
    folder = backbone_folder(config)
    tasks = load_tasks(config, folder) if config.tasks else {}
    if tasks:
        backbone, modules, model = build_model(config, tasks)
        tokenizer = next(iter(tasks.values())).encoder
    else:
        backbone, modules, model = wrapped_backbone(config, kind_of(config))
        tokenizer = encoder_fingerprint(config.backbone, folder, backbone.kind)
    nobody = Partition((), tuple(tasks), {}, {})
    return Experiment(config, tasks, nobody, backbone, modules, model, {}, [], {}), tokenizer


def kind_of(config: Config) -> Kind:
    """What the backbone is used for: ``backbone.kind``, else what its own configuration says that it reads.

    A folder that cannot be read is left to its loader.
    """
    if config.backbone.kind != "auto":
        return config.backbone.kind
    options = {"revision": config.backbone.revision} if config.backbone.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(backbone_folder(config), **options)
    except (OSError, ValueError, KeyError):
        return "text"
    return "image" if hasattr(architecture, "image_size") else "text"


def _first_state(experiment: Experiment, federation: Federation, progress: Progress) -> ServerState:
    """v0 for those who are there when the run begins; heads that only later clients bring are drawn when they come."""
    present = federation.present()
    there = sorted(item.client for item in present)
    for client in sorted(set(experiment.config.lora.ranks) - set(there)):  # It may come later, or be misspelt.
        progress.message(f"lora.ranks.{client}: no client of this id is there; there are {', '.join(there)}")
    heads = {key: shape for item in present for own in item.heads.values() for key, shape in own.items()}
    settings, shapes = experiment.config.server_settings, experiment.model.body_shapes
    state = init_server(settings, shapes, dict(sorted(heads.items())), [item.client for item in present])
    return as_sent(state, experiment.config)


def _run(
    experiment: Experiment, directory: RunDirectory, federation: Federation, state: ServerState, progress: Progress
) -> RunResult:
    config = experiment.config
    torch.set_num_threads(config.training.threads or available_cores())
    nobody: Record = {"tasks": None, "mean_score": None}

    def judge(state: ServerState, report: RoundReport, last: bool) -> Record:
        every = config.evaluation.every
        clustering = None
        if report.k is not None:
            own = report.evidence()
            clustering = {"k": report.k, "ari": None, "accuracy": None, "silhouette": report.silhouette, **own}
        if not last and not (every and report.round_number % every == 0):
            return {**nobody, "clustering": clustering}
        if not last:  # After the last round the loop has had everything delivered.
            federation.deliver(plan_delivery(state, config.server_settings, federation.there))
        on_nodes = slot_scores(federation.scores, metric_of(experiment))
        on_public = public_scores(experiment, state, None if last else config.evaluation.max_rows)
        scores = [task["score"] for task in on_public.values()]
        mean = sum(scores) / len(scores) if scores else on_nodes["mean"]
        return {"tasks": on_public, "mean_score": mean, "slots": on_nodes, "clustering": clustering}

    progress.start(config.rounds, 0)
    try:
        state = federate(
            state,
            config.rounds,
            config,
            federation,
            judge,
            keeper(directory, progress),
            lambda number, requests: progress.round_started(number, len(requests)),
        )
        records = directory.rounds()
        last = records[-1] if records else {"round": 0, **nobody, "clustering": None}
        if config.output.adapters:
            export_clusters(experiment, state, directory.path / "adapters")
        summary = {
            **summarised(experiment, state, records, last),
            "slot_steps": None,
            "trainable_parameters": _trainable_parameters(experiment, state),
        }
        directory.write_summary(summary)
    finally:
        progress.close()
    return RunResult(directory.path, summary)


def metric_of(experiment: Experiment) -> str:
    """What stands for the nodes' metrics, which only they know: the loss of language models, else an accuracy."""
    return "loss" if experiment.backbone.kind == "causal-lm" else "accuracy"


def _trainable_parameters(experiment: Experiment, state: ServerState) -> Mapping[str, int]:
    """Parameters of one slot's adapter, by the shape of its head."""
    body = sum(prod(shape) for shape in experiment.model.body_shapes.values())
    out: dict[str, Any] = {}
    for name, tensor in state.initial.items():
        if name.startswith("head.") and name.endswith(".weight"):
            outputs, hidden = tensor.shape
            out[f"{outputs}x{hidden}"] = body + outputs * hidden + outputs
    return out or {"none": body}
