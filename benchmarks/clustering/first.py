"""How right slots are grouped by what they say at first: plays first rounds alone, of many seeds and regimes.

    python benchmarks/clustering/first.py I II III --seeds 0 1 2 --size full --steps 5
    python benchmarks/clustering/first.py VI --seeds 3 4 5 --size own --steps 15
    python benchmarks/clustering/first.py

Of each: the ARI of groups found by the gradients and by what the first trainings changed, how far halves of either
agree, and by which the server groups. With few steps (``--steps``, of the trainings; the gradients' batches are the
default's) it says little of the changes, and takes little time. ``--size own`` is the regime's config as it is. What is
there is not played again. Without a regime it only writes ``results/clustering/first.md`` from the files in ``first/``.
Needs FLTAC_DATA, but for V.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import rate_of
from film import first_state, played, sharing
from methods import SIZES
from record import FOLDER
from regimes import REGIMES, regime_config
from sklearn.metrics import adjusted_rand_score

from fltac.records import ServerState
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, hardware, versions
from fltac.server.agreement import agreement
from fltac.server.clustering import group
from fltac.server.gradients import gathered
from fltac.server.grouping import EXTRA_OF_A, SHARPNESS_OF_A, Evidence
from fltac.server.rules import group_slots
from fltac.server.spectrum import embedding

OUT = FOLDER.parent / "first"
PAGE = FOLDER.parent / "first.md"
DRAWS = 5
OWN = "own"
CHOSEN = frozenset({0, 1, 2, 8, 9})
"""Seeds by which batches, directions and the rule between the two kinds were chosen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regimes", nargs="*", choices=[*REGIMES, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--size", choices=[*SIZES, OWN], default="small")
    parser.add_argument("--steps", type=int, default=50, help="of the first training")
    args = parser.parse_args()
    for regime in args.regimes:
        for seed in args.seeds:
            path = OUT / f"{regime}-{args.size}-tau{args.steps}-seed{seed}.json"
            if not path.exists():
                play(path, regime, args.size, args.steps, seed)
    write_atomic(PAGE, ("\n".join(page()) + "\n").encode())
    return 0


def play(path: Path, regime: str, size: str, steps: int, seed: int) -> None:
    """Plays one first round and writes its file."""
    common = [] if size == OWN else [*SIZES[size].settings, *rate_of("fltac", SIZES[size])]
    settings = [*common, "server.clustering.features=gradients", "federation.rounds=1", f"training.steps={steps}"]
    experiment = sharing(regime_config(regime, seed, settings))
    states, device = list[ServerState](), experiment.model.backbone.device
    records, _ = played(experiment, first_state(experiment), 1, lambda state, _: states.append(state))
    (state,), config = states, experiment.config
    tasks = {holding.key: holding.task for holding in experiment.holdings}
    known = gathered(state, [], {}, config.server_settings.seed)
    owners = [client for client, _ in known.changes.keys]
    k, found = len(experiment.tasks), {}
    for kind, changes in {"gradients": known.gradients, "changes": known.changes}.items():
        points = embedding(changes, True, k + EXTRA_OF_A, seed, 1.0, SHARPNESS_OF_A)
        truth = [tasks[key] for key in changes.keys]
        aris = [adjusted_rand_score(truth, group(points, k, owners, 20, draw)) for draw in range(DRAWS)]
        agreed = agreement(changes, True, k, EXTRA_OF_A, seed, 1.0, SHARPNESS_OF_A, True)
        found[kind] = {"ari": float(np.mean(aris)), "agreement": agreed}
    settings_of_server = replace(config.server_settings, k=None)  # as with server.clustering.k=auto
    evidence = Evidence(replace(state, clusters=()), 1, [], {}, known, None)
    auto = group_slots(evidence, settings_of_server).labels
    keys = sorted(auto)
    truth = [tasks[key] for key in keys]
    record: dict[str, Any] = {
        "regime": regime,
        "size": size,
        "steps": steps,
        "seed": seed,
        "slots": len(tasks),
        **found,
        "grouped": {"ari": records[0]["clustering"]["ari"], "agreement": records[0]["agreement"]},
        "auto": {"k": len(set(auto.values())), "ari": adjusted_rand_score(truth, [auto[key] for key in keys])},
        "git": code_state(),
        "versions": versions(),
        "hardware": hardware(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        "config": config.model_dump(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    print(path.name, *(f"{kind} {own['ari']:.2f} ({own['agreement']:.2f})" for kind, own in found.items()), flush=True)


def page() -> list[str]:
    """The lines of the table: a row for each regime, size and number of steps."""
    lines = [
        "# Grouped by what slots say at first",
        "",
        "Written by `benchmarks/clustering/first.py` from the files in `first/`; do not edit. First rounds alone, K "
        "given. ARI by the gradients (20 batches, three directions) and by what A and the head changed in the first "
        "training, each with how far halves of the adapted matrices agree; and what the server grouped by the one "
        "that agrees more, also with K chosen by the server (how often which). Small: LoRA in two of six layers, "
        "batches of 4; full: in all, 8; digits: the quickstart's; own: as the regime's config says. In brackets the "
        "least. Chosen: by seeds 0, 1, 2, 8 and 9 the batches, the directions and the rule between the two were "
        "chosen; others are kept for the end, but that `auto` compares gradients where nothing has a head was "
        "decided when all of VII had been seen.",
        "",
        "| regime | size | steps | seeds | gradients: ARI | agreement | changes: ARI | agreement | grouped: ARI | "
        "K by the server | ARI |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str, int, bool], list[dict[str, Any]]] = {}
    for path in sorted(OUT.glob("*.json")):
        own = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault((own["regime"], own["size"], own["steps"], own["seed"] in CHOSEN), []).append(own)
    for (regime, size, steps, chosen), runs in sorted(rows.items()):
        seeds = " ".join(str(seed) for seed in sorted(run["seed"] for run in runs)) + (" (chosen)" if chosen else "")
        cells = [spread([run[kind][what] for run in runs]) for kind in ("gradients", "changes") for what in WHAT]
        grouped = spread([run["grouped"]["ari"] for run in runs])
        chosen_k = Counter(run["auto"]["k"] for run in runs)
        ks = ", ".join(f"{k} ({times})" for k, times in sorted(chosen_k.items()))
        auto = spread([run["auto"]["ari"] for run in runs])
        lines.append(f"| {regime} | {size} | {steps} | {seeds} | {' | '.join(cells)} | {grouped} | {ks} | {auto} |")
    return lines


WHAT = ("ari", "agreement")


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
