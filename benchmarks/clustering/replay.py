"""Replays clustering rules on recordings and keeps how well they group: ``results/clustering/replays.json``.

    python benchmarks/clustering/replay.py
    python benchmarks/clustering/replay.py --recordings 'I-rank1-*-tau50' --rules paper products --again

Trains nothing. A rule that was replayed on a recording is not replayed there again, unless its definition in
``rules.py`` has changed or ``--again`` asks for it (after a change of the package or of a kernel).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before numpy: a replay is many small products, and several run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from record import FOLDER
from recording import Recording
from rules import RULES
from sklearn.metrics import adjusted_rand_score
from uploads import described

from fltac.evaluation import best_match_accuracy
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, versions

OUT = FOLDER.parent / "replays.json"
DRAWS = 5
"""Of each rule on each recording; a draw of K-means is the best of 20 starts."""

Found = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", default="*", help="pattern of their names")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--again", action="store_true", help="replay what was replayed before")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    found = load()
    paths = sorted(FOLDER.glob(f"{args.recordings}.safetensors"))
    jobs = []
    for path in paths:
        known = found.get(path.stem, {}).get("rules", {})
        rules = [rule for rule in args.rules if args.again or known.get(rule, {}).get("rule") != repr(RULES[rule])]
        if rules:
            # What is said of the uploads follows from this rule.
            jobs.append((path, rules, "changes of A" in rules or "uploads" not in found.get(path.stem, {})))
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for (path, rules, _), result in zip(jobs, pool.map(replayed, *zip(*jobs, strict=True)), strict=True):
            own = found.setdefault(path.stem, {"rules": {}})
            own |= {name: value for name, value in result.items() if name != "rules"}
            known = own["rules"] | result["rules"]
            own["rules"] = {rule: known[rule] for rule in RULES if rule in known}
            print(path.stem, f"{len(rules)} rules", file=sys.stderr, flush=True)
            save(found)
    for path in paths:
        own = found[path.stem]["rules"]
        cells = [f"{rule} {own[rule]['ari']:.2f}" for rule in args.rules if rule in own]
        print(f"{path.stem}: {', '.join(cells)}")
    return 0


def replayed(path: Path, rules: Sequence[str], describe: bool) -> Found:
    """The facts of a recording and what rules find on it.

    Args:
        path: Of the recording.
        rules: By name.
        describe: Also say what is in the uploads.
    """
    recording = Recording.load(path)
    truth = recording.truth.tolist()
    k, out = len(set(truth)), {}
    for name in rules:
        if recording.facts["rank"] > 1 and "a_row" not in recording.grams and "rows of A" in name:
            continue  # Recorded before these were kept.
        labels = [RULES[name](recording, k, start).tolist() for start in range(DRAWS)]
        aris = [adjusted_rand_score(truth, own) for own in labels]
        out[name] = {
            "rule": repr(RULES[name]),
            "ari": round(float(np.mean(aris)), 4),
            "ari_least": round(float(np.min(aris)), 4),
            "accuracy": round(float(np.mean([best_match_accuracy(truth, own) for own in labels])), 4),
        }
    facts = {name: recording.facts[name] for name in ("regime", "rank", "loss", "seed", "tau")}
    return {**facts, **({"uploads": described(recording, DRAWS)} if describe else {}), "rules": out}


def load() -> dict[str, Found]:
    """What was replayed before, by recording."""
    return json.loads(OUT.read_text(encoding="utf-8"))["recordings"] if OUT.exists() else {}


def save(found: dict[str, Found]) -> None:
    """Writes all that was replayed."""
    record = {"git": code_state(), "versions": versions(), "draws": DRAWS, "recordings": dict(sorted(found.items()))}
    write_atomic(OUT, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
