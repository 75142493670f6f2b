"""Fig. 2: who holds how much of which task, and the methods' scores by task as a radar chart."""

from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any

from fltac.config.metrics import LOWER_IS_BETTER
from fltac.report.compare import majority_of, score_of, tasks_of
from fltac.report.partition_plot import shares
from fltac.report.results import Result
from fltac.report.scores_plot import COLOURS
from fltac.reproduce.order import Made, Order, sort_overrides
from fltac.reproduce.paper import ACCURACY, COLUMN_OF, JUDGED
from fltac.reproduce.runs import EXPERIMENTS, METHODS, finished, methods_of, runs_of
from fltac.runtime.progress import Progress
from fltac.runtime.setup import load_partition

Counts = Mapping[str, Mapping[str, int]]
"""Client to task to training rows."""
SIDE = 0.1
"""A task whose direction's cosine is less than this stands above or below the circle, not beside it."""


def make(order: Order, progress: Progress) -> Made:
    """Splits the data of ``experiment=`` (default ``dolly``) and runs what is missing, as its table does.

    Raises:
        InputError: see ``runs``.
    """
    overrides = sort_overrides(order.overrides, {"experiment": tuple(EXPERIMENTS), "methods": ()}, tuple(EXPERIMENTS))
    part = overrides.own.get("experiment", "dolly")
    runs = runs_of(order, part, methods_of(overrides, METHODS), overrides)
    split = load_partition(runs[0].config)[1]
    counts = {
        client: {task: len(split.rows[client, task]) for task in split.client_tasks(client)} for client in split.clients
    }
    results = finished(order, runs, progress)
    tasks = list(runs[0].config.tasks)
    values, reading = radar_values(results)
    table = [
        ["client", *tasks],
        *([client, *(str(row.get(task, 0)) for task in tasks)] for client, row in counts.items()),
    ]
    seeds = max(len(result.runs) for result in results)
    notes = [
        f"Training rows of each client in `{part}`, first seed. Heat map: each task's rows over the clients, Dirichlet"
        f"({runs[0].config.federation.partition.alpha}).",
        f"Radar chart: {reading}, {'one seed' if seeds == 1 else f'mean over {seeds} seeds'}.",
    ]
    paper = printed_scores(part, {task: own.preset or task for task, own in runs[0].config.tasks.items()}, list(values))
    if paper:
        judged = "; they are an LLM judge's, so compare methods within one source only" if part == "dolly" else ""
        notes.append(f"The paper's scores of these methods and tasks are `paper` in the JSON{judged}.")
    data = {
        "paper": paper,
        "experiment": part,
        "clients": counts,
        "radar": values,
        "radar_shows": reading,
        "seeds": seeds,
    }
    pictures = {"a": _heat_map(counts, tasks), "b": _radar(values)}
    return Made(data, table, notes, pictures=pictures)


def printed_scores(part: str, presets: Mapping[str, str], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """The paper's numbers for those methods and tasks that it has: method to task to score."""
    printed = JUDGED if part == "dolly" else ACCURACY
    found = {
        method: {
            task: printed[method][column]
            for task, preset in presets.items()
            if (column := COLUMN_OF.get(preset, preset)) in printed[method]
        }
        for method in methods
        if method in printed
    }
    return {method: row for method, row in found.items() if row}


def radar_values(results: Sequence[Result]) -> tuple[dict[str, dict[str, float]], str]:
    """What the radar chart shows, so that outwards is always better.

    Returns:
        Method to task to value, and in words what it is: the score, or, where tasks are scored by a loss, what the
        untrained model's (``zero``) loses.
    """
    metrics = {metric for result in results for run in result.runs for metric in run.metrics.values()}
    tasks = tasks_of(results)
    scores = {
        result.method: {task: score.mean for task in tasks if (score := score_of(result, task)) is not None}
        for result in results
    }
    if not metrics & LOWER_IS_BETTER:
        majority = majority_of(results)
        return ({"majority": majority} if set(tasks) <= set(majority) else {}) | scores, "scores by task"
    before = scores.pop("zero", None)
    if before is None:
        return {
            method: {task: -value for task, value in row.items()} for method, row in scores.items()
        }, "minus the loss"
    gained = {method: {task: before[task] - value for task, value in row.items()} for method, row in scores.items()}
    return gained, "by how much the loss is below the untrained model's"


def _heat_map(counts: Counts, tasks: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    clients = list(counts)
    by_task = [shares(counts, task) for task in tasks]
    values = [[row.get(client, 0.0) for client in clients] for row in by_task]
    figure = Figure(figsize=(max(6.0, 0.62 * len(clients) + 2.4), 0.5 * len(tasks) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    middle = max(max(row) for row in values) / 2
    for y, task in enumerate(tasks):
        for x, client in enumerate(clients):
            rows = counts[client].get(task, 0)
            colour = "white" if values[y][x] > middle else "black"
            axes.text(x, y, str(rows) if rows else "·", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(clients)), labels=clients, fontsize=8)
    axes.set_yticks(range(len(tasks)), labels=list(tasks), fontsize=8)
    axes.set_title("training rows; colour: share of the task", fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure


def _radar(values: Mapping[str, Mapping[str, float]]) -> Any:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for row in values.values() for task in row))
    angles = [2 * pi * number / len(tasks) for number in range(len(tasks))]
    figure = Figure(figsize=(8.6, 5))
    axes = figure.add_axes((0.2, 0.1, 0.48, 0.8), projection="polar")  # with room for names on both sides
    methods = [method for method in values if method != "majority"]
    for method, row in values.items():
        around = [row.get(task, float("nan")) for task in tasks]
        majority = method == "majority"
        colour = "#c0392b" if majority else COLOURS[methods.index(method) % len(COLOURS)]
        style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2} if majority else {"linewidth": 1.6}
        axes.plot([*angles, angles[0]], [*around, around[0]], color=colour, label=method, **style)
    shown = [value for row in values.values() for value in row.values()]
    room = 0.1 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_xticks(angles, labels=tasks, fontsize=8)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):  # away from the circle
        label.set_horizontalalignment("center" if abs(cos(angle)) < SIDE else "left" if cos(angle) > 0 else "right")
    axes.tick_params(axis="y", labelsize=7)
    figure.legend(loc="upper right", frameon=False, fontsize=8)
    return figure
