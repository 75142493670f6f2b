"""A whole GLUE/MiniLM round, and where its seconds go, by stage. Needs FLTAC_DATA."""

import argparse
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from record import write_record

from fltac import load_config
from fltac.client import training
from fltac.client.optimizer import LaneOptimizer
from fltac.model.lanes import LaneModel
from fltac.runtime import experiment, loop, session, simulation

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
STAGES: dict[str, tuple[Any, str]] = {
    "prepare": (experiment, "prepare"),
    "batches": (simulation, "plan_jobs"),
    "data to tensors": (LaneModel, "stack"),
    "forward": (training, "lane_losses"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (LaneOptimizer, "step"),
    "adapters in and out": (LaneModel, "activate"),
    "adapters loaded": (LaneModel, "load"),
    "adapters read": (LaneModel, "read"),
    "wire: requests": (simulation.Simulation, "deliver"),
    "wire: replies": (simulation, "encode_reply"),
    "wire: replies read": (simulation, "decode_reply"),
    "server": (loop, "finish_round"),
    "evaluation": (experiment, "judged"),
    "checkpoint": (session, "save_checkpoint"),
}
"""Stage to the function that is timed; a stage inside another is taken off the outer one."""
OUTSIDE = ("wire: requests", "wire: replies", "wire: replies read", "server", "checkpoint")
TARGETS = {
    "round.outside_training_share": {"max": 0.05},
    "round.backbone_share_of_training": {"min": 0.9},
}


class Clock:
    """Seconds by stage, each without the stages inside it; of passes side by side, the sum over their threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = threading.local()
        self._lock = threading.Lock()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            # A thread's stages lie in each other; those of other threads do not.
            inside: list[float] = self._inside.__dict__.setdefault("seconds", [])
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - start
                own = took - inside.pop()
                with self._lock:
                    self.seconds[stage] += own
                if inside:
                    inside[-1] += took

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, all stages are timed."""
        with ExitStack() as patches:
            for stage, (owner, name) in STAGES.items():
                patches.enter_context(patch.object(owner, name, self.around(stage, getattr(owner, name))))
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    settings = ["federation.rounds=1", "evaluation.max_rows=256", "training.precision=auto", *args.overrides]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, clock.running():
        start = time.perf_counter()
        result = experiment.run(load_config(CONFIG, settings), Path(folder) / "run")
        total = time.perf_counter() - start
    seconds = dict(clock.seconds)
    seconds["everything else"] = total - sum(seconds.values())
    trained = sum(result.summary["seconds"].values()) if "seconds" in result.summary else None
    backbone = seconds["forward"] + seconds["backward"]
    training_seconds = backbone + sum(
        seconds[stage]
        for stage in (
            "batches",
            "data to tensors",
            "optimizer",
            "adapters in and out",
            "adapters loaded",
            "adapters read",
        )
    )
    outside = sum(seconds.get(stage, 0.0) for stage in OUTSIDE)
    for stage, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{stage:24} {value:8.2f} s  {value / total:6.1%}")
    write_record(
        "round",
        TARGETS,
        {
            "round.outside_training_share": outside / (training_seconds + outside),
            "round.backbone_share_of_training": backbone / training_seconds,
        },
        {"seconds": seconds, "total": total, "of_the_record": trained, "overrides": args.overrides},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
