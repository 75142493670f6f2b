"""The fast path scores as the plain one does: float32, padded rows, one lane at a time. Needs FLTAC_DATA.

The same rows in the same batches; what differs is rounding. Mean scores of the five GLUE tasks, three seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

from one_round import play
from record import write_record

from fltac import load_config
from fltac.evaluation import score_state

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
TARGETS = {"accuracy.points_apart": {"max": 0.5}}
SETTINGS = [
    "method=oracle", "federation.clients=1", "federation.partition.rule=iid", "federation.rounds=1",
    "training.steps=80", "training.batch_size=16", "lora.rank=4",
]  # fmt: skip
PATHS = {
    "plain": ["training.precision=float32", "training.packing=false", "training.lanes=1"],
    "fast": ["training.precision=auto"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="validation rows of each task at most")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PATHS}
    for seed in range(args.seeds):
        for name, settings in PATHS.items():
            print(f"{name}, seed {seed}", file=sys.stderr)
            config = load_config(CONFIG, [*SETTINGS, *settings, f"federation.seed={seed}"])
            done = play(config)
            parts = done.experiment
            scores = score_state(parts.model, done.state, parts.holdings, parts.tasks, parts.config, args.rows)
            tasks = {task: record.score for task, record in scores.items()}
            mean = statistics.mean(tasks.values())
            found[name].append({**tasks, "mean": mean, "train_seconds": done.train_seconds})
    means = {name: statistics.mean(sample["mean"] for sample in samples) for name, samples in found.items()}
    write_record(
        "accuracy",
        TARGETS,
        {"accuracy.points_apart": 100 * abs(means["fast"] - means["plain"])},
        {"settings": SETTINGS, "paths": PATHS, "runs": found, "means": means},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
