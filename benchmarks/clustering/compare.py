"""Plays the comparison: whole runs of several methods in several regimes, one small file for each.

    python benchmarks/clustering/compare.py rates
    python benchmarks/clustering/compare.py weights
    python benchmarks/clustering/compare.py runs I II --seeds 3 4 5
    python benchmarks/clustering/compare.py runs I II --seeds 3 4 5 --size full
    python benchmarks/clustering/compare.py runs V --seeds 3 4 5 --size digits

``rates`` tries three learning rates of each method on a seed of its own, ``weights`` what profiles weigh on two others;
``runs`` takes the best rates. ``--size full`` adapts all layers, which is meant for a GPU; ``--size digits`` is for the
quickstart's tasks, where a run takes seconds. What is there already is not played again, so this can be stopped at any
time and started in several processes on different seeds. Needs FLTAC_DATA, but for ``digits``. ``compared.py`` reports.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from film import first_state, played, sharing
from methods import GROUPINGS, KINDS, METHODS, OUT, SHARED, SIZES, Size, settings_of
from regimes import REGIMES, regime_config

from fltac.data.encoded import majority_score
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, hardware, versions

WEIGHTS = OUT / "weights"
RATE_SEED, RATE_ROUNDS = 0, 3
WEIGHT_REGIME, WEIGHT_SEEDS = "II", (1, 2)
WEIGHED = {
    "2": ["server.clustering.profile_weight=2"],
    "2-hysteresis0.1": ["server.clustering.profile_weight=2", "server.clustering.hysteresis=0.1"],
    "4": ["server.clustering.profile_weight=4"],
    "8": ["server.clustering.profile_weight=8"],
}
"""What was tried so that a right grouping stays right, where it is hardest."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "weights", "runs"))
    parser.add_argument("regimes", nargs="*", choices=[*REGIMES, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all but the published, if small")
    parser.add_argument("--rates", type=float, nargs="+", help="default: three by size; at least so many are tried")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each in a process")
    args = parser.parse_args(arguments)
    size = SIZES[args.size]
    others = {*GROUPINGS, *SHARED, *(name for name in METHODS if name.endswith("+ranks"))}
    others |= {n for n in METHODS if n.startswith(("fltac-a", "fltac-products+", "fltac+all")) or n.endswith(KINDS)}
    jobs, methods = list[Job](), args.methods or [n for n in METHODS if n in size.chosen or n not in others]
    if args.what == "rates":
        rates = args.rates or size.tried
        own = [method for method in size.chosen if method in methods]
        jobs = [Job(args.size, method, size.rate_regime, rate=rate) for method in own for rate in rates]
    elif args.what == "weights":
        jobs = [
            Job("small", "fltac-products+profiles", WEIGHT_REGIME, seed, weight=name)
            for seed in WEIGHT_SEEDS
            for name in WEIGHED
        ]
    else:
        jobs = [
            Job(args.size, method, regime, seed) for seed in args.seeds for regime in args.regimes for method in methods
        ]
    return play_all(jobs, args.workers)


@dataclass(frozen=True)
class Job:
    """A run to be played: of the table, or one that a learning rate or a profile's weight is chosen by."""

    size: str
    method: str
    regime: str
    seed: int = RATE_SEED
    rate: float | None = None
    weight: str | None = None

    def play(self) -> None:
        """Plays it, if it was not played."""
        size, name = SIZES[self.size], f"{self.regime}-{self.method}-seed{self.seed}"
        if self.rate is not None:
            path = size.rates / f"{self.method}-lr{self.rate:g}.json"
            settings = [f"training.lr={self.rate}", f"federation.rounds={RATE_ROUNDS}"]
        elif self.weight is not None:
            path = WEIGHTS / f"weight{self.weight}-seed{self.seed}.json"
            settings = [*rate_of(self.method, size), *WEIGHED[self.weight]]
        else:
            path, settings = size.runs / f"{name}.json", rate_of(self.method, size)
        play(path, size, self.regime, self.method, self.seed, settings)


def play_all(jobs: Sequence[Job], workers: int) -> int:
    """Plays jobs in their order, so many side by side; a job that fails is told of and stops no other.

    Returns:
        0, or 1 if one failed.
    """
    failed = 0
    with ExitStack() as stack:
        waiting: Iterable[tuple[Job, Callable[[], None]]] = ((job, job.play) for job in jobs)
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            waiting = [(job, pool.submit(job.play).result) for job in jobs]
        for job, result in waiting:
            try:
                result()
            except Exception as error:
                failed += 1
                print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return int(failed > 0)


def rate_of(method: str, size: Size) -> list[str]:
    """The setting of the learning rate that was best for a method; empty where it keeps the config's."""
    if method in ("zero", "central"):
        return []
    base = method.partition("+")[0]
    source = base if base in size.chosen else "fltac-products"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in size.rates.glob(f"{source}-lr*.json")]
    if len(found) < len(size.tried):
        raise LookupError(
            f"{size.rates}: {len(found)} of {len(size.tried)} learning rates of {source} were tried; run `rates`"
        )
    best = max(found, key=lambda run: (run["mean_score"], -run["lr"]))
    return [f"training.lr={best['lr']}"]


def play(path: Path, size: Size, regime: str, method: str, seed: int, settings: list[str]) -> None:
    """Plays one run and writes its file, if it is not there.

    Args:
        path: Of the file.
        size: Of the comparison.
        regime: By name.
        method: By name.
        seed: Of the run.
        settings: What is added to the regime's, the size's and the method's.
    """
    if path.exists():
        return
    config = regime_config(regime, seed, [*size.settings, *settings_of(method, size), *settings])
    experiment = sharing(config)
    records, last = played(experiment, first_state(experiment), size.rows)
    config = experiment.config
    majority = {name: majority_score(task) for name, task in experiment.tasks.items()}
    device = experiment.model.backbone.device
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
        "truth": [holding.task for holding in sorted(experiment.holdings, key=lambda holding: holding.key)],
        "git": code_state(),
        "versions": versions(),
        "hardware": hardware(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        "config": config.model_dump(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    aris = [f"{item['clustering']['ari']:.2f}" for item in records if item["clustering"]]
    print(f"{path.name}: {last['mean_score']:.3f}", *aris, flush=True)


if __name__ == "__main__":
    sys.exit(main())
