"""Writes the lab's tables from the committed recordings and films: ``results/clustering/lab.md``.

    python benchmarks/clustering/report.py

Rules on first-round uploads, what a supervised classifier reaches there, how many clusters are chosen, and ARI over the
rounds of the filmed runs. Takes minutes on one core; trains nothing.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
from accumulate import HYSTERESES, WAYS, kept, replayed
from film import FILMS
from numpy.typing import NDArray
from profiles import FILMED, WEIGHT, WEIGHTS
from profiles import OUT as PROFILES
from record import FOLDER
from recording import Gram, Recording, load_all
from replay import setting_of, table
from rules import KERNELS, RULES, by_matrix, cosine
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from fltac.runtime.atomic import write_atomic
from fltac.server.choosing import choose_k
from fltac.server.similarity import leading

OUT = FOLDER.parent / "lab.md"
QUICKSTART = OUT.parents[1] / "quickstart-20"
STARTS = 20
CLEAR = 0.05
"""Points of the score that a slot has to be above the majority class to have clearly learned something."""
RIDGE = 0.5
"""Of the classifier, on a kernel whose diagonal is 2."""


def ceiling(recording: Recording) -> float:
    """ARI of a classifier that is told the tasks of all other clients' slots, with cannot-link on its answers.

    Kernel ridge regression on the default kernel, one client left out at a time.
    """
    kernel, clients = KERNELS["by-matrix+head"](recording), np.asarray(recording.clients)
    classes = np.eye(int(recording.truth.max()) + 1)[recording.truth]
    found = np.empty(len(clients), dtype=int)
    for client in np.unique(clients):
        held, rest = np.flatnonzero(clients == client), np.flatnonzero(clients != client)
        mean = classes[rest].mean(axis=0)
        dual = np.linalg.solve(kernel[np.ix_(rest, rest)] + RIDGE * np.eye(len(rest)), classes[rest] - mean)
        rows, columns = linear_sum_assignment(-(kernel[np.ix_(held, rest)] @ dual))
        found[held[rows]] = columns
    return float(adjusted_rand_score(recording.truth, found))


def chosen(recording: Recording, linked: bool) -> int:
    """K as ``server.clustering.k: auto`` chooses it, from exact products."""
    products, head = recording.grams["product"], cosine(recording.grams["head"].sum(0))
    first, second = by_matrix(products[0::2]), by_matrix(products[1::2])
    pairs: list[tuple[Gram, Gram]] = [(first + head, second), (second + head, first), ((first + second) / 2, head)]
    views = [(partial(leading, by), within) for by, within in pairs]
    return choose_k(views, list(recording.clients) if linked else None, 5, 0).k


def uploads_table(recordings: Sequence[Recording]) -> list[str]:
    """What each recording's adapters have learned, and how those that learned something are grouped."""
    columns = ("recording", "slots", "tasks", "ceiling", "K", "K without cannot-link", "ARI", "above majority",
               "their ARI", f"above by {CLEAR}", "their ARI")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for recording in recordings:
        cells = (
            f"{setting_of(recording)}, seed {recording.facts['seed']}",
            len(recording.truth),
            len(set(recording.truth.tolist())),
            f"{ceiling(recording):.2f}",
            chosen(recording, True),
            chosen(recording, False),
            *by_what_was_learned(recording),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def by_what_was_learned(recording: Recording) -> list[str]:
    """ARI of all slots under the default rule; of those above the majority class, and of those clearly above, how many
    they are, of how many tasks, and their ARI in the same grouping. ARIs are means over the draws."""
    k = len(set(recording.truth.tolist()))
    draws = [RULES["default"](recording, k, start) for start in range(STARTS)]

    def ari(own: NDArray[np.bool_]) -> str:
        return f"{np.mean([adjusted_rand_score(recording.truth[own], labels[own]) for labels in draws]):.2f}"

    out = [ari(np.ones(len(recording.truth), dtype=np.bool_))]
    if np.isnan(recording.scores).any():
        return [*out, "", "", "", ""]
    for margin in (0.0, CLEAR):
        own = recording.scores > recording.majority + margin
        tasks = len(set(recording.truth[own].tolist()))
        # With slots of one task only there is nothing to tell apart.
        out += [f"{own.sum()} of {tasks} tasks", ari(own) if tasks > 1 else ""]
    return out


def profile_tables() -> list[str]:
    """Profiles alone by regime, rows and noise, and beside the adapters of each recording."""
    if not PROFILES.exists():
        return []
    found = json.loads(PROFILES.read_text(encoding="utf-8"))["results"]
    settings = sorted({(item["rows"], item["noise"]) for item in found})
    header = " | ".join(f"{rows} rows, noise {noise:g}" for rows, noise in settings)
    lines = ["", "## Profiles alone: ARI, mean and least over the seeds", ""]
    lines += [f"| regime (seeds) | {header} |", "|---" * (len(settings) + 1) + "|"]
    for regime in sorted({item["regime"] for item in found}):
        own = [item for item in found if item["regime"] == regime]
        cells = []
        for setting in settings:
            aris = [item["ari"] for item in own if (item["rows"], item["noise"]) == setting]
            cells.append(f"{np.mean(aris):.2f} ({min(aris):.2f})")
        lines.append(f"| {regime} ({len({item['seed'] for item in own})}) | {' | '.join(cells)} |")
    lines += ["", f"## Profiles beside adapters, with weight {WEIGHT:g}: ARI in the first round", ""]
    lines += [f"| recording | {header} |", "|---" * (len(settings) + 1) + "|"]
    for name in sorted({name for item in found for name in item["beside"]}):
        by_setting = {(i["rows"], i["noise"]): i["beside"][name] for i in found if name in i["beside"]}
        lines.append(f"| {name} | {' | '.join(f'{by_setting[setting]:.2f}' for setting in settings)} |")
    rows, noise = FILMED
    lines += ["", f"## Profiles of {rows} rows, noise {noise:g}, beside the films: ARI by round, for each weight", ""]
    lines += [f"| film | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} |", "|---" * (len(WEIGHTS) + 1) + "|"]
    for name, by_weight in sorted((name, own) for item in found for name, own in item.get("films", {}).items()):
        cells = [" ".join(f"{ari:.2f}" for ari in by_weight[f"{weight:g}"]) for weight in WEIGHTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def quickstart_table() -> list[str]:
    """The quickstart's runs on many seeds: how many have each task in a cluster of its own after the last round."""
    lines = ["", "## Quickstart on many seeds", "", "| runs | seeds | ARI 1.00 | least ARI | K found | mean score |"]
    lines.append("|---" * 6 + "|")
    for folder in sorted(path for path in QUICKSTART.iterdir() if path.is_dir()):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*/summary.json"))]
        aris = [run["clustering"]["ari"] for run in runs]
        found = " ".join(
            f"{k}: {count}" for k, count in sorted(Counter(run["clustering"]["k"] for run in runs).items())
        )
        scores = [run["mean_score"] for run in runs]
        right = sum(ari > 1 - 1e-9 for ari in aris)
        spread = f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"
        lines.append(f"| {folder.name} | {len(runs)} | {right} | {min(aris):.2f} | {found} | {spread} |")
    return lines


def main() -> int:
    recordings = load_all(FOLDER)
    lines = [
        "# The clustering lab",
        "",
        "Written by `benchmarks/clustering/report.py` from the files beside it; do not edit.",
        "",
        f"## First-round uploads: ARI, K given, mean and spread over the training seeds, {STARTS} draws each",
        "",
        *table(recordings, list(RULES), STARTS),
        "",
        "## What is in the uploads",
        "",
        "Ceiling: ARI of a classifier that is told the tasks of all other clients. K: as `k: auto` chooses it, with "
        "cannot-link and without. ARI: of the default rule, K given. Above majority: the slots whose upload scores "
        "above its task's most frequent class, where scores were taken, and of how many tasks they are; their ARI: of "
        "these slots alone, in the same grouping of all.",
        "",
        *uploads_table(recordings),
    ]
    lines += [
        "",
        "## Whole runs",
        "",
        "| film | ARI by round | mean score at the end | rows of a task |",
        "|---|---|---|---|",
    ]
    for path in sorted(FILMS.glob("*.json")):
        film = json.loads(path.read_text(encoding="utf-8"))
        aris = " ".join(f"{number['clustering']['ari']:.2f}" for number in film["rounds"])
        rows = max(task["n_eval"] for task in film["tasks"].values())
        lines.append(f"| {path.stem} | {aris} | {film['mean_score']:.3f} | {rows} |")
    lines += ["", "## Ways to put rounds together, replayed on these films: ARI by round", ""]
    lines += [f"| film | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for path in sorted(FILMS.glob("*.json")):
        film = json.loads(path.read_text(encoding="utf-8"))
        ways = replayed(path.with_suffix(".safetensors"), len(film["rounds"]))
        cells = [" ".join(f"{ari:.2f}" for ari in ways[way]) for way in WAYS]
        lines.append(f"| {path.stem} | {' | '.join(cells)} |")
    lines += ["", "## Hysteresis, replayed on these films: ARI by round (slots that changed their group, in all)", ""]
    lines += [f"| film | {' | '.join(f'{share:g}' for share in HYSTERESES)} |", "|---" * (len(HYSTERESES) + 1) + "|"]
    for path in sorted(FILMS.glob("*.json")):
        film = json.loads(path.read_text(encoding="utf-8"))
        runs = [kept(path.with_suffix(".safetensors"), len(film["rounds"]), share) for share in HYSTERESES]
        cells = [f"{' '.join(f'{ari:.2f}' for ari in aris)} ({moved})" for aris, moved in runs]
        lines.append(f"| {path.stem} | {' | '.join(cells)} |")
    lines += profile_tables()
    lines += quickstart_table()
    write_atomic(OUT, ("\n".join(lines) + "\n").encode())
    print(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
