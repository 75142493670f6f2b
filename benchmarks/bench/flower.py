"""Seconds of a round over Flower outside training, with the resident worker and without, beside the simulation.

One SuperNode on this machine, so that nodes do not compete for its cores; TLS and node keys on loopback. Overhead is a
round's seconds (sending, waiting, receiving, and the server's work) less those of the same round in a simulation.
Flower's own polling is part of it, and stated: a message waits for the SuperNode's next look, then for the SuperExec's,
then the answer for the SuperNode's and for the coordinator's. Needs FLTAC_DATA and the extra `flower`.

    FLTAC_DATA=... OMP_NUM_THREADS=1 python benchmarks/bench/flower.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from record import write_record

import fltac
from fltac.config import Config, load_config
from fltac.errors import RunError
from fltac.runtime.federation import POLL_SECONDS
from fltac.runtime.flower_local import LocalFederation, running
from fltac.runtime.partition_files import COORDINATOR, write_partition
from fltac.runtime.run_directory import open_existing

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
ROUNDS = 8
SETTINGS = [
    "tasks=[sst2, rte]",
    "federation.clients=1",
    f"federation.rounds={ROUNDS}",
    "federation.partition.rule=iid",
    "training.lanes=1",
    "training.steps=5",
    "training.precision=float32",
    "evaluation.every=0",
    "evaluation.max_rows=32",
]
POLLING = {"SuperNode looks for messages": 3.0, "SuperExec looks for tasks": 0.1, "SuperNode looks for answers": 0.5}
"""Seconds, of flwr 1.41; the SuperExec's as ``LocalFederation`` sets it."""


def main() -> int:
    polling = {**POLLING, "coordinator looks for answers": POLL_SECONDS}
    with tempfile.TemporaryDirectory(prefix="fltac-") as folder:
        place = Path(folder)
        config = load_config(CONFIG, SETTINGS)
        fltac.run(config, place / "simulation")
        simulation = seconds(place / "simulation")
        warm = federate(place / "warm", config)
        cold = federate(place / "cold", config, {"idle-seconds": 0})
    overhead = {
        name: [a - b for a, b in zip(rounds, simulation, strict=True)]
        for name, rounds in (("warm", warm), ("cold", cold))
    }
    worst = sum(polling.values())
    write_record(
        "flower",
        {"flower.warm_overhead_seconds": {"max": 1.0 + worst / 2}},
        {"flower.warm_overhead_seconds": mean(overhead["warm"])},
        {
            "polling_seconds": polling,
            "polling_seconds_at_most": worst,
            "polling_seconds_on_average": worst / 2,
            "cold_overhead_seconds": mean(overhead["cold"]),
            "round_seconds": {"simulation": simulation, "warm": warm, "cold": cold},
            "overhead_seconds": overhead,
            "clientapp_process_seconds": median(start_seconds() for _ in range(5)),
        },
    )
    return 0


def federate(folder: Path, config: Config, node_config: dict[str, object] | None = None) -> list[float]:
    """The rounds' seconds of a federation with one SuperNode."""
    write_partition(config, folder / "data")
    (client,) = (folder / "data").glob("*/client.yaml")
    coordinator = load_config(folder / "data" / COORDINATOR)
    federation = LocalFederation(
        folder / "federation", coordinator, {client.parent.name: client}, node_config=node_config
    )
    with running(federation):
        federation.start_run()
        if not federation.wait(1200):
            raise RunError(federation.log("run").read_text(errors="replace")[-2000:])
    return seconds(federation.run_directory)


def seconds(directory: Path) -> list[float]:
    """Of all rounds but the first, in which the worker starts, and the last, after which everything is delivered."""
    records = open_existing(directory).rounds()
    return [record["seconds"]["train"] + record["seconds"]["server"] for record in records[1:-1]]


def start_seconds() -> float:
    """How long Flower's ClientApp process takes to come and go without doing anything."""
    begin = time.perf_counter()
    subprocess.run([str(Path(sys.executable).parent / "flwr-clientapp"), "--help"], capture_output=True, check=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
