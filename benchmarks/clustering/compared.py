"""Writes the comparisons' tables and figures from the runs that ``compare.py`` played.

    python benchmarks/clustering/compared.py

``results/clustering/comparison.md``, ``comparison-ari.svg`` (ARI over the rounds) and ``comparison-bytes.svg`` (score
against bytes); the same named ``comparison-full`` for the full size. Takes seconds; trains nothing.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from compare import RATE_ROUNDS, RATE_SEED, WEIGHED, WEIGHT_REGIME, WEIGHT_SEEDS, WEIGHTS
from compared_figures import Run, Runs, against, ari_figure, bytes_figure, curve, groups
from matplotlib import rc_context
from methods import KINDS, METHODS, OUT, SIZES, Size, settings_of

from fltac.runtime.atomic import write_atomic

TABLES = {
    "small": OUT.parent / "comparison.md",
    "full": OUT.parent / "comparison-full.md",
    "digits": OUT.parent / "comparison-digits.md",
}
ORACLES = ("oracle", *(f"oracle{kind}" for kind in KINDS))
TITLES = {"small": "", "full": ", all layers adapted", "digits": ": the quickstart's tasks"}


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
    config = next(iter(next(iter(regimes.values())).values()))[0]["config"]
    rounds, training = config["federation"]["rounds"], config["training"]
    tasks, steps = len(config["tasks"]), 50 if size.even else training["steps"]
    even = ""
    if size.even:
        even = (
            " (`fltac`: 46, and 20 batches of gradients before the first, so as many in all; with `+all-steps` as many "
            "steps as all others, and the batches on top)"
        )
    lines = [
        f"# Methods compared{TITLES[name]}",
        "",
        "Written by `benchmarks/clustering/compared.py` from the files in `comparison/`; do not edit.",
        "",
        f"{size.about}; {rounds} rounds of {steps} steps of {training['batch_size']} rows"
        f"{even}; scored on up to {size.rows} validation rows of a task; K = {tasks} is "
        "given but for `+auto`, CFL and FedLEASE, which choose it. Score: the mean over the tasks of what clients "
        "hold after the last round. Regret: what the oracle of the same seed scores more. ARI: of all slots' "
        "clusters against their tasks, after the first round that groups (`fltac-a`: the second, `+if-clear`: "
        "either; with `+at-once` or `+no-softmax`, and all others: the first) and after the last. `+half`: five of "
        "the ten clients in a round; `+rank4`: of rank 4 (FedIT: 20); both are compared with the oracle's and "
        "FedIT's runs of that kind. ±: one standard deviation over the seeds; rows of other seeds are compared by "
        "their regret alone. "
        "The majority class's are of all validation rows. " + machines(regimes),
    ]
    for regime, runs in regimes.items():
        lines += ["", f"## Regime {regime}", "", *table(runs)]
    lines += ["", "## Against the targets", "", *targets(regimes)]
    lines += ["", "## Learning rates", "", *rates(size)]
    if name == "small":
        lines += ["", "## What profiles weigh", "", *weights()]
    lines += ["", "## Settings", "", "Beside those that all runs have in common:", ""]
    own = {name: settings_of(name, size) for name in METHODS if any(name in runs for runs in regimes.values())}
    return lines + [f"- {name}: {', '.join(f'`{item}`' for item in items)}" for name, items in own.items() if items]


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
    tasks = list(next(iter(runs.values()))[0]["tasks"])
    lines = [
        f"| method | seeds | rate | score | regret | {' | '.join(tasks)} | ARI | MB up |",
        "|---" * (len(tasks) + 7) + "|",
    ]
    majority = next(iter(runs.values()))[0]["majority"]
    each = [f"{majority[task]:.3f}" for task in tasks]
    lines.append(f"| majority class | | | {np.mean(list(majority.values())):.3f} | | {' | '.join(each)} | | |")
    for method, own in runs.items():
        regrets = [other - mine for mine, other in against(runs, method, "oracle")]
        cells = [
            method,
            " ".join(str(run["seed"]) for run in own),
            "" if method == "zero" else f"{own[0]['lr']:g}",
            spread([run["mean_score"] for run in own]),
            spread(regrets) if regrets and method not in ORACLES else "",
            *(f"{np.mean([run['tasks'][task]['score'] for run in own]):.3f}" for task in tasks),
            aris(own),
            f"{np.mean([run['bytes']['up'] for run in own]) / 1e6:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; one value says so."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f} (one seed)"


def aris(runs: Sequence[Run]) -> str:
    """The mean ARI after the first round that groups and after the last, and the least of the last."""
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


def rates(size: Size) -> list[str]:
    """What each learning rate scored on the seed where it was chosen."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in size.rates.glob("*.json")]
    scores = {(run["method"], run["lr"]): run["mean_score"] for run in runs}
    tried = sorted({rate for _, rate in scores})
    lines = [
        f"After {RATE_ROUNDS} rounds of regime {size.rate_regime} with seed {RATE_SEED}, which is none of the seeds "
        "above. Variants take the rate of their method, `fltac` and the oracle that of `fltac-products`, `central` the "
        "config's. Where the best is at an end of what was tried, another rate may be better.",
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
        f"Regime {WEIGHT_REGIME} with seeds that are none of those above, products beside profiles: ARI by round, and "
        "the score.",
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


if __name__ == "__main__":
    sys.exit(main())
