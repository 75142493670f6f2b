"""The tables of whole runs: what they came to, and ways to put their rounds together, replayed."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from accumulate import HYSTERESES, WAYS, WAYS_OF_A, Joined, kept, kernel_after, replayed, ways_of
from film import FILMS
from recording import Recording
from uploads import ceiling


def film_tables() -> list[str]:
    """Lines for all films, sorted by name."""
    films = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FILMS.glob("*.json"))}
    lines = [
        "",
        "## Whole runs",
        "",
        "`fltac`: runs that compared products; `fltac-a`: changes of A, summed; `fltac-moments`: second moments of "
        "changes of A, K eigenvectors; `fltac-moments+2`: K + 2; all without the dual softmax. `fltac-single`: one "
        "cluster for all in each round, so that all slots always begin alike; `fltac-own`: each slot went on from its "
        "own upload until the third round; `fltac-first`: grouped at once, with the dual softmax, each slot's first "
        "round compared with all rounds of the others (a trial, reverted); `fltac-probes`: one round, and in place of "
        "rounds in the tables below short trainings from v0, of so many steps each (a setting since removed). `small`: "
        "LoRA in two of six layers and batches of 4, as in the small comparison.",
        "",
        "| film | ARI by round | mean score at the end | rows of a task |",
        "|---|---|---|---|",
    ]
    for path, film in films.items():
        aris = by_round([number["clustering"]["ari"] for number in film["rounds"] if number["clustering"]])
        rows = max(task["n_eval"] for task in film["tasks"].values())
        lines.append(f"| {path.stem} | {aris} | {film['mean_score']:.3f} | {rows} |")
    lines += ["", "## Ways to put rounds together, replayed on these films: ARI by round", ""]
    lines += [
        "After the first round exact for the way that was played alone (of `fltac` and `fltac-a` the sum, of "
        "`fltac-moments` three directions, with `+2` the same with K + 2), an indication for the others. Of "
        "`fltac-single` all are exact for what is grouped after so many rounds in which all were together."
    ]
    for ways, about in ((WAYS, "products"), (WAYS_OF_A, "changes of A, without their sign")):
        own = {path: film for path, film in films.items() if ways_of(Recording.load(tensors(path))) is ways}
        lines += ["", f"Of {about}:", "", *ways_table(own, ways)]
    lines += ["", "## What is in these films", ""]
    lines += [
        "ARI by round of a classifier that is told the tasks of all other clients' slots, on changes of A "
        "(before the dual softmax, which it does not need).",
        "",
        *ceilings(films),
    ]
    lines += ["", "## Hysteresis, replayed on these films: ARI by round (slots that changed their group, in all)", ""]
    lines += [f"| film | {' | '.join(f'{share:g}' for share in HYSTERESES)} |", "|---" * (len(HYSTERESES) + 1) + "|"]
    for path, film in films.items():
        if film["film"]["rounds"] > len(film["rounds"]):
            continue  # of probes, after which slots are grouped once
        runs = [kept(tensors(path), film["film"]["rounds"], share) for share in HYSTERESES]
        lines.append(f"| {path.stem} | {' | '.join(f'{by_round(aris)} ({moved})' for aris, moved in runs)} |")
    return lines


def ceilings(films: dict[Path, dict[str, Any]]) -> list[str]:
    """A row for each film of changes of A, and the mean of those whose names differ in their seed alone."""
    lines, groups = ["| film | ARI |", "|---|---|"], defaultdict(list)
    for path in films:
        film, rounds = Recording.load(tensors(path)), films[path]["film"]["rounds"]
        if "a" not in film.grams:
            continue
        n = len(film.truth) // rounds
        kernels = [kernel_after(film, rounds, upto) for upto in range(1, rounds + 1)]
        aris = [ceiling(kernel, film.truth[:n], film.clients[:n]) for kernel in kernels]
        lines.append(f"| {path.stem} | {by_round(aris)} |")
        groups[f"{path.stem.partition('-seed')[0]}, {rounds} rounds"].append(aris)
    means = [(name, own) for name, own in groups.items() if len(own) > 1]
    return lines + [f"| mean of {len(own)} {name} | {by_round(np.mean(own, axis=0).tolist())} |" for name, own in means]


def ways_table(films: dict[Path, dict[str, Any]], ways: dict[str, Joined]) -> list[str]:
    """One row for each film, and the means of all films whose names differ in their seed alone."""
    lines = [f"| film | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    means: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for path, film in films.items():
        found = replayed(tensors(path), film["film"]["rounds"])
        lines.append(f"| {path.stem} | {' | '.join(by_round(found[way]) for way in ways)} |")
        for way, aris in found.items():
            means[f"{path.stem.partition('-seed')[0]}, {len(aris)} rounds"][way].append(aris)
    for name, by_way in means.items():
        own = [np.mean(by_way[way], axis=0) for way in ways]
        if len(by_way[next(iter(ways))]) > 1:
            cells = [f"{by_round(aris.tolist())}" for aris in own]
            lines.append(f"| mean of {len(by_way[next(iter(ways))])} {name} | {' | '.join(cells)} |")
    return lines


def by_round(aris: list[float]) -> str:
    return " ".join(f"{ari:.2f}" for ari in aris)


def tensors(path: Path) -> Path:
    return path.with_suffix(".safetensors")
