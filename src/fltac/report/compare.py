"""One table for several runs: scores by task beside the majority class, clustering, traffic."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Final

from fltac.config.metrics import higher_is_better
from fltac.report.results import Result, SeedResult, load_results

__all__ = ["comparison_json", "comparison_table", "load_results"]

NOT_FEDERATED: Final = frozenset({"zero", "local", "central-single", "central", "central-full"})
TOLD_TASKS: Final = frozenset({"oracle", "fedit-heads"})
"""Federated methods that are told which task an adapter or a head belongs to."""
MISSING: Final = "-"
CAPTION: Final = (
    "Scores are means over the clients that hold the task, of the adapter each one received. "
    "Bold: the best federated score of the column among the methods that are not told the tasks. "
    "±: standard deviation over seeds. "
    "MB: 10^6 bytes of all clients and rounds."
)

LOWER: Final = " Losses: lower is better."


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean and, with at least two of them, the sample standard deviation."""

    mean: float
    deviation: float | None

    def text(self, digits: int = 3) -> str:
        """``0.874``, or ``0.874 ± 0.010``."""
        shown = f"{self.mean:.{digits}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{digits}f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """None where a value is missing, or there is none."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    return Spread(mean(numbers), stdev(numbers) if len(numbers) > 1 else None)


def comparison_table(results: Sequence[Result]) -> str:
    """A Markdown table with a row for the majority class and one for each result, and a caption below."""
    tasks = tasks_of(results)
    labels = [label_of(result) for result in results]
    scores = [[*(score_of(result, task) for task in tasks), _mean_score(result)] for result in results]
    metrics = [*(metrics_of(results, [task]) for task in tasks), metrics_of(results, tasks)]
    bold = [_bold(results, [row[column] for row in scores], metrics[column]) for column in range(len(tasks) + 1)]
    lower = higher_is_better(metrics[-1]) is False
    rows = [["method", *(_heading(results, task) for task in tasks), "mean", *HEADINGS]]
    majority = majority_of(results)
    if majority:
        shown = [f"{majority[task]:.3f}" if task in majority else MISSING for task in tasks]
        whole = f"{mean(majority[task] for task in tasks):.3f}" if set(tasks) <= set(majority) else MISSING
        rows.append(["majority", *shown, whole, *(MISSING for _ in HEADINGS)])
    for index, (result, label) in enumerate(zip(results, labels, strict=True)):
        cells = []
        for column, value in enumerate(scores[index]):
            text = _text(value)
            cells.append(f"**{text}**" if index in bold[column] else text)
        rows.append([label, *cells, *_facts(result)])
    return f"{markdown_table(rows)}\n\n{CAPTION}{LOWER if lower else ''}\n"


def comparison_json(results: Sequence[Result]) -> dict[str, object]:
    """The same as values: ``majority`` by task, and ``rows`` with the mean and deviation of each number."""
    return {
        "majority": majority_of(results),
        "rows": [
            {
                "label": result.label,
                "method": result.method,
                "seeds": [run.seed for run in result.runs],
                "finished": all(run.finished for run in result.runs),
                "rounds": max(run.rounds for run in result.runs),
                "tasks": {
                    task: {
                        "metric": result.runs[0].metrics.get(task),
                        "score": _values(score_of(result, task)),
                        "worst_client": _values(spread([run.worst_client.get(task) for run in result.runs])),
                    }
                    for task in tasks_of([result])
                },
                "mean_score": _values(_mean_score(result)),
                **{name: _values(_over(result, get)) for name, get in FACTS.items()},
            }
            for result in results
        ],
    }


HEADINGS: Final = ("ARI", "cluster acc.", "MB up", "MB down", "rounds", "seeds")
FACTS: Final[dict[str, Callable[[SeedResult], float | None]]] = {
    "ari": lambda run: run.ari,
    "cluster_accuracy": lambda run: run.cluster_accuracy,
    "up_bytes": lambda run: run.up_bytes,
    "down_bytes": lambda run: run.down_bytes,
}


def _facts(result: Result) -> list[str]:
    megabytes = [
        _over(result, lambda run: run.up_bytes / 1e6),
        _over(result, lambda run: run.down_bytes / 1e6),
    ]
    rounds = sorted({run.rounds for run in result.runs})
    return [
        _text(_over(result, lambda run: run.ari), 2),
        _text(_over(result, lambda run: run.cluster_accuracy), 2),
        *(f"{size.mean:.2f}" if size else MISSING for size in megabytes),
        str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]}-{rounds[-1]}",
        "one seed" if len(result.runs) == 1 else f"{len(result.runs)} seeds",
    ]


def _bold(results: Sequence[Result], column: Sequence[Spread | None], metrics: Iterable[str]) -> set[int]:
    """Rows of the best federated score, ties in the digits shown included.

    None where there is just one, or where the metrics do not agree on which way is better.
    """
    higher = higher_is_better(metrics)
    shown = {
        index: round(value.mean, 3)
        for index, (result, value) in enumerate(zip(results, column, strict=True))
        if value is not None and result.method not in NOT_FEDERATED | TOLD_TASKS
    }
    if len(shown) < 2 or higher is None:
        return set()
    best = max(shown.values()) if higher else min(shown.values())
    return {index for index, value in shown.items() if value == best}


def tasks_of(results: Sequence[Result]) -> list[str]:
    """All tasks, in the order in which they first occur."""
    return list(dict.fromkeys(task for result in results for run in result.runs for task in run.scores))


def score_of(result: Result, task: str) -> Spread | None:
    """A task's score over a result's seeds."""
    return spread([run.scores.get(task) for run in result.runs])


def _mean_score(result: Result) -> Spread | None:
    return _over(result, lambda run: run.mean_score)


def _over(result: Result, get: Callable[[SeedResult], float | None]) -> Spread | None:
    return spread([get(run) for run in result.runs])


def majority_of(results: Sequence[Result]) -> dict[str, float]:
    """By task, the mean over the runs, whose validation rows may differ by seed."""
    found: dict[str, list[float]] = {}
    for result in results:
        for run in result.runs:
            for task, score in run.majority.items():
                found.setdefault(task, []).append(score)
    return {task: mean(scores) for task, scores in found.items()}


def label_of(result: Result) -> str:
    """The row's name, with what has to be known beside its scores."""
    notes = ["told the tasks"] if result.method in TOLD_TASKS else []
    if any(not run.finished for run in result.runs):
        notes.append("unfinished")
    return f"{result.label} ({', '.join(notes)})" if notes else result.label


def metrics_of(results: Sequence[Result], tasks: Sequence[str]) -> set[str]:
    """The metrics that these tasks are scored by."""
    runs = [run for result in results for run in result.runs]
    return {run.metrics[task] for run in runs for task in tasks if task in run.metrics}


def _heading(results: Sequence[Result], task: str) -> str:
    named = sorted(metrics_of(results, [task]) - {"accuracy"})
    return f"{task} ({', '.join(named)})" if named else task


def _text(value: Spread | None, digits: int = 3) -> str:
    return MISSING if value is None else value.text(digits)


def _values(value: Spread | None) -> dict[str, float | None] | None:
    return None if value is None else {"mean": value.mean, "std": value.deviation}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width, so that the source reads as well as the page."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head, *body = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *body])
