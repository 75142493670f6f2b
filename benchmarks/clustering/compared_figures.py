"""The comparisons' figures: ARI over the rounds, and score against bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from methods import KINDS

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]
"""By method, in the order of seeds."""

COLOUR = {
    "zero": "#bbbbbb",
    "local": "#7f9cc4",
    "fedit": "#8c6d31",
    "fedit+adjusted": "#c9a66b",
    "fltac-paper": "#c0392b",
    "fltac": "#000000",
    "fltac+half": "#4d4d4d",
    "fedit+half": "#d2b48c",
    "fltac+auto": "#17a2b8",
    "fltac+all-steps": "#7f7f00",
    "oracle+half": "#f4c095",
    "fltac-a": "#1f4e8c",
    "fltac-a+auto": "#e377c2",
    "fltac-a+no-softmax": "#74a9cf",
    "fltac-a+at-once": "#d95f0e",
    "fltac-a+if-clear": "#999933",
    "fltac-a+profiles": "#2e8b57",
    "fltac-a+adjusted": "#7d5ba6",
    "fltac-a+profiles+adjusted": "#3b9ea5",
    "fltac-a+profiles2": "#9fd3b0",
    "fltac-a+profiles2+adjusted": "#a6d5da",
    "fltac-a+confidence": "#a3b86c",
    "fltac-a+shrinkage": "#6b8e9f",
    "fltac-a+later": "#d4a017",
    "fltac-a+loss": "#5d6d7e",
    "fltac-a+single": "#c39bd3",
    "oracle": "#e08e45",
    "oracle+adjusted": "#b5651d",
    "central": "#555555",
    "ifca": "#b07aa1",
    "cfl": "#9c755f",
    "fedlease": "#e0b82e",
    "ffa-lora": "#4e79a7",
    "rolora": "#f28e2b",
    "fedsa-lora": "#e15759",
    "flexlora": "#76b7b2",
    "flora": "#59a14f",
    "fedex-lora": "#ff9da7",
    "fedprox": "#8a7f78",
    "fedavgm": "#5fa8a0",
    "fedadam": "#d37295",
}


def curve(run: Run) -> list[float]:
    """ARI by round, of rounds that group; empty where none does."""
    return [number["clustering"]["ari"] for number in run["rounds"] if number["clustering"]]


def groups(method: str) -> bool:
    """Whether a method is not told the tasks."""
    return not method.startswith(("oracle", "central"))


def against(runs: Runs, method: str, other: str) -> list[tuple[float, float]]:
    """The scores of two methods on the seeds that both have, in the method's kind of federation."""
    other += next((kind for kind in KINDS if method.endswith(kind)), "")
    theirs = {run["seed"]: run["mean_score"] for run in runs.get(other, ())}
    return [(run["mean_score"], theirs[run["seed"]]) for run in runs[method] if run["seed"] in theirs]


def panels(regimes: Mapping[str, Runs]) -> tuple[Figure, list[Any]]:
    """A figure with one panel for each regime."""
    figure = Figure(figsize=(4.2 * len(regimes) + 1.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    for regime, place in zip(regimes, axes, strict=True):
        place.set_title(f"regime {regime}", fontsize=10)
        place.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One for all panels: a method that only some have is in it, too."""
    handles = {
        label: handle for place in axes for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.set_figheight(max(figure.get_figheight(), 0.19 * len(handles) + 0.3))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)


def colour(method: str) -> str:
    """Of a method's marks; grey for those without one of their own."""
    return COLOUR.get(method.replace("-products", "-a"), "#999999")


def dashes(method: str) -> str:
    """Of a method's line: what compares products has the colour of what compares changes of A."""
    return "--" if "-products" in method else "-"


def ari_figure(regimes: Mapping[str, Runs]) -> Figure:
    """Mean ARI over the rounds, with the span of the seeds; those of rank 4 are in the table."""
    figure, axes = panels(regimes)
    for (_, runs), place in zip(regimes.items(), axes, strict=True):
        for method, own in runs.items():
            curves = np.array([curve(run) for run in own])
            if not groups(method) or not curves.size or method.endswith("+rank4"):
                continue
            rounds = [record["round"] for record in own[0]["rounds"] if record["clustering"]]
            place.plot(
                rounds,
                curves.mean(axis=0),
                color=colour(method),
                linestyle=dashes(method),
                marker="o",
                markersize=3,
                label=method,
            )
            place.fill_between(rounds, curves.min(0), curves.max(0), color=colour(method), alpha=0.12, linewidth=0)
        place.set_xlabel("round")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.set_ylim(-0.05, 1.03)
    axes[0].set_ylabel("ARI against the tasks")
    legend(figure, axes)
    return figure


def bytes_figure(regimes: Mapping[str, Runs]) -> Figure:
    """Each method's score, less the oracle's of the same seed, against what its clients upload; mean and spread."""
    figure, axes = panels(regimes)
    for (_, runs), place in zip(regimes.items(), axes, strict=True):
        for method, own in runs.items():
            gains = [mine - oracle for mine, oracle in against(runs, method, "oracle")]
            if not gains or method.endswith("+rank4"):  # of which four times the bytes would press all others together
                continue
            sent = np.mean([run["bytes"]["up"] for run in own]) / 1e6
            spread_of = np.std(gains, ddof=1) if len(gains) > 1 else None
            mark = "s" if "-products" in method else "o"
            place.errorbar(sent, np.mean(gains), yerr=spread_of, fmt=mark, color=colour(method), label=method)
        place.axhline(0, color="#999999", linewidth=0.8, linestyle="--")
        place.set_xlabel("MB uploaded, all clients and rounds")
    axes[0].set_ylabel("mean score less the oracle's")
    legend(figure, axes)
    return figure
