"""Reads what runs have left in their directories: one result for each method, over one or several seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fltac.errors import InputError

SUMMARY = "summary.json"
ROUNDS = "rounds.jsonl"

ORDER = (
    *("zero", "local", "fedit", "fedit-heads", "random", "fltac-paper", "fltac"),
    *("oracle", "central-single", "central", "central-full"),
)
"""Methods in the order of the table's rows; others follow."""


@dataclass(frozen=True)
class SeedResult:
    """One run.

    Attributes:
        seed: Its seed; None where neither the files nor the folder's name say.
        method: Its method.
        rounds: Finished rounds.
        finished: False where there is no summary yet and the last evaluated round stands in.
        metrics: Task to metric.
        scores: Task to score, averaged over clients; without those that are not defined (null).
        worst_client: Task to the worst client's score.
        mean_score: Over tasks; None where a task's score is not defined.
        ari: Adjusted Rand index of the clustering against the true tasks; None where nothing is clustered.
        cluster_accuracy: Best-match accuracy of the same.
        up_bytes: Sent by all clients in all rounds.
        down_bytes: Sent to all clients in all rounds.
        majority: Task to the score of always answering the most frequent label; empty where not known.
    """

    seed: int | None
    method: str
    rounds: int
    finished: bool
    metrics: dict[str, str]
    scores: dict[str, float]
    worst_client: dict[str, float]
    mean_score: float | None
    ari: float | None
    cluster_accuracy: float | None
    up_bytes: int
    down_bytes: int
    majority: dict[str, float]


@dataclass(frozen=True)
class Result:
    """A row of the table: one method's runs that differ in nothing but the seed.

    Attributes:
        label: The method, with the folder's name where several rows have the same one.
        method: The method.
        runs: One for each seed, in the order of the seeds.
    """

    label: str
    method: str
    runs: tuple[SeedResult, ...]


def load_results(folders: Sequence[Path]) -> list[Result]:
    """Reads runs.

    Args:
        folders: Each a run directory, a folder of ``seed-<n>`` run directories, or a folder of either.

    Returns:
        One result for each run or folder of seeds, in the order of the table.

    Raises:
        InputError: a folder is missing, holds no run, or a run's files are damaged or have no scores yet.
    """
    found: list[tuple[Path, tuple[SeedResult, ...]]] = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected a run directory or a folder of seed-<n> runs")
        own = _runs_of(folder)
        groups = [own] if own else [runs for inner in _subfolders(folder) if (runs := _runs_of(inner))]
        if not groups:
            raise InputError(f"{folder}: holds no run: neither {SUMMARY} nor {ROUNDS}, nor seed-<n> folders with them")
        found += [(_common_folder(paths, folder), _read_all(paths)) for paths in groups]
    results = [Result(_label(path, runs[0].method, found), runs[0].method, runs) for path, runs in found]
    return sorted(results, key=lambda result: (_rank(result.method), result.label))


def _common_folder(runs: Sequence[Path], given: Path) -> Path:
    """What to call a row: the run as given, or the folder of its seeds."""
    return given if runs == [given] else runs[0].parent if runs[0].name.startswith("seed-") else runs[0]


def _label(path: Path, method: str, found: Sequence[tuple[Path, tuple[SeedResult, ...]]]) -> str:
    """The method; where several rows have the same, with as much of the folder as tells them apart."""
    same = [other for other, runs in found if runs[0].method == method]
    if len(same) == 1:
        return method
    names = [other.name for other in same]
    return f"{method} ({path.name if names.count(path.name) == 1 else path})"


def _rank(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _is_run(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / ROUNDS).is_file()


def _runs_of(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else its ``seed-<n>`` runs."""
    if _is_run(folder):
        return [folder]
    return [path for path in _subfolders(folder) if path.name.startswith("seed-") and _is_run(path)]


def _read_all(paths: Sequence[Path]) -> tuple[SeedResult, ...]:
    runs = [_read(path) for path in paths]
    methods = sorted({run.method for run in runs})
    if len(methods) > 1:
        raise InputError(f"{paths[0].parent}: its seeds are runs of different methods: {', '.join(methods)}")
    return tuple(sorted(runs, key=lambda run: -1 if run.seed is None else run.seed))


def _read(folder: Path) -> SeedResult:
    path = folder / SUMMARY
    finished = path.is_file()
    if finished:
        tree = _json(path.read_bytes(), path)
    else:
        path = folder / ROUNDS
        tree = _last_evaluated(path)
    try:
        tasks, clustering = tree["tasks"], tree["clustering"] or {}
        total = tree["bytes_total"]
        return SeedResult(
            seed=tree.get("seed", _seed_of_name(folder)),
            method=str(tree["method"]),
            rounds=int(tree["rounds"]),
            finished=finished,
            metrics={name: str(task["metric"]) for name, task in tasks.items()},
            scores=_numbers(tasks, "score"),
            worst_client=_numbers(tasks, "worst_client"),
            mean_score=None if tree["mean_score"] is None else float(tree["mean_score"]),
            ari=clustering.get("ari"),
            cluster_accuracy=clustering.get("accuracy"),
            up_bytes=int(total["up"]),
            down_bytes=int(total["down"]),
            majority=dict(tree.get("baselines", {}).get("majority", {})),
        )
    except KeyError as error:
        raise InputError(f"{path}: the key {error} is missing; not written by fltac?") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not laid out as expected ({error})") from error


def _numbers(tasks: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    return {name: float(task[key]) for name, task in tasks.items() if task[key] is not None}


def _seed_of_name(folder: Path) -> int | None:
    number = folder.name.removeprefix("seed-")
    return int(number) if number != folder.name and number.isdecimal() else None


def _last_evaluated(path: Path) -> dict[str, Any]:
    """What an unfinished run's records say, laid out as a summary; its config names the method."""
    records = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(_json(line, path))
        except InputError as error:
            if number < len(lines):  # the last line may be torn by a kill
                raise InputError(f"{path}: line {number} is not the record of a round") from error
    evaluated = [record for record in records if record.get("tasks")]
    if not evaluated:
        raise InputError(f"{path}: no round has been evaluated yet")
    try:
        total = {way: sum(record["bytes"][way] for record in records) for way in ("up", "down")}
        return {
            **evaluated[-1],
            "method": _stored_method(path.parent),
            "rounds": evaluated[-1]["round"],
            "bytes_total": total,
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a record has no {error}") from error


def _stored_method(folder: Path) -> str:
    path = folder / "config.yaml"
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("method:"):
                return line.removeprefix("method:").strip().strip("'\"")
    raise InputError(f"{folder}: has neither {SUMMARY} nor a config.yaml with a method")


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree
