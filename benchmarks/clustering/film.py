"""Plays whole runs and keeps what each slot learned in each round, so that rules that accumulate can be replayed.

    python benchmarks/clustering/film.py I II --seeds 0 1 --rounds 4 --steps 50

What is replayed is exact for the rule that was played, and an indication for others: later uploads depend on the means
that were sent back. Any statement about another rule's later rounds needs a film of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import FOLDER
from recording import Recording
from regimes import REGIMES, regime_config

from fltac.config import Config
from fltac.evaluation import clustering_record, score_state
from fltac.model.prefix import RowKey
from fltac.records import (
    HEAD,
    LORA_A,
    LORA_B,
    Adapter,
    Reply,
    RoundReport,
    ServerState,
    head_keys,
    lora_modules,
)
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.loop import Record, Watch, as_sent, federate
from fltac.runtime.provenance import code_state, versions
from fltac.runtime.setup import Experiment, prepare, resolved
from fltac.runtime.simulation import Simulation
from fltac.server.round import init_server

FILMS = FOLDER.parent / "films"
KEPT: dict[RowKey, torch.Tensor] = {}
"""What the frozen layers made of rows, for all runs of a process; it grows to some gigabytes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regimes", nargs="+", choices=list(REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=400, help="validation rows of a task that are scored at the end")
    parser.add_argument("--name", default="fltac", help="of the settings, for the files")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=FILMS)
    args = parser.parse_args()
    for seed in args.seeds:
        for regime in args.regimes:
            name = f"{regime}-{args.name}-seed{seed}-tau{args.steps}"
            if (args.out / f"{name}.json").exists():
                continue
            settings = [f"federation.rounds={args.rounds}", f"training.steps={args.steps}", *args.set]
            play(regime_config(regime, seed, settings), name, args.rows, args.out)
    return 0


def play(config: Config, name: str, rows: int, out: Path) -> None:
    """Plays a run; writes its uploads (``.safetensors``, as one recording of rounds times slots) and its rounds."""
    experiment = sharing(config)
    config = experiment.config
    tasks = {holding.key: holding.task for holding in experiment.holdings}
    keys = sorted(tasks)
    before = first = first_state(experiment)
    pairs: list[tuple[Adapter, Adapter]] = []

    def watch(state: ServerState, replies: Sequence[Reply]) -> None:
        nonlocal before
        updates = {update.key: update for reply in replies for update in reply.updates}
        pairs.extend((before.received(key), updates[key].adapter) for key in keys)
        before = state

    records, scored = played(experiment, first, rows, watch)
    rounds = [{name: record[name] for name in ("round", "clustering", "loss", "labels")} for record in records]
    names = list(experiment.tasks)
    count = len(keys) * len(rounds)
    film = Recording(
        {"film": name, "rounds": len(rounds), "git": code_state(), "versions": versions()},
        np.array([names.index(tasks[key]) for key in keys] * len(rounds)),
        tuple(client for client, _ in keys) * len(rounds),
        np.zeros(count, dtype=np.int64),
        np.full(count, np.nan),
        np.full(count, np.nan),
        change_grams(first.initial, pairs),
    )
    out.mkdir(parents=True, exist_ok=True)
    film.save_as(out / f"{name}.safetensors")
    record = {"film": film.facts, **scored, "rounds": rounds, "config": config.model_dump()}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    aris = [f"{own['clustering']['ari']:.2f}" for own in rounds if own["clustering"]]
    print(f"{name}: {scored['mean_score']:.3f}", *aris, file=sys.stderr, flush=True)


def sharing(config: Config) -> Experiment:
    """A run's parts, with what its frozen layers make of rows kept for the process's next runs."""
    experiment = resolved(prepare(config))
    if experiment.model.prefix is not None:
        experiment.model.prefix.kept = KEPT
    return experiment


def first_state(experiment: Experiment) -> ServerState:
    """v0 and nobody's cluster."""
    config, shapes = experiment.config, experiment.model.body_shapes
    return as_sent(init_server(config.server_settings, shapes, experiment.head_shapes, experiment.clients), config)


def played(
    experiment: Experiment, state: ServerState, rows: int, watch: Watch | None = None
) -> tuple[list[Record], dict[str, Any]]:
    """Plays a run; its rounds with what was clustered and each slot's cluster, and the scores after the last.

    Args:
        experiment: The run's parts.
        state: From :func:`first_state`.
        rows: Validation rows of a task that are scored.
        watch: Told of each round.
    """
    config, model = experiment.config, experiment.model
    torch.set_num_threads(config.training.threads or 1)
    task = next(iter(experiment.tasks.values()))
    plan = choose_plan(config.training, model, task, config.training.threads or 1)
    simulation = Simulation(experiment.clients, model, config, plan, initial=state.initial)
    groups = experiment.groups if config.server.clustering.rule == "given" else None
    records: list[Record] = []
    keys = sorted(holding.key for holding in experiment.holdings)

    def judge(state: ServerState, report: RoundReport, _last: bool) -> Record:
        assignment = state.assignment()
        labels = [assignment.get(key, -1) for key in keys]
        return {"clustering": clustering_record(state, report, experiment.holdings), "labels": labels}

    def keep(_state: ServerState, record: Record) -> None:
        records.append(record)

    state = federate(state, config.rounds, config, simulation, judge, keep, groups=groups, watch=watch)
    scores = score_state(model, state, experiment.holdings, experiment.tasks, config, rows)
    tasks = {name: score.record() for name, score in scores.items()}
    return records, {"mean_score": float(np.mean([score.score for score in scores.values()])), "tasks": tasks}


def change_grams(initial: Adapter, pairs: Sequence[tuple[Adapter, Adapter]]) -> dict[str, np.ndarray]:
    """Inner products of what was learned in all rounds by all slots: of products, of A and of heads."""
    n = len(pairs)
    product, first = [], []
    for module in lora_modules(initial):
        a, b = module + LORA_A, module + LORA_B
        change = np.stack([after[b] @ after[a] - before[b] @ before[a] for before, after in pairs]).reshape(n, -1)
        product.append((change @ change.T).astype(np.float64))
        rows = np.stack([after[a] - before[a] for before, after in pairs]).reshape(n, -1)
        first.append((rows @ rows.T).astype(np.float64))
    head = np.zeros((1, n, n))
    for key in head_keys(initial):
        parts = [f"{HEAD}{key}.{part}" for part in ("weight", "bias")]
        rows = np.stack(
            [
                np.concatenate([(after[part] - before.get(part, initial[part])).ravel() for part in parts])
                if parts[0] in after
                else np.zeros(sum(initial[part].size for part in parts))
                for before, after in pairs
            ]
        )
        head[0] += rows @ rows.T
    return {"product": np.stack(product), "a": np.stack(first), "head": head}


if __name__ == "__main__":
    sys.exit(main())
