"""Runs one config under several methods in one process and prints their table.

    python benchmarks/methods.py configs/glue-minilm.yaml --out results/glue-minilm --methods fltac fedit --records

A method that is finished in OUT is not run again; one that was interrupted is continued.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fltac import load_config
from fltac.errors import InputError
from fltac.report.compare import comparison_table, load_results
from fltac.runtime.experiment import resume, run
from fltac.runtime.progress import for_stream
from fltac.runtime.run_directory import CONFIG, open_existing

NOT_RECORDS = ("checkpoints", "adapters", "lanes.json")
"""What a committed result goes without."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every method")
    parser.add_argument("--out", type=Path, help="default: a new folder under runs/")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--records", action="store_true", help="keep only config, manifest, rounds and summary")
    args = parser.parse_args()
    out = args.out
    if out is None:
        Path("runs").mkdir(exist_ok=True)
        out = Path(tempfile.mkdtemp(prefix=f"{args.config.stem}-", dir="runs"))
    try:
        for method in args.methods:
            first = load_config(args.config, [f"method={method}", *args.overrides])
            for seed in range(first.federation.seed, first.federation.seed + args.seeds):
                directory = out / method / f"seed-{seed}"
                settings = [f"method={method}", *args.overrides, f"federation.seed={seed}"]
                config = load_config(args.config, settings)
                print(f"{method}, seed {seed} -> {directory}", file=sys.stderr)
                if (directory / CONFIG).exists():
                    open_existing(directory, config)
                    resume(directory, for_stream())
                else:
                    run(config, directory, for_stream())
                if args.records:
                    strip(directory)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison_table(load_results([out / method for method in args.methods])))
    return 0


def strip(directory: Path) -> None:
    """Leaves the files that design calls a committed result."""
    for name in NOT_RECORDS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
