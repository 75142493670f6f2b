"""Plays the comparison: whole runs of several methods in several regimes, one small file for each.

    python benchmarks/clustering/compare.py rates
    python benchmarks/clustering/compare.py weights
    python benchmarks/clustering/compare.py runs I II --seeds 3 4 5

``rates`` tries three learning rates of each method on a seed of its own, ``weights`` what profiles weigh on two others;
``runs`` takes the best rates. What is there already
is not played again, so this can be stopped at any time and started in several processes on different seeds. Needs
FLTAC_DATA. ``compared.py`` makes the table and the figures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from film import first_state, played
from record import FOLDER
from regimes import REGIMES, regime_config

from fltac.data.encoded import majority_score
from fltac.model.prefix import RowKey
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, versions
from fltac.runtime.setup import prepare, resolved

OUT = FOLDER.parent / "comparison"
RATES, WEIGHTS, RUNS = OUT / "rates", OUT / "weights", OUT / "runs"

SETUP = [
    # Two of six layers: what the four below make of a row is then made once for all runs, which takes a third of the
    # time. Half the config's batch, five rounds of fifty steps.
    "lora.layers=[4,5]",
    "federation.rounds=5",
    "training.steps=50",
    "training.batch_size=4",
    "training.threads=1",
    "training.prefix_cache=16384",
]
"""What all runs have in common, beside the regime's own config."""

PROFILES = ["server.clustering.profile_rows=64", "server.clustering.profile_noise=0.01"]
LIGHT = [*PROFILES, "server.clustering.profile_weight=2"]
ADJUSTED = ["training.loss=logit-adjusted"]
BY_LOSS = [
    "server.clustering.assign=loss",
    "server.clustering.assign_from=3",
    "server.clustering.assignment_loss=balanced",
    "server.clustering.held_back=0.1",
]

METHODS: dict[str, list[str]] = {
    "zero": ["method=zero"],
    "local": ["method=local"],
    "fedit": ["method=fedit"],
    "fedit+adjusted": ["method=fedit", *ADJUSTED],
    "fltac-paper": ["method=fltac-paper"],
    "fltac": [],
    "fltac+auto": ["server.clustering.k=auto"],
    "fltac+profiles": PROFILES,
    "fltac+adjusted": ADJUSTED,
    "fltac+profiles+adjusted": [*PROFILES, *ADJUSTED],
    "fltac+profiles2": LIGHT,
    "fltac+profiles2+adjusted": [*LIGHT, *ADJUSTED],
    "fltac+confidence": ["server.aggregation.weighting=confidence"],
    "fltac+shrinkage": ["server.aggregation.shrinkage=0.5"],
    "fltac+later": ["server.aggregation.from_round=3"],
    "fltac+loss": BY_LOSS,
    "fltac+single": ["server.clustering.rule=single"],
    "oracle": ["method=oracle"],
    "oracle+adjusted": ["method=oracle", *ADJUSTED],
    "central": ["method=central"],
}
"""Name in the table to settings."""

CHOSEN = ("local", "fedit", "fltac-paper", "fltac")
"""Methods whose learning rate is chosen; variants take that of their method and the oracle that of ``fltac``, so that
what lies between them is the grouping alone, and ``central`` the config's own."""
TRIED = (1e-3, 2e-3, 4e-3)
RATE_REGIME, RATE_SEED, RATE_ROUNDS = "I", 0, 3
WEIGHT_REGIME, WEIGHT_SEEDS = "II", (1, 2)
WEIGHED = {
    "2": ["server.clustering.profile_weight=2"],
    "2-hysteresis0.1": ["server.clustering.profile_weight=2", "server.clustering.hysteresis=0.1"],
    "4": ["server.clustering.profile_weight=4"],
    "8": ["server.clustering.profile_weight=8"],
}
"""What was tried so that a right grouping stays right, where it is hardest."""
ROWS = 400
"""Validation rows of a task that are scored after the last round."""
KEPT: dict[RowKey, torch.Tensor] = {}
"""What the frozen layers made of rows, for all runs of a process; it grows to some gigabytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "weights", "runs"))
    parser.add_argument("regimes", nargs="*", choices=[*REGIMES, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(TRIED))
    args = parser.parse_args(arguments)
    if args.what == "rates":
        for method in [name for name in CHOSEN if name in args.methods]:
            for rate in args.rates:
                settings = [f"training.lr={rate}", f"federation.rounds={RATE_ROUNDS}"]
                play(RATES / f"{method}-lr{rate:g}.json", RATE_REGIME, method, RATE_SEED, settings)
        return 0
    if args.what == "weights":
        for seed in WEIGHT_SEEDS:
            for name, own in WEIGHED.items():
                settings = [*rate_of("fltac"), *own]
                play(WEIGHTS / f"weight{name}-seed{seed}.json", WEIGHT_REGIME, "fltac+profiles", seed, settings)
        return 0
    for seed in args.seeds:
        for regime in args.regimes:
            for method in args.methods:
                play(RUNS / f"{regime}-{method}-seed{seed}.json", regime, method, seed, rate_of(method))
    return 0


def rate_of(method: str) -> list[str]:
    """The setting of the learning rate that was best for a method; empty where it keeps the config's."""
    if method in ("zero", "central"):
        return []
    base = method.partition("+")[0]
    source = base if base in CHOSEN else "fltac"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RATES.glob(f"{source}-lr*.json")]
    if len(found) < len(TRIED):
        raise SystemExit(f"{RATES}: {len(found)} of {len(TRIED)} learning rates of {source} were tried; run `rates`")
    best = max(found, key=lambda run: (run["mean_score"], -run["lr"]))
    return [f"training.lr={best['lr']}"]


def play(path: Path, regime: str, method: str, seed: int, settings: list[str]) -> None:
    """Plays one run and writes its file, if it is not there.

    Args:
        path: Of the file.
        regime: By name.
        method: By name.
        seed: Of the run.
        settings: What is added to the regime's, the set-up's and the method's.
    """
    if path.exists():
        return
    config = regime_config(regime, seed, [*SETUP, *METHODS[method], *settings])
    experiment = resolved(prepare(config))
    if experiment.model.prefix is not None:
        experiment.model.prefix.kept = KEPT
    records, last = played(experiment, first_state(experiment), ROWS)
    config = experiment.config
    majority = {name: majority_score(task) for name, task in experiment.tasks.items()}
    record = {
        "regime": regime,
        "method": method,
        "seed": seed,
        "lr": config.training.lr,
        **last,
        "majority": majority,
        "bytes": {way: sum(record["bytes"][way] for record in records) for way in ("up", "down")},
        "rounds": records,
        "slots": len(experiment.holdings),
        "git": code_state(),
        "versions": versions(),
        "config": config.model_dump(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    aris = [f"{item['clustering']['ari']:.2f}" for item in records if item["clustering"]]
    print(f"{path.name}: {last['mean_score']:.3f}", *aris, flush=True)


if __name__ == "__main__":
    sys.exit(main())
