"""What a run says of its scores: the evaluator's part of a round's record, and ``summary.json``."""

from collections.abc import Sequence
from math import prod
from typing import Any

from fltac.data.encoded import Split, majority_score
from fltac.evaluation import Measured, ScoreKey, clustering_record, score_state
from fltac.records import RoundReport, ServerState
from fltac.runtime.export import folders_of_tasks
from fltac.runtime.loop import Record
from fltac.runtime.run_directory import peak_rss_bytes
from fltac.runtime.setup import Experiment, rounds_taken


def judged(
    experiment: Experiment,
    state: ServerState,
    report: RoundReport,
    max_rows: int | None,
    known: dict[ScoreKey, Measured] | None = None,
) -> Record:
    """Scores a state on so many validation rows of each task, and compares its clusters with the true tasks."""
    scores = score_state(
        experiment.model, state, experiment.holdings, experiment.tasks, experiment.config, max_rows, known
    )
    return {
        "tasks": {name: score.record() for name, score in scores.items()},
        "mean_score": sum(score.score for score in scores.values()) / len(scores),
        "clustering": clustering_record(state, report, experiment.holdings),
    }


def no_report(experiment: Experiment, state: ServerState, records: Sequence[Record] = ()) -> RoundReport:
    """Stands in where a state is scored apart from its round.

    Args:
        experiment: The run's parts.
        state: What is scored.
        records: Of the run's rounds; that of the state's own says whether slots were grouped, which one cluster that
            holds all does not.
    """
    own = next((record for record in records if record["round"] == state.round_number), None)
    grouped = own["clustering"] if own else experiment.config.server_settings.clustering.rule not in ("single", "none")
    k = sum(bool(cluster.members) for cluster in state.clusters) if grouped else None
    return RoundReport(state.round_number, (), 0, (), k, None)


def untrained_record(experiment: Experiment, state: ServerState) -> Record:
    """The record of a run without rounds: everybody holds v0."""
    return {
        "round": 0,
        "clients": 0,
        "updates": 0,
        "rejected": 0,
        **judged(experiment, state, no_report(experiment, state), None),
        "bytes": {"up": 0, "down": 0},
        "loss": None,
    }


def summarised(experiment: Experiment, state: ServerState, records: Sequence[Record], last: Record) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
        experiment: The run's parts.
        state: The server after the last round.
        records: Of all rounds.
        last: The last round's, or :func:`untrained_record`.
    """
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
        "adapters": folders_of_tasks(experiment, state) if config.training.trainable != "all" else None,
        "slot_steps": _slot_steps(experiment),
        "trainable_parameters": _trainable_parameters(experiment),
        "baselines": baselines(experiment),
        "truncated_rows": {
            name: {"train": task.train.truncated, "validation": task.validation.truncated}
            for name, task in experiment.tasks.items()
        },
        **row_counts(experiment),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def baselines(experiment: Experiment) -> dict[str, dict[str, float]]:
    """The majority class's score on each task that has classes."""
    found = {name: majority_score(task) for name, task in experiment.tasks.items()}
    return {"majority": {name: score for name, score in found.items() if score is not None}}


def row_counts(experiment: Experiment) -> dict[str, Any]:
    """For tasks of which rows are left out: how many are used, cut and left out, and why."""
    counts = {
        name: {
            which: {"used": len(split), **split.counts}
            for which, split in (("train", task.train), ("validation", task.validation))
        }
        for name, task in experiment.tasks.items()
        if task.kind == "causal-lm"
    }
    return {"row_counts": counts} if counts else {}


def _slot_steps(experiment: Experiment) -> int:
    """Steps of all local tasks in the rounds that their clients are drawn for, and the batches of their gradients.

    That is the budget of a method, whatever got lost on the way.
    """
    config = experiment.config
    if config.rounds == 0:
        return 0
    rounds = rounds_taken(config, sorted(experiment.clients))
    beside = config.gradient_batches
    made = {client: 1 if config.pooled else number for client, number in rounds.items() if number}
    return sum(
        local.steps * made[client.id] + beside
        for client in experiment.clients.values()
        if client.id in made
        for locals_ in client.slots.values()
        for local in locals_
    )


def _trainable_parameters(experiment: Experiment) -> dict[str, int]:
    """Parameters of one slot's adapter, by the shapes of the heads it holds, and by rank where a client has fewer.

    Factors that are never trained do not count.
    """
    lora = experiment.config.lora
    aggregation = experiment.config.server.aggregation
    never = aggregation.frozen(1) if aggregation.frozen(1) == aggregation.frozen(2) else None
    body = experiment.model.body_shapes.items()
    size = sum(prod(shape) for name, shape in body if never is None or not name.endswith(never))
    out = {}
    for client in experiment.clients.values():
        for locals_ in client.slots.values():
            keys = {local.head_key: experiment.head_shapes[local.head_key] for local in locals_ if local.head_key}
            label = "+".join(f"{outputs}x{hidden}" for outputs, hidden in sorted(keys.values())) or "none"
            rank = lora.rank_of(client.id)
            label += "" if rank == lora.rank else f" rank {rank}"
            out[label] = size * rank // lora.rank + sum(outputs * hidden + outputs for outputs, hidden in keys.values())
    return dict(sorted(out.items()))


def truncation_lines(experiment: Experiment) -> list[str]:
    """One line for each split with rows that were cut or left out."""
    return [
        f"{name}: {len(split)} {which} rows are used; {_cut(split)}"
        if split.counts
        else f"{name}: {split.truncated} of {len(split)} {which} rows are cut at {int(split.lengths.max())} tokens"
        for name, task in experiment.tasks.items()
        for which, split in (("training", task.train), ("validation", task.validation))
        if split.truncated or split.counts
    ]


REASONS = {
    "dropped_empty": "without a response are left out",
    "dropped_long": "with a response that does not fit are left out",
    "prompt_cut": "are used with a prompt that is cut",
    "response_cut": "are used with a response that is cut",
}


def _cut(split: Split) -> str:
    return ", ".join(f"{split.counts[key]} {reason}" for key, reason in REASONS.items() if key in split.counts)
