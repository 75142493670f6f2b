"""Trains one round from v0 in a regime and keeps what a clustering rule would see of the uploads.

    python benchmarks/clustering/record.py I II --seeds 0 1 2 --taus 20 50

Needs FLTAC_DATA (but for regime V). A recording that is there already is not made again.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from recording import Recording
from regimes import REGIMES, regime_config

from fltac.config import Config
from fltac.data.encoded import EncodedTask
from fltac.data.metrics import predictions_from_logits, score
from fltac.evaluation import evaluation_rows, predict_logits
from fltac.model.lanes import LaneModel
from fltac.records import HEAD, LORA_A, LORA_B, Adapter, Update, head_keys, lora_modules
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.provenance import code_state, versions
from fltac.runtime.setup import Experiment, build_clients, prepare, resolved
from fltac.runtime.simulation import Simulation
from fltac.server.round import init_server, plan_round

FOLDER = Path(__file__).parents[2] / "results" / "clustering" / "recordings"
SCORED_ROWS = 150
NEUTRAL = (64, 32)
"""Rows and tokens of the random inputs through which a layer's own inputs are seen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regimes", nargs="+", choices=list(REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--taus", type=int, nargs="+", required=True, help="local steps")
    parser.add_argument("--rank", type=int, help="default: the config's")
    parser.add_argument("--loss", default="plain", help="training.loss")
    parser.add_argument("--score-tau", type=int, nargs="*", default=[50], help="score the uploads at these")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    for seed in args.seeds:
        for regime in args.regimes:
            overrides = [f"training.loss={args.loss}"]
            if args.rank:
                overrides += [f"lora.rank={args.rank}", f"lora.alpha={16 * args.rank}"]
            config = regime_config(regime, seed, overrides)
            facts = {"regime": regime, "seed": seed, "rank": config.lora.rank, "loss": args.loss}
            wanted = [tau for tau in args.taus if not _path(args.out, facts | {"tau": tau}).exists()]
            if not wanted:
                continue
            experiment = resolved(prepare(config))
            spreads = input_spreads(experiment)
            for tau in wanted:
                made = record(experiment, tau, facts, tau in args.score_tau, spreads)
                print(made.save(args.out), file=sys.stderr)
    return 0


def _path(folder: Path, facts: dict[str, object]) -> Path:
    empty = np.zeros(0)
    name = Recording(facts, empty.astype(int), (), empty.astype(int), empty, empty, {}).name
    return folder / f"{name}.safetensors"


def record(
    experiment: Experiment,
    tau: int,
    facts: dict[str, object],
    scored: bool,
    spreads: dict[str, NDArray[np.float64]],
) -> Recording:
    """Plays the clients' side of the first round with tau local steps."""
    training = experiment.config.training.model_copy(update={"steps": tau, "epochs": None})
    config = experiment.config.model_copy(update={"training": training})
    clients, holdings = build_clients(config, experiment.partition, experiment.tasks)
    experiment = replace(experiment, config=config, clients=clients, holdings=holdings)
    torch.set_num_threads(training.threads or 1)
    state = init_server(config.server_settings, experiment.model.body_shapes, experiment.head_shapes, clients)
    plan = choose_plan(training, experiment.model, next(iter(experiment.tasks.values())), training.threads or 1)
    simulation = Simulation(clients, experiment.model, config, plan)
    exchange = simulation.exchange(plan_round(state, config.server_settings))
    updates = [update for reply in exchange.replies for update in reply.updates]
    tasks = {holding.key: holding.task for holding in holdings}
    names = list(experiment.tasks)
    found = np.full((2, len(updates)), np.nan)
    if scored:
        for number, update in enumerate(updates):
            task = experiment.tasks[tasks[update.key]]
            found[:, number] = scores(experiment.model, update, task, config)
    return Recording(
        {**facts, "tau": tau, "git": code_state(), "versions": versions()},
        np.array([names.index(tasks[update.key]) for update in updates]),
        tuple(update.client for update in updates),
        np.array([update.examples for update in updates]),
        found[0],
        found[1],
        grams(state.initial, [update.adapter for update in updates], spreads),
    )


def scores(model: LaneModel, update: Update, task: EncodedTask, config: Config) -> tuple[float, float]:
    """Of an upload and of the most frequent class, on a few validation rows."""
    key = head_keys(update.adapter)[0]
    rows = evaluation_rows(task, SCORED_ROWS, config.federation.seed)
    labels = np.asarray(task.validation.labels[rows])
    logits = predict_logits(model, update.adapter, key, task, rows, config.evaluation.batch_size)
    most = int(np.bincount(task.train.labels.astype(np.int64)).argmax())
    own = score(task.metric, predictions_from_logits(task.metric, logits), labels)
    return own, float((labels == most).mean())


def grams(
    initial: Adapter, adapters: list[Adapter], spreads: dict[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """All inner products, from formed products."""
    n = len(adapters)
    out: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for module in lora_modules(initial):
        a = np.stack([adapter[module + LORA_A] for adapter in adapters]).astype(np.float64)
        b = np.stack([adapter[module + LORA_B] for adapter in adapters]).astype(np.float64)
        start = initial[module + LORA_B].astype(np.float64) @ initial[module + LORA_A]
        product = (b @ a - start).astype(np.float32)
        seen = product @ spreads[module].astype(np.float32)
        flat = {
            "product": product,
            "product_seen": seen,
            "a": a - initial[module + LORA_A],
            "b": b - initial[module + LORA_B],
        }
        if a.shape[1] > 1:
            flat["product_top"] = leading_direction(product)
            for row in np.moveaxis(a - initial[module + LORA_A], 1, 0).astype(np.float32):
                out["a_row"].append((row @ row.T).astype(np.float64))
        for kind, values in flat.items():
            rows = values.reshape(n, -1).astype(np.float32)
            out[kind].append((rows @ rows.T).astype(np.float64))
    for part in ("weight", "bias"):
        total = np.zeros((n, n))
        for key in head_keys(initial):
            name = f"{HEAD}{key}.{part}"
            size = initial[name].size
            rows = np.stack(
                [(adapter[name] - initial[name]).ravel() if name in adapter else np.zeros(size) for adapter in adapters]
            ).astype(np.float64)
            total += rows @ rows.T
        out["head"].append(total)
    return {kind: np.stack(matrices) for kind, matrices in out.items()}


def leading_direction(products: NDArray[np.float32]) -> NDArray[np.float32]:
    """The best approximation of rank 1 of each product: ``[n, out, in]``.

    From the eigenvectors of the smaller side; a product that is zero stays so.
    """
    small = products if products.shape[1] <= products.shape[2] else products.transpose(0, 2, 1)
    _, vectors = np.linalg.eigh((small @ small.transpose(0, 2, 1)).astype(np.float64))
    left = vectors[:, :, -1:].astype(np.float32)
    top = left @ (left.transpose(0, 2, 1) @ small)
    return np.asarray(top if small is products else top.transpose(0, 2, 1))


@torch.no_grad()
def input_spreads(experiment: Experiment) -> dict[str, NDArray[np.float64]]:
    """The root of the second moment of each adapted layer's inputs, seen on random tokens: ``[in, in]``.

    For images, on training images.
    """
    model = experiment.backbone.model
    task = next(iter(experiment.tasks.values()))
    draw = np.random.default_rng(0)
    batch = dict(task.train.batch(np.arange(NEUTRAL[0])))
    if "input_ids" in batch:
        words = int(model.config.vocab_size)
        shape = NEUTRAL
        batch = {name: np.zeros(shape, dtype=np.int64) for name in batch}
        batch |= {"input_ids": draw.integers(words // 30, words, shape), "attention_mask": np.ones(shape, np.int64)}
    moments: dict[str, torch.Tensor] = {}
    hooks = []
    for path in experiment.modules:

        def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: str = path) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            moments[path] = rows.T @ rows / len(rows)

        hooks.append(model.get_submodule(path).register_forward_pre_hook(note))
    zero = {name: np.zeros(shape, dtype=np.float32) for name, shape in experiment.model.body_shapes.items()}
    experiment.model.load([zero])
    experiment.model.features(experiment.model.stack([batch]), 1)
    for hook in hooks:
        hook.remove()
    out = {}
    for path, moment in moments.items():
        values, vectors = np.linalg.eigh(moment.cpu().numpy())
        out[path] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return out


if __name__ == "__main__":
    sys.exit(main())
