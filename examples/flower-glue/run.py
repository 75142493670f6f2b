"""Ten SuperNodes on one machine: the five GLUE tasks on MiniLM, two rounds over Flower, with TLS and node keys.

Writes each client's rows, starts a SuperLink, ten SuperNodes and the run, prints what came out, and stops what it
started. Needs FLTAC_DATA (see configs/glue-minilm.yaml) and about 13 GB of memory: every worker holds torch, the
backbone and its rows.

    FLTAC_DATA=... python examples/flower-glue/run.py [--out runs/flower-glue] [key=value ...]
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from fltac.config import load_config
from fltac.errors import InputError, RunError
from fltac.report.tables import summary_table
from fltac.runtime.flower_local import LocalFederation, running
from fltac.runtime.partition_files import COORDINATOR, write_partition
from fltac.runtime.run_directory import open_existing, refuse_occupied

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
SETTINGS = ["federation.rounds=2", "federation.clients=10", "federation.quorum=10", "evaluation.max_rows=200"]
SECONDS = 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/flower-glue"))
    # Being told to end must not leave the federation behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        refuse_occupied(arguments.out)
        with tempfile.TemporaryDirectory(prefix="fltac-") as folder:
            return federate(Path(folder), arguments.out, [*SETTINGS, *arguments.overrides])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def federate(folder: Path, out: Path, settings: list[str]) -> int:
    """Runs the federation in ``folder`` and leaves its run directory and logs in ``out``."""
    data = folder / "data"
    write_partition(load_config(CONFIG, settings), data)
    clients = {path.parent.name: path for path in sorted(data.glob("*/client.yaml"))}
    federation = LocalFederation(folder / "federation", load_config(data / COORDINATOR), clients)
    start = time.monotonic()
    with running(federation):
        print(f"{len(clients)} SuperNodes started after {time.monotonic() - start:.0f} s", file=sys.stderr)
        federation.start_run()
        finished = federation.wait(SECONDS)
    out.mkdir(parents=True, exist_ok=True)
    for log in sorted(federation.folder.glob("*.log")):
        shutil.copy(log, out / log.name)
    print(federation.log("run").read_text(errors="replace"), file=sys.stderr)
    if not finished:
        print(f"error: the run has not finished; the logs lie in {out}", file=sys.stderr)
        return 1
    shutil.copytree(federation.run_directory, out, dirs_exist_ok=True)
    show(out)
    return 0


def show(out: Path) -> None:
    """Prints the nodes' own scores and what travelled."""
    from rich.console import Console

    opened = open_existing(out)
    summary = opened.summary() or {}
    Console().print(summary_table(summary))
    scores = summary["slots"]
    shares = ", ".join(f"{name} {value:.3f}" for name, value in scores["distribution"].items())
    worst = scores["worst_client"]
    print(f"{scores['slots']} slots, each on its own node: {shares}; worst {worst['client']} {worst['score']:.3f}")
    for record in opened.rounds():
        network = record["network"]
        megabytes = {name: {way: size / 1e6 for way, size in network[name].items()} for name in ("payload", "wire")}
        print(
            f"round {record['round']}: {record['clients']} clients, {record['updates']} updates, "
            f"payload {megabytes['payload']['down']:.2f} MB down, {megabytes['payload']['up']:.2f} MB up, "
            f"on the wire {megabytes['wire']['down']:.2f} and {megabytes['wire']['up']:.2f}"
        )
    print(out)


if __name__ == "__main__":
    sys.exit(main())
