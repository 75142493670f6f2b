"""What every benchmark leaves: ``results/bench/<name>.json``, its targets beside what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, command_line, hardware, versions

FOLDER = Path(__file__).parents[2] / "results" / "bench"

Target = Mapping[str, float]
"""``{"min": x}`` or ``{"max": x}``."""


def write_record(
    name: str,
    targets: Mapping[str, Target],
    measured: Mapping[str, float],
    samples: Mapping[str, Any],
    gpu: str | None = None,
    folder: Path = FOLDER,
) -> Path:
    """Writes a benchmark's result and prints it against its targets.

    Args:
        name: Of the benchmark; labels begin with it and a dot.
        targets: By label, what was asked for.
        measured: By the same labels, what came out.
        samples: Everything it was computed from.
        gpu: Name of the accelerator, if one was used.
        folder: Where results lie.

    Raises:
        ValueError: the labels of targets and measured differ.
    """
    if targets.keys() != measured.keys():
        raise ValueError(f"{name}: targets {sorted(targets)} but measured {sorted(measured)}")
    record = {
        "name": name,
        "targets": {label: dict(target) for label, target in targets.items()},
        "measured": dict(measured),
        "provenance": {
            "command": command_line(),
            "git": code_state(),
            "versions": versions(),
            "hardware": hardware(gpu),
        },
        "samples": dict(samples),
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(lines(record)))
    return path


def met(target: Target, value: float) -> bool:
    """Whether a measured value is what was asked for."""
    return value >= target.get("min", float("-inf")) and value <= target.get("max", float("inf"))


def lines(record: Mapping[str, Any]) -> list[str]:
    """One line for each target of a record."""
    out = []
    for label, target in record["targets"].items():
        value = record["measured"][label]
        wanted = ", ".join(f"at {'least' if side == 'min' else 'most'} {limit:g}" for side, limit in target.items())
        out.append(f"{'ok  ' if met(target, value) else 'MISS'}  {label:40} {value:10.4g}   {wanted}")
    return out
