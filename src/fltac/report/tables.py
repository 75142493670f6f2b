"""Tables for the terminal: the scores of one run, who holds how much of which task, and a data owner's tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MISSING = "-"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Task, metric, score, worst client and majority class of a run's summary or of an evaluation."""
    majority = summary.get("baselines", {}).get("majority", {})
    tasks: Mapping[str, Mapping[str, Any]] = summary.get("tasks") or {}
    table = Table("task", "metric")
    for heading in ("score", "worst client", "majority"):
        table.add_column(heading, justify="right")
    for name, task in tasks.items():
        numbers = (task["score"], task["worst_client"], majority.get(name))
        table.add_row(name, task["metric"], *map(_score, numbers))
    known = [majority[name] for name in tasks if majority.get(name) is not None]
    mean_majority = sum(known) / len(known) if known and len(known) == len(tasks) else None
    table.add_section()
    table.add_row("mean", "", _score(summary.get("mean_score")), "", _score(mean_majority))
    return table


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
