"""The tables of whole runs: what they came to, and ways to put their rounds together, replayed."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from accumulate import HYSTERESES, WAYS, WAYS_OF_A, Joined, kept, replayed, ways_of
from film import FILMS
from recording import Recording


def film_tables() -> list[str]:
    """Lines for all films, sorted by name."""
    films = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FILMS.glob("*.json"))}
    lines = [
        "",
        "## Whole runs",
        "",
        "`fltac`: runs that compared products; `fltac-a`: changes of A, summed; `fltac-moments`: second moments of "
        "changes of A, K eigenvectors; `fltac-moments+2`: K + 2, the default. `small`: LoRA in two of six layers and "
        "batches of 4, as in the small comparison.",
        "",
        "| film | ARI by round | mean score at the end | rows of a task |",
        "|---|---|---|---|",
    ]
    for path, film in films.items():
        aris = by_round([number["clustering"]["ari"] for number in film["rounds"]])
        rows = max(task["n_eval"] for task in film["tasks"].values())
        lines.append(f"| {path.stem} | {aris} | {film['mean_score']:.3f} | {rows} |")
    lines += ["", "## Ways to put rounds together, replayed on these films: ARI by round", ""]
    lines += [
        "After the first round exact for the way that was played alone (of `fltac` and `fltac-a` the sum, of "
        "`fltac-moments` three directions, with `+2` the last), an indication for the others."
    ]
    for ways, about in ((WAYS, "products"), (WAYS_OF_A, "changes of A, without their sign")):
        own = {path: film for path, film in films.items() if ways_of(Recording.load(tensors(path))) is ways}
        lines += ["", f"Of {about}:", "", *ways_table(own, ways)]
    lines += ["", "## Hysteresis, replayed on these films: ARI by round (slots that changed their group, in all)", ""]
    lines += [f"| film | {' | '.join(f'{share:g}' for share in HYSTERESES)} |", "|---" * (len(HYSTERESES) + 1) + "|"]
    for path, film in films.items():
        runs = [kept(tensors(path), len(film["rounds"]), share) for share in HYSTERESES]
        lines.append(f"| {path.stem} | {' | '.join(f'{by_round(aris)} ({moved})' for aris, moved in runs)} |")
    return lines


def ways_table(films: dict[Path, dict[str, Any]], ways: dict[str, Joined]) -> list[str]:
    """One row for each film, and the means of all films whose names differ in their seed alone."""
    lines = [f"| film | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    means: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for path, film in films.items():
        found = replayed(tensors(path), len(film["rounds"]))
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
