"""Scores a federation from outside. Only the evaluator knows which slot belongs to which task.

For every (client, task) it scores the adapter that this client actually received, on the task's common validation
rows, and averages over clients; each (adapter, task) pair is scored once.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from fltac.client.losses import row_keys
from fltac.config import Config
from fltac.config.metrics import worst
from fltac.data.encoded import EncodedTask
from fltac.data.metrics import predictions_from_logits, score
from fltac.model.lanes import LaneModel
from fltac.records import HEAD, Adapter, RoundReport, ServerState, SlotKey
from fltac.seeding import generator
from fltac.server.sending import Outbox


@dataclass(frozen=True)
class Holding:
    """The truth about one local task: whose it is, in which slot, which task, through which head."""

    client: str
    slot: int
    task: str
    head_key: str

    @property
    def key(self) -> SlotKey:
        return (self.client, self.slot)


ScoreKey = tuple[bytes, str, str, int]
"""(digest of an adapter, head key, task, number of rows)."""

Measured = dict[str, float]
"""What was found of an adapter on a task's rows, by metric: the task's own, and perhaps more."""


@dataclass(frozen=True)
class TaskScore:
    """One task's scores over the clients that hold it; ``more``: other metrics, averaged likewise."""

    metric: str
    score: float
    worst_client: float
    n_eval: int
    more: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, str | float | int]:
        """As it stands in ``rounds.jsonl``; a loss with its perplexity, of at most exp(700)."""
        perplexity = {"perplexity": math.exp(min(self.score, 700.0))} if self.metric == "loss" else {}
        return {
            "metric": self.metric,
            "score": self.score,
            "worst_client": self.worst_client,
            "n_eval": self.n_eval,
            **perplexity,
            **self.more,
        }


def evaluation_rows(task: EncodedTask, max_rows: int | None, seed: int) -> NDArray[np.int64]:
    """The validation rows to score, the shortest first: all, or a fixed seeded subset."""
    rows = np.arange(len(task.validation))
    if max_rows is not None and max_rows < len(rows):
        rows = generator(seed, "evaluation-rows", client=task.name).permutation(len(rows))[:max_rows]
    ordered: NDArray[np.int64] = rows[np.argsort(task.validation.lengths[rows], kind="stable")]
    return ordered


@torch.no_grad()
def predict_logits(
    model: LaneModel, adapter: Adapter, head_key: str, task: EncodedTask, rows: NDArray[np.int64], batch_size: int
) -> NDArray[np.float64]:
    """Logits ``[rows, outputs]`` of an adapter on validation rows."""
    model.load([adapter])
    out = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        keys = row_keys(task.validation, part) if model.prefix else []
        features = model.features(model.stack([task.validation.batch(part)]), 1, keys)
        out.append(model.logits(features, 0, head_key).double().cpu().numpy())
    return np.concatenate(out)


@torch.no_grad()
def response_losses(
    model: LaneModel, adapter: Adapter, task: EncodedTask, rows: NDArray[np.int64], batch_size: int
) -> Measured:
    """What a causal language model with an adapter makes of validation rows' responses.

    Returns:
        ``loss``: the negative log-likelihood of a response token in nats, the mean over all tokens of all rows;
        ``token_accuracy``: the share of them that were the most likely ones.
    """
    model.load([adapter])
    total, right, tokens = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        keys = row_keys(task.validation, part) if model.prefix else []
        predicted = model.predictions(model.stack([task.validation.batch(part)]), 1, keys)
        total += float(predicted.row_losses()[0].double().sum())
        right += int((predicted.logits.argmax(dim=1) == predicted.tokens).sum())
        tokens += len(predicted.tokens)
    return {"loss": total / tokens, "token_accuracy": right / tokens}


def measure(
    model: LaneModel, adapter: Adapter, head_key: str, task: EncodedTask, rows: NDArray[np.int64], batch_size: int
) -> Measured:
    """Scores an adapter on validation rows by the task's metric."""
    if task.kind == "causal-lm":
        return response_losses(model, adapter, task, rows, batch_size)
    logits = predict_logits(model, adapter, head_key, task, rows, batch_size)
    labels = np.asarray(task.validation.labels[rows])
    return {task.metric: score(task.metric, predictions_from_logits(task.metric, logits), labels)}


def score_state(
    model: LaneModel,
    state: ServerState,
    holdings: Sequence[Holding],
    tasks: Mapping[str, EncodedTask],
    config: Config,
    max_rows: int | None,
    known: dict[ScoreKey, Measured] | None = None,
) -> dict[str, TaskScore]:
    """Scores what every client would hold after a round.

    Args:
        model: The backbone with its lanes; its lanes are replaced.
        state: The server after the round.
        holdings: All local tasks.
        tasks: By name.
        config: Gives the seed and the batch size.
        max_rows: Validation rows of each task; None for all.
        known: Scores of the evaluation before, so that an adapter that has not changed is not scored again; replaced
            by those of this one.

    Returns:
        By task name, in the order of ``tasks``; a task that no client holds is left out.
    """
    outbox = Outbox(state, config.server_settings)
    digests: dict[int, bytes] = {}  # by identity: slots that are sent the same share one object
    found: dict[ScoreKey, Measured] = {} if known is None else known
    before = dict(found)
    found.clear()
    out = {}
    for name, task in tasks.items():
        held = [holding for holding in holdings if holding.task == name]
        if not held:
            continue
        rows = evaluation_rows(task, max_rows, config.federation.seed)
        by_client = []
        for holding in held:
            received = outbox.of(holding.key)
            if id(received) not in digests:
                digests[id(received)] = digest(received)
            key = (digests[id(received)], holding.head_key, name, len(rows))
            if key not in found and key in before:
                found[key] = before[key]
            if key not in found:
                adapter = with_head(received, state.initial, holding.head_key)
                batch_size = config.evaluation.batch_size
                found[key] = measure(model, adapter, holding.head_key, task, rows, batch_size)
            by_client.append(found[key])
        means = {metric: float(np.mean([own[metric] for own in by_client])) for metric in by_client[0]}
        lowest = worst(task.metric, [own[task.metric] for own in by_client])
        out[name] = TaskScore(task.metric, means.pop(task.metric), lowest, len(rows), means)
    return out


def digest(adapter: Adapter) -> bytes:
    """SHA-256 of an adapter's names and values."""
    out = hashlib.sha256()
    for name, tensor in sorted(adapter.items()):
        out.update(name.encode())
        out.update(np.ascontiguousarray(tensor).tobytes())
    return out.digest()


def with_head(received: Adapter, initial: Adapter, head_key: str) -> dict[str, NDArray[np.float32]]:
    """The received body with one head (none for an empty key), v0's where the received adapter has none of that key."""
    body = {name: tensor for name, tensor in received.items() if not name.startswith(HEAD)}
    for part in ("weight", "bias") if head_key else ():
        name = f"{HEAD}{head_key}.{part}"
        body[name] = received[name] if name in received else initial[name]
    return body


def best_match_accuracy(truth: Sequence[int], found: Sequence[int]) -> float:
    """Share of items in the right group under the best one-to-one matching of groups (Hungarian)."""
    _, rows = np.unique(truth, return_inverse=True)
    _, columns = np.unique(found, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    chosen = linear_sum_assignment(table, maximize=True)
    return float(table[chosen].sum() / len(rows))


def clustering_record(state: ServerState, report: RoundReport, holdings: Sequence[Holding]) -> dict[str, object] | None:
    """Compares the server's grouping with the true tasks.

    Returns:
        k, adjusted Rand index, best-match accuracy and the server's own evidence; None where nothing is clustered
        or no slot has a cluster yet.
    """
    assignment = state.assignment()
    known = [holding for holding in holdings if holding.key in assignment]
    if report.k is None or not known:
        return None
    numbers = {task: number for number, task in enumerate(sorted({holding.task for holding in holdings}))}
    truth = [numbers[holding.task] for holding in known]
    found = [assignment[holding.key] for holding in known]
    return {
        "k": report.k,
        "ari": float(adjusted_rand_score(truth, found)),
        "accuracy": best_match_accuracy(truth, found),
        "silhouette": report.silhouette,
        **report.evidence(),
    }
