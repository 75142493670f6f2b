"""Local training of a mixed queue of GLUE slots against plain PEFT loops, side by side in one process.

The plain loops train one adapter at a time in float32, in ``train()`` mode with the model's own dropout: padded to 128
tokens as published code does it, and padded to the longest row of each shuffled batch. Needs FLTAC_DATA.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from record import write_record
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from fltac import load_config
from fltac.client.client import plan_jobs
from fltac.client.training import TrainJob, train
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.setup import backbone_folder, prepare, resolved
from fltac.server.round import init_server, plan_round

CONFIG = Path(__file__).parents[2] / "configs" / "glue-minilm.yaml"
BATCH, RANK, LONGEST = 32, 4, 128
TARGETS = {
    "step.vs_padded_fp32": {"min": 8.0},
    "step.vs_dynamic_fp32": {"min": 4.0},
    "step.share_of_peak": {"min": 0.6},
    "step.padding": {"max": 0.08},
}


@dataclass
class Seconds:
    """Seconds of each repeat of one contender, and what it did in one."""

    rows: int
    tokens: int
    flops: float = 0.0
    repeats: list[float] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """For the result file."""
        middle = median(self.repeats)
        return {
            "rows": self.rows,
            "real_tokens": self.tokens,
            "seconds": self.repeats,
            "examples_per_second": self.rows / middle,
            "real_tokens_per_second": self.tokens / middle,
        }


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class PlainLoop:
    """One adapter trained by PEFT and torch.optim alone."""

    def __init__(self, folder: str, targets: Sequence[str], device: torch.device, dynamic: bool) -> None:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
        settings = LoraConfig(
            r=RANK, lora_alpha=16, target_modules=list(targets), lora_dropout=0.05, modules_to_save=["classifier"]
        )
        self.model = get_peft_model(base, settings).train().to(device)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-4)
        self.device, self.dynamic = device, dynamic

    def __call__(self, batches: Sequence[tuple[object, np.ndarray]]) -> None:
        for split, rows in batches:
            inputs = split.batch(rows, None if self.dynamic else LONGEST)  # type: ignore[attr-defined]
            batch = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
            labels = torch.from_numpy(np.asarray(split.labels[rows])).to(self.device)  # type: ignore[attr-defined]
            loss = F.cross_entropy(self.model(**batch).logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def matrix_peak(shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of matrix products alone, at the backbone's own shapes."""
    pairs = [
        (torch.randn(tokens, inner, device=device).to(dtype), torch.randn(outer, inner, device=device).to(dtype))
        for inner, outer in shapes
    ]
    flops = sum(2 * tokens * inner * outer for inner, outer in shapes)

    def products() -> None:
        for left, right in pairs:
            F.linear(left, right)

    products()
    return max(10 * flops / timed(lambda: [products() for _ in range(10)], device) for _ in range(5))


def needed_flops(jobs: Sequence[TrainJob], config: object) -> float:
    """Multiply-adds, counted twice, of the real tokens alone: forward, and backward through the activations.

    Linear layers 2 operations a weight and token each way; attention 4 L hidden a token and layer forward, twice that
    backward. Below the first adapted layer's projections nothing goes backward.
    """
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # type: ignore[attr-defined]
    total = 0.0
    for job in jobs:
        for step in job.steps:
            length = step.task.train.lengths[step.rows].astype(np.float64)
            linear = 2.0 * (4 * hidden * hidden + 2 * hidden * wide) * layers
            below = 2.0 * 3 * hidden * hidden
            total += float((length * (2 * linear - below) + 12.0 * layers * hidden * length**2).sum())
    return total


def shuffled(jobs: Sequence[TrainJob], steps: int, seed: int) -> Iterator[tuple[object, np.ndarray]]:
    """Random batches of one task, as a loop without batching by length takes them."""
    draw = np.random.default_rng(seed)
    rows = np.unique(np.concatenate([step.rows for job in jobs for step in job.steps]))
    for _ in range(steps):
        yield jobs[0].steps[0].task.train, draw.choice(rows, BATCH, replace=len(rows) < BATCH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each slot")
    parser.add_argument("--plain-steps", type=int, default=2, help="steps of a plain loop for each task and repeat")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="step")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    settings = [
        f"training.steps={args.steps}", f"training.batch_size={BATCH}", "training.precision=auto",
        f"lora.rank={RANK}", f"backbone.device={args.device}", f"training.threads={args.threads or 'null'}",
    ]  # fmt: skip
    experiment = resolved(prepare(load_config(CONFIG, settings)))
    config, model = experiment.config, experiment.model
    torch.set_num_threads(config.training.threads or 1)
    device, dtype = model.backbone.device, model.backbone.model.dtype
    state = init_server(config.server_settings, model.body_shapes, experiment.head_shapes, experiment.clients)
    requests = plan_round(state, config.server_settings)
    jobs = [job for one in requests for job in plan_jobs(experiment.clients[one.client], one, state.initial, config)]
    plan = choose_plan(config.training, model, next(iter(experiment.tasks.values())), config.training.threads or 1)
    of_task = {name: [job for job in jobs if job.steps[0].task.name == name] for name in experiment.tasks}
    architecture = model.backbone.model.config

    def queue(own: Sequence[TrainJob]) -> Seconds:
        tokens = sum(int(job.packed_sizes.sum()) for job in own)
        return Seconds(len(own) * args.steps * BATCH, tokens, needed_flops(own, architecture))

    loops = {
        "padded_fp32": PlainLoop(backbone_folder(config), ["query", "value"], device, dynamic=False),
        "dynamic_fp32": PlainLoop(backbone_folder(config), ["query", "value"], device, dynamic=True),
    }
    ours, alone = queue(jobs), {name: queue(own) for name, own in of_task.items()}
    plain = {loop: {name: Seconds(args.plain_steps * BATCH, 0) for name in of_task} for loop in loops}
    hidden, wide = architecture.hidden_size, architecture.intermediate_size
    peaks: list[float] = []
    for repeat in range(args.repeats):
        print(f"repeat {repeat + 1} of {args.repeats}", file=sys.stderr)
        for loop, run in loops.items():
            for name, own in of_task.items():
                batches = list(shuffled(own, args.plain_steps, repeat))
                if repeat == 0:
                    run(batches[:1])
                plain[loop][name].tokens = sum(int(split.lengths[rows].sum()) for split, rows in batches)  # type: ignore[attr-defined]
                plain[loop][name].repeats.append(timed(lambda run=run, batches=batches: run(batches), device))
        if repeat == 0:
            train(model, jobs[:4], config.training, 0.0, plan)
        peaks.append(matrix_peak([(hidden, wide), (wide, hidden), (hidden, hidden)], 1536, dtype, device))
        ours.repeats.append(timed(lambda: train(model, jobs, config.training, 0.0, plan), device))
        for name, own in of_task.items():
            alone[name].repeats.append(timed(lambda own=own: train(model, own, config.training, 0.0, plan), device))
    model.restore()

    def same_queue(loop: str, names: Sequence[str]) -> list[float]:
        """Seconds of a plain loop for the rows of these tasks' queues, repeat by repeat."""
        per_row = [alone[name].rows / plain[loop][name].rows for name in names]
        return [
            sum(share * plain[loop][name].repeats[repeat] for share, name in zip(per_row, names, strict=True))
            for repeat in range(args.repeats)
        ]

    def ratio(loop: str) -> float:
        theirs = same_queue(loop, list(of_task))
        return median(their / our for their, our in zip(theirs, ours.repeats, strict=True))

    share = median(ours.flops / seconds / peak for seconds, peak in zip(ours.repeats, peaks, strict=True))
    padded = sum(int((job.packed_sizes if model.packs else job.padded_sizes).sum()) for job in jobs)
    tasks = {
        name: {
            **alone[name].record(),
            "share_of_peak": median(
                alone[name].flops / seconds / peak for seconds, peak in zip(alone[name].repeats, peaks, strict=True)
            ),
            **{
                f"vs_{loop}": median(
                    their / our for their, our in zip(same_queue(loop, [name]), alone[name].repeats, strict=True)
                )
                for loop in loops
            },
        }
        for name in of_task
    }
    write_record(
        args.name,
        {label.replace("step.", f"{args.name}."): target for label, target in TARGETS.items()},
        {
            f"{args.name}.vs_padded_fp32": ratio("padded_fp32"),
            f"{args.name}.vs_dynamic_fp32": ratio("dynamic_fp32"),
            f"{args.name}.share_of_peak": share,
            f"{args.name}.padding": 1.0 - ours.tokens / padded,
        },
        {
            "threads": config.training.threads,
            "precision": config.training.precision,
            "packed": model.packs,
            "batch_size": BATCH,
            "rank": RANK,
            "plan": {"lanes": plan.lanes, "tokens": plan.tokens, "workers": plan.workers},
            "matrix_peak_flops": peaks,
            "mixed_queue": {**ours.record(), "slots": len(jobs), "flops": ours.flops},
            "one_task_at_a_time": tasks,
            "plain": {loop: {name: one.record() for name, one in own.items()} for loop, own in plain.items()},
        },
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
