"""The folder that holds a run: config, manifest, one line per round, summary; files replaced atomically.

``config.yaml`` is written last of what :func:`create` writes, so a folder that has it is a run to resume, and
a folder where a creation was killed before that may be used again.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fltac.config import Config, load_config, to_yaml
from fltac.errors import InputError
from fltac.runtime import provenance
from fltac.runtime.atomic import TEMPORARY, to_json, write_atomic

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
ROUNDS = "rounds.jsonl"
SUMMARY = "summary.json"
LANES = "lanes.json"
EVALUATION = "evaluation.json"
GENERATIONS = "generations.jsonl"
VERDICTS = "verdicts.jsonl"
FEDERATION = "federation.json"
"""There in the directory of a federation's run: how to start it again."""
PLAN_KEYS = ("lanes", "tokens", "workers")


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder.

    Attributes:
        path: The folder, as given.
        config: The stored configuration.
    """

    path: Path
    config: Config

    def append_round(self, record: Mapping[str, object]) -> None:
        """Adds one line to ``rounds.jsonl`` and waits until it is on the disk."""
        line = to_json(record) + "\n"
        with (self.path / ROUNDS).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def rounds(self) -> list[dict[str, Any]]:
        """The records so far, in order; a last line torn by a kill is left out.

        Raises:
            InputError: another line is not a record.
        """
        path = self.path / ROUNDS
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        while lines and not lines[-1].strip():
            lines.pop()
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or type(record.get("round")) is not int:
                    raise ValueError
            except ValueError as error:
                if number == len(lines):
                    break
                raise InputError(f"{path}: line {number} is not the record of a round") from error
            records.append(record)
        return records

    def cut_rounds(self, round_number: int) -> None:
        """Drops the records after a round, as a checkpoint of that round needs it.

        Raises:
            InputError: a record up to that round is missing.
        """
        records = [record for record in self.rounds() if record["round"] <= round_number]
        there = {record["round"] for record in records}
        for expected in range(1, round_number + 1):
            if expected not in there:
                raise InputError(
                    f"{self.path / ROUNDS}: the record of round {expected} is missing, but there is a "
                    f"checkpoint of round {round_number}"
                )
        write_atomic(self.path / ROUNDS, "".join(to_json(record) + "\n" for record in records).encode())

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Replaces ``summary.json``."""
        write_atomic(self.path / SUMMARY, (to_json(summary, indent=2) + "\n").encode())

    def summary(self) -> dict[str, Any] | None:
        """What ``summary.json`` holds; None where there is none. Raises InputError where it is damaged."""
        summary = _read_json(self.path / SUMMARY)
        if summary is not None and not {"method", "rounds", "tasks", "mean_score"} <= summary.keys():
            raise InputError(f"{self.path / SUMMARY}: damaged: it lacks the scores of a run")
        return summary

    def write_evaluation(self, record: Mapping[str, object]) -> None:
        """Replaces ``evaluation.json``, the scores of an evaluation apart from the run's own."""
        write_atomic(self.path / EVALUATION, (to_json(record, indent=2) + "\n").encode())

    def evaluation(self) -> dict[str, Any] | None:
        """What ``evaluation.json`` holds; None where there is none. Raises InputError where it is damaged."""
        return _read_json(self.path / EVALUATION)

    def write_generations(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Replaces ``generations.jsonl``."""
        write_atomic(self.path / GENERATIONS, "".join(to_json(line) + "\n" for line in lines).encode())

    def generations(self) -> list[dict[str, Any]]:
        """What ``generations.jsonl`` holds. Raises InputError where it is missing or damaged."""
        path = self.path / GENERATIONS
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
        if not all(isinstance(line, dict) for line in lines):
            raise InputError(f"{path}: a line is no JSON object")
        return lines

    def write_lanes(self, plan: Mapping[str, object]) -> None:
        """Stores the lane plan, which is fixed for the whole run since it changes rounding."""
        write_atomic(self.path / LANES, (to_json(plan, indent=2) + "\n").encode())

    def lanes(self) -> dict[str, int] | None:
        """The stored lane plan; None where there is none yet. Raises InputError where it is damaged."""
        plan = _read_json(self.path / LANES)
        if plan is not None:
            plan = {"workers": 1, **plan}  # a run from before there were several
        if plan is not None and not all(type(plan.get(key)) is int and plan[key] >= 1 for key in PLAN_KEYS):
            keys = " and ".join(PLAN_KEYS)
            raise InputError(f"{self.path / LANES}: got {plan}; expected whole numbers from 1 for {keys}")
        return None if plan is None else {key: plan[key] for key in PLAN_KEYS}

    def write_federation(self, again: Mapping[str, object]) -> None:
        """Replaces ``federation.json``."""
        write_atomic(self.path / FEDERATION, (to_json(again, indent=2) + "\n").encode())

    def federation(self) -> dict[str, Any] | None:
        """What ``federation.json`` holds; None where the run is no federation's."""
        return _read_json(self.path / FEDERATION)

    def manifest(self) -> dict[str, Any] | None:
        """What ``manifest.json`` holds. Raises InputError where it is damaged."""
        return _read_json(self.path / MANIFEST)


def refuse_occupied(out: Path) -> None:
    """Checks, before anything expensive, that a run may be written to ``out``.

    Raises:
        InputError: ``out`` is a file, or a folder that is not empty.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; expected a folder that is empty or does not exist")
        foreign = [p.name for p in out.iterdir() if not _is_leftover(p.name)] if out.exists() else []
    except OSError as error:
        raise InputError(f"{out} cannot be read: {error.strerror}") from error
    if not foreign:
        return
    if CONFIG in foreign:
        raise InputError(f"{out} is not empty; continue it with `fltac resume {out}`, or choose another folder")
    raise InputError(f"{out} is not empty and holds no run (there is {min(foreign)}); choose another folder")


def create(
    out: Path, config: Config, fingerprints: Mapping[str, object] | None = None, gpu: str | None = None
) -> RunDirectory:
    """Makes the folder of a new run with its config and manifest.

    Args:
        out: A folder that does not exist or is empty.
        config: Stored fully resolved.
        fingerprints: Of the data and the backbone, for the manifest.
        gpu: The accelerator's name, for the manifest.

    Raises:
        InputError: see :func:`refuse_occupied`, or the folder cannot be made.
    """
    refuse_occupied(out)
    manifest = {
        "versions": provenance.versions(),
        "git": provenance.code_state(),
        "hardware": provenance.hardware(gpu),
        "seed": config.federation.seed,
        "command": provenance.command_line(),
        "fingerprints": dict(fingerprints or {}),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / MANIFEST, (to_json(manifest, indent=2) + "\n").encode())
        write_atomic(out / CONFIG, to_yaml(config).encode())
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    return RunDirectory(out, config)


def open_existing(path: Path, config: Config | None = None) -> RunDirectory:
    """Opens a run directory.

    Args:
        path: The folder.
        config: Where given, it has to equal the stored one (``output.dir`` aside).

    Raises:
        InputError: not a run directory, a stored config that cannot be read, or one that differs from
            ``config``; the line names the first differing key with both values.
    """
    if not path.is_dir():
        raise InputError(f"run directory {path}: no such folder")
    if not (path / CONFIG).is_file():
        raise InputError(f"run directory {path}: it has no {CONFIG}, so it is not the folder of a run")
    stored = load_config(path / CONFIG)
    if config is not None:
        ours, theirs = dict(_leaves(config.model_dump())), dict(_leaves(stored.model_dump()))
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            if key != "output.dir" and ours.get(key, "absent") != theirs.get(key, "absent"):
                raise InputError(
                    f"run directory {path} belongs to another config: {key} is {theirs.get(key, 'absent')!r} "
                    f"there, but {ours.get(key, 'absent')!r} in the given one"
                )
    return RunDirectory(path, stored)


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_leftover(name: str) -> bool:
    """True for what a killed creation may have left: temporary files, and a manifest (alone: see CONFIG)."""
    return name.startswith(TEMPORARY) or name == MANIFEST


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree
