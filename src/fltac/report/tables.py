"""Tables for the terminal: the scores of one run, who holds how much of which task, and a data owner's tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MISSING = "-"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Task, metric, score, worst client and majority class of a run's summary or of an evaluation.

    Where an evaluation has scored a language model's answers: these scores as well.
    """
    majority = summary.get("baselines", {}).get("majority", {})
    tasks: Mapping[str, Mapping[str, Any]] = summary.get("tasks") or {}
    answers = _answer_scores(summary)
    table = Table("task", "metric")
    for heading in ("score", "worst client", "majority", *answers):
        table.add_column(heading, justify="right")
    for name, task in tasks.items():
        numbers = (task["score"], task["worst_client"], majority.get(name), *(of.get(name) for of in answers.values()))
        table.add_row(name, task["metric"], *map(_score, numbers))
    known = [majority[name] for name in tasks if majority.get(name) is not None]
    mean_majority = sum(known) / len(known) if known and len(known) == len(tasks) else None
    table.add_section()
    means = [sum(of.values()) / len(of) for of in answers.values()]
    table.add_row("mean", "", _score(summary.get("mean_score")), "", _score(mean_majority), *map(_score, means))
    return table


def _answer_scores(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """By heading, what an evaluation says of the answers to each task's prompts; empty where nothing was written."""
    written: Mapping[str, Mapping[str, float]] = (summary.get("generation") or {}).get("tasks") or {}
    if not written:
        return {}
    columns: dict[str, Mapping[str, float]] = {
        heading: {name: task[key] for name, task in written.items()}
        for heading, key in (("ROUGE-L", "rouge_l"), ("token F1", "token_f1"))
    }
    judged = (summary.get("judge") or {}).get("tasks")
    return {**columns, "judge": judged} if judged else columns


def partition_table(counts: Mapping[str, Mapping[str, int]], tasks: Sequence[str]) -> Table:
    """Clients by tasks: the training rows each client holds, and the sums."""
    table = Table("client")
    for heading in (*tasks, "rows"):
        table.add_column(heading, justify="right")
    for client, row in counts.items():
        cells = [str(row[task]) if row.get(task) else MISSING for task in tasks]
        table.add_row(client, *cells, str(sum(row.values())))
    sums = [sum(row.get(task, 0) for row in counts.values()) for task in tasks]
    table.add_section()
    table.add_row("all", *map(str, sums), str(sum(sums)))
    return table


def client_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """A data owner's tasks: slot, training and validation rows, outputs, and what a round should take."""
    table = Table("task", "slot")
    for heading in ("rows", "outputs", "majority", "steps", "seconds"):
        table.add_column(heading, justify="right")
    for task in tasks:
        rows = f"{task['rows']} + {task['validation_rows']}"
        numbers = (str(task["outputs"]), _score(task["majority"]), str(task["steps"]), f"{task['seconds']:.2f}")
        table.add_row(task["task"], str(task["slot"]), rows, *numbers)
    return table


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
