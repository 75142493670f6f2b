"""How long a newcomer waits: ``fltac --help``, and the quickstart with an empty cache and with a filled one."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_record

ROOT = Path(__file__).parents[2]
TARGETS = {
    "start.help_seconds": {"max": 0.5},
    "start.quickstart_cold_seconds": {"max": 60.0},
    "start.quickstart_warm_over_cold": {"max": 1.0},
}


def seconds(arguments: list[str], **environment: str) -> float:
    """Wall-clock seconds of a Python process that has to succeed."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=True
    )
    return time.perf_counter() - start


def main() -> int:
    python, shown = [], []
    seconds(["-m", "fltac", "--help"])  # compiles what is not compiled yet
    for _ in range(7):
        python.append(seconds(["-c", "pass"]))
        shown.append(seconds(["-m", "fltac", "--help"]))
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder) / "cache")
        cold, warm = (
            seconds(["-m", "fltac", "run", "configs/quickstart.yaml", "--out", f"{folder}/{name}"], FLTAC_CACHE=cache)
            for name in ("cold", "warm")
        )
    write_record(
        "start",
        TARGETS,
        {
            "start.help_seconds": statistics.median(shown),
            "start.quickstart_cold_seconds": cold,
            "start.quickstart_warm_over_cold": warm / cold,
        },
        {"python_seconds": python, "help_seconds": shown, "cold_seconds": cold, "warm_seconds": warm},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
