"""Writes the comparisons' tables and figures from the runs that ``compare.py`` played.

    python benchmarks/clustering/compared.py

``results/clustering/comparison.md``, ``comparison-ari.svg`` (ARI over the rounds) and ``comparison-bytes.svg`` (score
against bytes); the same named ``comparison-full`` for the full size. Takes seconds; trains nothing.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from compare import METHODS, OUT, SIZES, WEIGHED, WEIGHT_REGIME, WEIGHT_SEEDS, WEIGHTS, Size
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fltac.runtime.atomic import write_atomic

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]
"""By method, in the order of seeds."""

TABLES = {"small": OUT.parent / "comparison.md", "full": OUT.parent / "comparison-full.md"}
COLOUR = {
    "zero": "#bbbbbb",
    "local": "#7f9cc4",
    "fedit": "#8c6d31",
    "fedit+adjusted": "#c9a66b",
    "fltac-paper": "#c0392b",
    "fltac": "#1f4e8c",
    "fltac+auto": "#e377c2",
    "fltac+profiles": "#2e8b57",
    "fltac+adjusted": "#7d5ba6",
    "fltac+profiles+adjusted": "#3b9ea5",
    "fltac+profiles2": "#9fd3b0",
    "fltac+profiles2+adjusted": "#a6d5da",
    "fltac+confidence": "#a3b86c",
    "fltac+shrinkage": "#6b8e9f",
    "fltac+later": "#d4a017",
    "fltac+loss": "#5d6d7e",
    "fltac+single": "#c39bd3",
    "oracle": "#e08e45",
    "oracle+adjusted": "#b5651d",
    "central": "#555555",
}


def main() -> int:
    for name, size in SIZES.items():
        place, regimes = TABLES[name], played(size)
        if not regimes:
            sys.exit(f"{size.runs}: no runs; play some with compare.py")
        write_atomic(place, ("\n".join(page(name, size, regimes)) + "\n").encode())
        # The same runs give the same file.
        with rc_context({"svg.hashsalt": name}):
            ari_figure(regimes).savefig(place.with_name(f"{place.stem}-ari.svg"), metadata={"Date": None})
            bytes_figure(regimes).savefig(place.with_name(f"{place.stem}-bytes.svg"), metadata={"Date": None})
        print(place)
    return 0


def page(name: str, size: Size, regimes: Mapping[str, Runs]) -> list[str]:
    """The lines of one size's tables."""
    batch = next(iter(next(iter(regimes.values())).values()))[0]["config"]["training"]["batch_size"]
    lines = [
        f"# Methods compared{', all layers adapted' if name == 'full' else ''}",
        "",
        "Written by `benchmarks/clustering/compared.py` from the files in `comparison/`; do not edit.",
        "",
        f"Five GLUE tasks on all-MiniLM-L6-v2, 10 clients; LoRA of rank 1 (`fedit`: 5) in {size.layers}; "
        f"5 rounds of 50 steps of {batch} rows; scored on up to {size.rows} validation rows of a task; K = 5 is given "
        "but for `fltac+auto`. Score: the mean over the tasks of what clients hold after the last round. Regret: what "
        "the oracle of the same seed scores more. ARI: of all slots' clusters against their tasks, after the first and "
        "after the last round. ±: one standard deviation over the seeds; rows of other seeds are compared by their "
        "regret alone. The majority class's are of all validation rows. " + machines(regimes),
    ]
    for regime, runs in regimes.items():
        lines += ["", f"## Regime {regime}", "", *table(runs)]
    lines += ["", "## Against the targets", "", *targets(regimes)]
    lines += ["", "## Learning rates", "", *rates(size)]
    if name == "small":
        lines += ["", "## What profiles weigh", "", *weights()]
    lines += ["", "## Settings", "", "Beside those that all runs have in common:", ""]
    names = [name for name in METHODS if METHODS[name] and any(name in runs for runs in regimes.values())]
    return lines + [f"- {name}: {', '.join(f'`{item}`' for item in METHODS[name])}" for name in names]


def machines(regimes: Mapping[str, Runs]) -> str:
    """Which methods were played on a GPU, in a sentence."""
    gpus: dict[str | None, set[str]] = defaultdict(set)
    for runs in regimes.values():
        for method, own in runs.items():
            for run in own:
                gpus[run.get("hardware", {}).get("gpu")].add(method)
    if set(gpus) == {None}:
        return "All on CPUs."
    on = [f"{', '.join(sorted(gpus[gpu]))} on an {gpu}" if gpu else "" for gpu in sorted(gpus, key=str)]
    rest = f"; {', '.join(sorted(gpus[None]))} on CPUs" if None in gpus else ""
    return f"Played: {', '.join(filter(None, on))}{rest}. The device changes rounding alone."


def played(size: Size) -> dict[str, Runs]:
    """All runs by regime and method, in the methods' order."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(size.runs.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found[run["regime"]][run["method"]].append(run)
    return {
        regime: {method: sorted(runs[method], key=lambda run: run["seed"]) for method in METHODS if method in runs}
        for regime, runs in sorted(found.items())
    }


def table(runs: Runs) -> list[str]:
    """One row for each method of a regime."""
    oracle = {run["seed"]: run["mean_score"] for run in runs.get("oracle", ())}
    tasks = list(next(iter(runs.values()))[0]["tasks"])
    lines = [
        f"| method | seeds | rate | score | regret | {' | '.join(tasks)} | ARI | MB up |",
        "|---" * (len(tasks) + 7) + "|",
    ]
    majority = next(iter(runs.values()))[0]["majority"]
    each = [f"{majority[task]:.3f}" for task in tasks]
    lines.append(f"| majority class | | | {np.mean(list(majority.values())):.3f} | | {' | '.join(each)} | | |")
    for method, own in runs.items():
        regrets = [oracle[run["seed"]] - run["mean_score"] for run in own if run["seed"] in oracle]
        cells = [
            method,
            " ".join(str(run["seed"]) for run in own),
            "" if method == "zero" else f"{own[0]['lr']:g}",
            spread([run["mean_score"] for run in own]),
            spread(regrets) if regrets and method != "oracle" else "",
            *(f"{np.mean([run['tasks'][task]['score'] for run in own]):.3f}" for task in tasks),
            aris(own),
            f"{np.mean([run['bytes']['up'] for run in own]) / 1e6:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; one value says so."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f} (one seed)"


def curve(run: Run) -> list[float]:
    """ARI by round; empty where nothing is clustered."""
    return [number["clustering"]["ari"] for number in run["rounds"] if number["clustering"]]


def groups(method: str) -> bool:
    """Whether a method is not told the tasks."""
    return not method.startswith(("oracle", "central"))


def aris(runs: Sequence[Run]) -> str:
    """The mean ARI after the first and after the last round, and the least of the last."""
    curves = [curve(run) for run in runs]
    if not all(curves) or not groups(runs[0]["method"]):
        return ""
    last = [values[-1] for values in curves]
    return f"{np.mean([values[0] for values in curves]):.2f} → {np.mean(last):.2f} (least {min(last):.2f})"


def targets(regimes: Mapping[str, Runs]) -> list[str]:
    """How far each way to group is from what was asked of it."""
    lines = [
        "Asked: ARI of at least 0.90 after the last round; at least 99 % of the oracle's score; at most half a point "
        "below the better one of `local` and `fedit`. The same seeds are compared (in brackets how many), the loss of "
        "all is `plain` but for those that are named adjusted.",
        "",
        "| regime | method | seeds | ARI | of the oracle | points above local | above fedit |",
        "|---|---|---|---|---|---|---|",
    ]
    for regime, runs in regimes.items():
        for method in [name for name in runs if name.startswith("fltac")]:
            last = aris(runs[method])
            beside = [against(runs, method, other) for other in ("oracle", "local", "fedit")]
            if beside[0] and last:
                ratio = np.mean([mine for mine, _ in beside[0]]) / np.mean([other for _, other in beside[0]])
                points = [
                    f"{100 * np.mean([mine - other for mine, other in pairs]):+.1f} ({len(pairs)})" if pairs else ""
                    for pairs in beside[1:]
                ]
                ari = np.mean([curve(run)[-1] for run in runs[method]])
                seeds = len(runs[method])
                lines.append(f"| {regime} | {method} | {seeds} | {ari:.2f} | {ratio:.1%} | {' | '.join(points)} |")
    return lines


def against(runs: Runs, method: str, other: str) -> list[tuple[float, float]]:
    """The scores of two methods on the seeds that both have."""
    theirs = {run["seed"]: run["mean_score"] for run in runs.get(other, ())}
    return [(run["mean_score"], theirs[run["seed"]]) for run in runs[method] if run["seed"] in theirs]


def rates(size: Size) -> list[str]:
    """What each learning rate scored on the seed where it was chosen."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in size.rates.glob("*.json")]
    scores = {(run["method"], run["lr"]): run["mean_score"] for run in runs}
    tried = sorted({rate for _, rate in scores})
    lines = [
        "After three rounds of regime I with seed 0, which is none of the seeds above. Variants take the rate of "
        "their method, the oracle that of `fltac`, `central` the config's. Where the best is at an end of what was "
        "tried, another rate may be better.",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in tried) + " |",
        "|---" * (len(tried) + 1) + "|",
    ]
    for method in [name for name in size.chosen if any(name == other for other, _ in scores)]:
        cells = [f"{scores[method, rate]:.3f}" if (method, rate) in scores else "" for rate in tried]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def weights() -> list[str]:
    """ARI over the rounds and the score, for what was tried as the weight of profiles."""
    lines = [
        f"Regime {WEIGHT_REGIME} with seeds that are none of those above: ARI by round, and the score.",
        "",
        "| weight | " + " | ".join(f"seed {seed}" for seed in WEIGHT_SEEDS) + " |",
        "|---" * (len(WEIGHT_SEEDS) + 1) + "|",
    ]
    for name in WEIGHED:
        cells = []
        for path in (WEIGHTS / f"weight{name}-seed{seed}.json" for seed in WEIGHT_SEEDS):
            run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            cells.append(f"{' '.join(f'{ari:.2f}' for ari in curve(run))} ({run['mean_score']:.3f})" if run else "")
        lines.append(f"| {name.replace('-hysteresis', ', hysteresis ')} | {' | '.join(cells)} |")
    return lines


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
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)


def colour(method: str) -> str:
    """Of a method's marks; grey for those without one of their own."""
    return COLOUR.get(method, "#999999")


def ari_figure(regimes: Mapping[str, Runs]) -> Figure:
    """Mean ARI over the rounds, with the span of the seeds."""
    figure, axes = panels(regimes)
    for (_, runs), place in zip(regimes.items(), axes, strict=True):
        for method, own in runs.items():
            curves = np.array([curve(run) for run in own])
            if not groups(method) or not curves.size:
                continue
            rounds = range(1, curves.shape[1] + 1)
            place.plot(rounds, curves.mean(axis=0), color=colour(method), marker="o", markersize=3, label=method)
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
        oracle = {run["seed"]: run["mean_score"] for run in runs.get("oracle", ())}
        for method, own in runs.items():
            paired = [run for run in own if run["seed"] in oracle]
            if not paired:
                continue
            gains = [run["mean_score"] - oracle[run["seed"]] for run in paired]
            sent = np.mean([run["bytes"]["up"] for run in paired]) / 1e6
            spread_of = np.std(gains, ddof=1) if len(gains) > 1 else None
            place.errorbar(sent, np.mean(gains), yerr=spread_of, fmt="o", color=colour(method), label=method)
        place.axhline(0, color="#999999", linewidth=0.8, linestyle="--")
        place.set_xlabel("MB uploaded, all clients and rounds")
    axes[0].set_ylabel("mean score less the oracle's")
    legend(figure, axes)
    return figure


if __name__ == "__main__":
    sys.exit(main())
