"""The figure of a comparison: each task's score by method, with the majority class as a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fltac.config.metrics import higher_is_better
from fltac.report.compare import label_of, majority_of, metrics_of, score_of, tasks_of
from fltac.report.partition_plot import check_plot_file, save
from fltac.report.results import Result

COLOURS = ("#b8c4d6", "#7f9cc4", "#4d74ad", "#1f4e8c", "#e08e45", "#c7c7c7", "#8f8f8f", "#5e5e5e")


LONG_NAME = 16
"""Letters of a task's name from which names would run into each other, side by side."""


def plot_scores(results: Sequence[Result], path: Path) -> None:
    """Draws the figure.

    Args:
        results: One group of bars for each task, one bar in it for each result; a whisker of one standard deviation
            where there are several seeds.
        path: File to write; its ending says the format.

    Raises:
        InputError: see :func:`fltac.report.partition_plot.check_plot_file`.
    """
    check_plot_file(path)
    save(scores_figure(results), path)


def scores_figure(results: Sequence[Result]) -> Any:
    """The same as a matplotlib figure."""
    from matplotlib.figure import Figure

    tasks, majority = tasks_of(results), majority_of(results)
    figure = Figure(figsize=(max(7.0, 1.7 * len(tasks)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    lowest, highest = 1.0, 1.0
    for index, result in enumerate(results):
        spreads = [score_of(result, task) for task in tasks]
        places = [column - 0.4 + width * (index + 0.5) for column in range(len(tasks))]
        heights = [spread.mean if spread else 0.0 for spread in spreads]
        errors = [spread.deviation or 0.0 if spread else 0.0 for spread in spreads]
        colour = COLOURS[index % len(COLOURS)]
        axes.bar(places, heights, width * 0.92, yerr=errors, label=label_of(result), color=colour, ecolor="#333333")
        lowest = min([lowest, *(height for height in heights if height)])
        highest = max([highest, *(1.05 * height for height in heights if height > 1)])  # a loss
    for column, task in enumerate(tasks):
        if task in majority:
            ends = [column - 0.42, column + 0.42]
            label = "majority class" if column == 0 else None
            axes.plot(ends, [majority[task]] * 2, color="#c0392b", linewidth=1.4, linestyle="--", label=label)
            lowest = min(lowest, majority[task])
    long = max(map(len, tasks)) > LONG_NAME
    axes.set_xticks(range(len(tasks)), labels=tasks, rotation=20 if long else 0, ha="right" if long else "center")
    if higher_is_better(metrics_of(results, tasks)):
        axes.set_ylim(max(0.0, lowest - 0.1), highest)
        axes.set_ylabel("score")
    else:
        axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
