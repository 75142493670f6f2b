"""A run from its configuration to its directory: ``run``, ``resume``, ``evaluate``, ``export``, ``partition_of``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fltac.client.schedule import LanePlan
from fltac.config import Config, evaluation_settings
from fltac.data.partition import Partition
from fltac.errors import InputError
from fltac.evaluation import Measured, ScoreKey, clustering_record
from fltac.records import RoundReport, ServerState
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.export import export_clusters
from fltac.runtime.judging import judge_key, with_answers, with_verdicts, written_before
from fltac.runtime.lane_setup import available_cores, choose_plan
from fltac.runtime.loop import Record, Watch, as_sent, federate
from fltac.runtime.meter import Meter
from fltac.runtime.progress import Progress, Silent
from fltac.runtime.run_directory import RunDirectory, create, open_existing, refuse_occupied
from fltac.runtime.session import keep_first, keeper, last_state, refuse_changed
from fltac.runtime.setup import Experiment, load_partition, prepare, resolved
from fltac.runtime.simulation import Simulation
from fltac.runtime.summary import baselines, judged, no_report, summarised, truncation_lines, untrained_record
from fltac.server.round import init_server


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: The run directory.
        summary: What ``summary.json`` holds.
    """

    directory: Path
    summary: Mapping[str, Any]


def run(
    config: Config, out: str | Path | None = None, progress: Progress | None = None, watch: Watch | None = None
) -> RunResult:
    """Runs an experiment in this process.

    Args:
        config: From ``load_config``.
        out: The run directory, which must be empty or missing; default: ``output.dir``, else ``runs/<method>``.
        progress: Told what happens; default: nobody.
        watch: Shown each round's replies; it does not change the run.

    Raises:
        InputError: the configuration, the data or the backbone is wrong, or the folder is not empty.
    """
    path = Path(out or config.output.dir or f"runs/{config.method}")
    refuse_occupied(path)
    experiment = resolved(prepare(config))
    directory = create(path, experiment.config, experiment.fingerprints, _gpu())
    directory.write_lanes(_lane_plan(experiment))
    state = _first_state(experiment)
    keep_first(directory, state)
    return _continue(experiment, directory, state, progress or Silent(), watch)


def resume(directory: str | Path, progress: Progress | None = None, watch: Watch | None = None) -> RunResult:
    """Continues a run after its last checkpoint; a finished run is returned as it is. Arguments as for :func:`run`.

    Raises:
        InputError: not a run directory, a damaged checkpoint, or the config, the data or the backbone have changed.
    """
    opened = open_existing(Path(directory))
    summary = opened.summary()
    if summary is not None:
        return RunResult(opened.path, summary)
    experiment = prepare(opened.config)
    refuse_changed(opened, experiment.fingerprints)
    if opened.lanes() is None:
        opened.write_lanes(_lane_plan(experiment))
    state = last_state(opened)
    if state is None:
        state = _first_state(experiment)
        keep_first(opened, state)
    return _continue(experiment, opened, state, progress or Silent(), watch)


def evaluate(directory: str | Path, progress: Progress | None = None, overrides: Sequence[str] = ()) -> Record:
    """Scores a run's newest checkpoint on all validation rows; writes ``evaluation.json`` beside it.

    With ``evaluation.generation`` the adapters of a language model also answer held-out prompts, and with
    ``evaluation.judge`` a judge scores the answers. Where all but the judge's verdicts is there already, they alone
    are asked for.

    Args:
        directory: Of the run.
        progress: Told what happens; default: nobody.
        overrides: ``evaluation.key=value`` strings, which change nothing that the run has stored.

    Raises:
        InputError: as for ``resume``, there is no checkpoint, or an override is wrong.
        RunError: the judge cannot be had; everything else, and the verdicts so far, are kept.
    """
    path, progress = Path(directory), progress or Silent()
    settings = evaluation_settings(open_existing(path).config, overrides)
    key = None if settings.judge is None else judge_key(settings.judge)
    record = written_before(path, settings) if settings.judge is not None else None
    if record is None:
        opened, experiment, state = _opened(path)
        torch.set_num_threads(opened.config.training.threads or available_cores())
        progress.message(f"evaluating round {state.round_number} of {opened.path}")
        scores = judged(experiment, state, no_report(experiment, state, opened.rounds()), None)
        record = {"round": state.round_number, **scores, "baselines": baselines(experiment)}
        opened.write_evaluation(record)
        if settings.generation is not None:
            record["generation"] = with_answers(opened, experiment, state, settings.generation, progress)
            opened.write_evaluation(record)
    if settings.judge is not None:
        opened = open_existing(path)
        record["judge"] = with_verdicts(opened, settings.judge, key, progress)
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
    return export_clusters(experiment, state, Path(out))


def partition_of(config: Config) -> Partition:
    """The partition that a run of this configuration would use."""
    return load_partition(config)[1]


def _first_state(experiment: Experiment) -> ServerState:
    config, shapes = experiment.config, experiment.model.body_shapes
    return as_sent(init_server(config.server_settings, shapes, experiment.head_shapes, experiment.clients), config)


def _opened(path: Path) -> tuple[RunDirectory, Experiment, ServerState]:
    opened = open_existing(path)
    if opened.federation() is not None:
        raise InputError(
            f"{path}: a federation's run; its adapters lie in adapters/, the nodes' scores in summary.json"
        )
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise InputError(f"{path}: has no checkpoint; `fltac resume {path}` starts the run")
    experiment = prepare(opened.config)
    refuse_changed(opened, experiment.fingerprints)
    return opened, experiment, checkpoint.state


def _continue(
    experiment: Experiment, directory: RunDirectory, state: ServerState, progress: Progress, watch: Watch | None
) -> RunResult:
    config, model = experiment.config, experiment.model
    torch.set_num_threads(config.training.threads or available_cores())
    plan = directory.lanes() or {}
    passes = LanePlan(**plan, packed=model.packs)
    total = sum(len(client.slots) for client in experiment.clients.values())
    meter = Meter(experiment, progress)

    known: dict[ScoreKey, Measured] = {}

    def judge(state: ServerState, report: RoundReport, last: bool) -> Record:
        every = config.evaluation.every
        if last:
            return judged(experiment, state, report, None, known)
        if every and report.round_number % every == 0:
            return judged(experiment, state, report, config.evaluation.max_rows, known)
        clustering = clustering_record(state, report, experiment.holdings)
        return {"tasks": None, "mean_score": None, "clustering": clustering}

    simulation = Simulation(experiment.clients, model, config, passes, meter.on_pass, state.initial)
    keep = keeper(directory, progress)
    groups = experiment.groups if config.server.clustering.rule == "given" else None
    for line in truncation_lines(experiment):
        progress.message(line)
    progress.start(config.rounds, total)
    try:
        state = federate(state, config.rounds, config, simulation, judge, keep, meter.on_round, groups, watch)
        records = directory.rounds()
        last = records[-1] if records else untrained_record(experiment, state)
        if config.output.adapters and config.training.trainable != "all":
            export_clusters(experiment, state, directory.path / "adapters")
        summary = summarised(experiment, state, records, last)
        directory.write_summary(summary)
    finally:
        progress.close()
        model.restore()
    return RunResult(directory.path, summary)


def _lane_plan(experiment: Experiment) -> dict[str, int]:
    """What is fixed for the whole run since it changes rounding."""
    training, task = experiment.config.training, next(iter(experiment.tasks.values()))
    plan = choose_plan(training, experiment.model, task, training.threads or available_cores())
    return {"lanes": plan.lanes, "tokens": plan.tokens, "workers": plan.workers}


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
