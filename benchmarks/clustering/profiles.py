"""How well profiles tell tasks apart, alone, beside recorded first-round adapters and beside films. Trains nothing.

    python benchmarks/clustering/profiles.py I II III IV V --seeds 0 1 2 3 4

Needs FLTAC_DATA (but for regime V). Writes ``results/clustering/profiles.json``; what is there already stays.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accumulate import compared_after
from film import FILMS
from kernels import KERNELS, cosine
from numpy.typing import NDArray
from record import FOLDER
from recording import Recording, load_all
from regimes import REGIMES, regime_config
from sklearn.metrics import adjusted_rand_score

from fltac.client.profile import profiles_of
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, versions
from fltac.runtime.setup import Experiment, prepare, resolved
from fltac.server.clustering import group
from fltac.server.grouping import EXTRA_OF_A
from fltac.server.spectrum import leading

OUT = FOLDER.parent / "profiles.json"
ROWS = (16, 64, 256)
NOISES = (0.0, 0.01, 0.02)
WEIGHT = 8.0
"""Of profiles beside adapters, as ``server.clustering.profile_weight`` has it."""
WEIGHTS = (2.0, 4.0, WEIGHT, 16.0)
"""That are compared beside what was learned over the rounds of a film, with profiles of ``FILMED``."""
FILMED = (64, 0.01)
DRAWS = 5
"""Of the noise and of K-means' starts."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regimes", nargs="+", choices=list(REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(OUT.read_text(encoding="utf-8"))["results"] if OUT.exists() else []
    for seed in args.seeds:
        for regime in args.regimes:
            if any((item["regime"], item["seed"]) == (regime, seed) for item in done):
                continue
            found = measure(regime, seed)
            done = sorted([*done, *found], key=lambda item: (item["regime"], item["seed"], item["rows"], item["noise"]))
            record = {"git": code_state(), "versions": versions(), "results": done}
            write_atomic(OUT, (json.dumps(record, indent=1) + "\n").encode())
            print(regime, seed, [(item["rows"], item["noise"], round(item["ari"], 2)) for item in found], flush=True)
    return 0


def measure(regime: str, seed: int) -> list[dict[str, Any]]:
    """ARI for each number of rows and each noise, and beside the recordings that there are of this regime and seed."""
    experiment = resolved(prepare(regime_config(regime, seed, [f"server.clustering.profile_rows={ROWS[0]}"])))
    tasks = {holding.key: holding.task for holding in experiment.holdings}
    keys = sorted(tasks)
    names = list(experiment.tasks)
    truth = np.array([names.index(tasks[key]) for key in keys])
    owners = [client for client, _ in keys]
    recordings = load_all(FOLDER, f"{regime}-rank1*-seed{seed}-*")
    films = sorted(FILMS.glob(f"{regime}-*-seed{seed}-*.safetensors"))
    out = []
    for rows in ROWS:
        points = profiles(experiment, rows, keys)
        for noise in NOISES:
            found: dict[str, list[float]] = {}
            for draw in range(DRAWS):
                similar = cosine_of_centred(noised(points, noise, seed, draw))
                kernels = {"": similar} | {
                    recording.name: KERNELS["by-matrix+head"](recording) + WEIGHT * similar for recording in recordings
                }
                for name, kernel in kernels.items():
                    labels = group(leading(kernel, len(names)), len(names), owners, 10, draw)
                    found.setdefault(name, []).append(float(adjusted_rand_score(truth, labels)))
            out.append(
                {
                    "regime": regime,
                    "seed": seed,
                    "rows": rows,
                    "noise": noise,
                    "ari": float(np.mean(found.pop(""))),
                    "beside": {name: float(np.mean(values)) for name, values in found.items()},
                    "films": {path.stem: by_weight(path, points, noise, seed) for path in films}
                    if (rows, noise) == FILMED
                    else {},
                }
            )
    return out


def by_weight(path: Path, points: NDArray[np.float64], noise: float, seed: int) -> dict[str, list[float]]:
    """ARI by round beside what a film's slots had learned until then, for each weight."""
    film = Recording.load(path)
    rounds, n = int(film.facts["rounds"]), len(points)
    truth, owners = film.truth[:n], film.clients[:n]
    k = len(set(truth.tolist()))
    found: dict[str, list[float]] = {f"{weight:g}": [] for weight in WEIGHTS}
    for upto in range(1, rounds + 1):
        learned = compared_after(film, rounds, upto)
        for weight in WEIGHTS:
            aris = []
            for draw in range(DRAWS):
                similar = cosine_of_centred(noised(points, noise, seed, draw))
                points_beside = leading(learned + weight * similar, k + EXTRA_OF_A * ("a" in film.grams))
                labels = group(points_beside, k, owners, 10, draw)
                aris.append(adjusted_rand_score(truth, labels))
            found[f"{weight:g}"].append(float(np.mean(aris)))
    return found


def noised(points: NDArray[np.float64], noise: float, seed: int, draw: int) -> NDArray[np.float64]:
    """Profiles as clients send them."""
    return np.asarray(points + np.random.default_rng([seed, draw]).normal(0.0, noise, points.shape))


def profiles(experiment: Experiment, rows: int, keys: list[tuple[str, int]]) -> NDArray[np.float64]:
    """``[slots, hidden]`` without noise."""
    config = experiment.config
    clustering = config.server.clustering.model_copy(update={"profile_rows": rows})
    config = config.model_copy(update={"server": config.server.model_copy(update={"clustering": clustering})})
    found = {name: profiles_of(experiment.model, client, config, 0) for name, client in experiment.clients.items()}
    return np.stack([found[client][slot] for client, slot in keys]).astype(np.float64)


def cosine_of_centred(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """As ``server.similarity`` compares profiles."""
    centred = points - points.mean(axis=0)
    return cosine(centred @ centred.T)


if __name__ == "__main__":
    sys.exit(main())
