"""10, 100 and 1,000 clients at fixed work for each: seconds of a slot-step, and memory. Needs FLTAC_DATA.

Every client holds two GLUE tasks and makes four steps of four rows on each. Each number of clients is a process of its
own, so that its peak memory is its own. Each first plays the same round of 50 clients, so that what a process
takes once, whatever the number of clients (compiled products, freed memory in pieces), is in all of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from record import write_record

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
COUNTS = (10, 100, 1000)
STEPS, SLOTS, WARM_UP = 4, 2, 50
TARGETS = {
    "clients.slot_step_1000_over_10": {"max": 1.1},
    "clients.memory_growth_over_uploads": {"max": 1.5},
}


def one(clients: int) -> None:
    """Plays one round and prints what it took."""
    from one_round import play

    from fltac import load_config
    from fltac.runtime.run_directory import peak_rss_bytes

    settings = [
        "tasks=[sst2,qqp]", "federation.partition.rule=iid",
        "federation.partition.threshold=0", f"training.steps={STEPS}", "training.batch_size=4",
        "training.precision=auto",
    ]  # fmt: skip
    play(load_config(CONFIG, [*settings, f"federation.clients={WARM_UP}"]))
    done = play(load_config(CONFIG, [*settings, f"federation.clients={clients}"]))
    updates = done.report.updates
    found = {
        "clients": clients,
        "updates": updates,
        "train_seconds": done.train_seconds,
        "server_seconds": done.server_seconds,
        "upload_bytes": done.up_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds_per_slot_step": (done.train_seconds + done.server_seconds) / (updates * STEPS),
    }
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, help="run this many clients and print a line")
    parser.add_argument("--small-repeats", type=int, default=3, help="the small ones before and after the large one")
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return 0
    order = [*COUNTS[:2] * args.small_repeats, COUNTS[2], *COUNTS[:2] * args.small_repeats]
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for count in [10, *order]:  # the first one encodes the rows
        print(f"{count} clients", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(count)], stdout=subprocess.PIPE, text=True, check=True
        )
        found[count].append(json.loads(done.stdout.splitlines()[-1]))
    found[10] = found[10][1:]
    middle = {
        count: sorted(sample["seconds_per_slot_step"] for sample in samples)[len(samples) // 2]
        for count, samples in found.items()
    }
    small, large = found[10][-1], found[1000][-1]
    write_record(
        "clients",
        TARGETS,
        {
            "clients.slot_step_1000_over_10": middle[1000] / middle[10],
            "clients.memory_growth_over_uploads": (large["peak_rss_bytes"] - small["peak_rss_bytes"])
            / (large["upload_bytes"] - small["upload_bytes"]),
        },
        {
            "steps": STEPS,
            "slots_of_a_client": SLOTS,
            "seconds_per_slot_step": {str(count): value for count, value in middle.items()},
            "runs": {str(count): samples for count, samples in found.items()},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
