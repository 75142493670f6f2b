"""Fig. 3: error against width, one net for two tasks against a smaller one for each."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from fltac.errors import InputError
from fltac.reproduce.order import Made, Order, Scale, sort_overrides
from fltac.reproduce.two_sines import ARMS, LEARNING_RATE, NOISE, Errors, errors
from fltac.runtime.progress import Progress

WIDTHS: Final[dict[Scale, tuple[int, ...]]] = {
    "small": (3, 5, 7, 9, 12, 16, 24, 32),
    "paper": (3, 5, 7, 9, 12, 16, 24, 32, 48, 64),
}
POINTS: Final[dict[Scale, int]] = {"small": 200, "paper": 1000}
EPOCHS: Final = 1000
LABELS: Final = {
    "one": "one net of width w",
    "told": "one net of width w, told the task",
    "two": "two nets of width (3w - 1) // 6",
}
COLOURS: Final = {"one": "#e08e45", "told": "#8f8f8f", "two": "#1f4e8c"}


def make(order: Order, progress: Progress) -> Made:
    """Trains and draws.

    Raises:
        InputError: a setting; there are ``epochs`` and ``points``.
    """
    own = sort_overrides(order.overrides, {"epochs": (), "points": ()})
    if own.common:
        key = own.common[0].partition("=")[0]
        raise InputError(f"figure3: {key}: unknown key; allowed are epochs, points")
    epochs = _whole("epochs", own.own.get("epochs"), EPOCHS)
    points = _whole("points", own.own.get("points"), POINTS[order.scale])
    seeds = range(order.seeds or 1)
    found = []
    for width in WIDTHS[order.scale]:
        progress.message(f"figure3: width {width}, {len(seeds)} seeds, {epochs} epochs")
        found.append(errors(width, seeds, points, epochs))
    spread = 1 if len(seeds) > 1 else 0
    rows = [
        {
            "width": one.width,
            "small_width": one.small,
            "arm": arm,
            "task": task,
            "mean": float(one.of[arm][:, task].mean()),
            "std": float(one.of[arm][:, task].std(ddof=1)) if spread else None,
            "seeds": len(seeds),
        }
        for one in found
        for arm in ARMS
        for task in (0, 1)
    ]
    data = {"rows": rows, "epochs": epochs, "points": points, "noise": NOISE, "learning_rate": LEARNING_RATE}
    return Made(data, _table(found), _notes(found, points, epochs), rows, {"": _picture(found)})


def _whole(key: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{key}: got {text!r}; expected a whole number from 1")
    return int(text)


def _table(found: Sequence[Errors]) -> list[list[str]]:
    heading = ["w", "width of each of two", *(f"{LABELS[arm]}, task {task + 1}" for task in (0, 1) for arm in ARMS)]
    return [heading, *([str(one.width), str(one.small), *_cells(one)] for one in found)]


def _cells(one: Errors) -> list[str]:
    cells = []
    for task in (0, 1):
        for arm in ARMS:
            values = one.of[arm][:, task]
            text = f"{values.mean():.4f}"
            cells.append(f"{text} ± {values.std(ddof=1):.4f}" if len(values) > 1 else f"{text} (one seed)")
    return cells


def _notes(found: Sequence[Errors], points: int, epochs: int) -> list[str]:
    better = [one.width for one in found if (one.of["two"].mean(axis=0) < one.of["one"].mean(axis=0)).all()]
    told = [one.width for one in found if (one.of["told"].mean(axis=0) < one.of["two"].mean(axis=0)).all()]
    floor = float(np.sin(0.25) ** 2 / 2)
    return [
        f"Mean squared error against the sines without noise, mean ± standard deviation over seeds; {points} training "
        f"points a task with noise {NOISE[0]} and {NOISE[1]}, {epochs} full-batch epochs of Adam at {LEARNING_RATE}. "
        "The two nets together have at most as many parameters as the one.",
        f"Two nets are below one on both tasks at w = {_list(better)}. A net that is given x alone cannot be below "
        f"sin(1/4)² / 2 = {floor:.4f} in the mean of both tasks, however wide it is.",
        f"One net that is told the task is below the two on both tasks at w = {_list(told)}: what the two gain is "
        "that nobody has to tell them apart, and not their size. This arm is not in the paper.",
        "The paper prints no numbers; its two nets win on both tasks where r, the width of the one net, is below about "
        "8 to 16. Its sizes of data and noise, activation, optimizer and learning rate are not given; these are ours.",
    ]


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) or "none"


def _picture(found: Sequence[Errors]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    widths = [one.width for one in found]
    for task, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for arm in ARMS:
            values = np.stack([one.of[arm][:, task] for one in found])
            mean = values.mean(axis=1)
            axes.plot(widths, mean, marker="o", markersize=4, color=COLOURS[arm], label=LABELS[arm])
            if values.shape[1] > 1:
                deviation = values.std(axis=1, ddof=1)
                low = np.maximum(mean - deviation, mean / 10)  # the axis is logarithmic
                axes.fill_between(widths, low, mean + deviation, color=COLOURS[arm], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, labels=list(map(str, widths)))
        axes.minorticks_off()
        axes.set_xlabel("w")
        axes.set_title(("task 1: sin(x)", "task 2: sin(x + 0.5), more noise")[task], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean squared error")
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure
