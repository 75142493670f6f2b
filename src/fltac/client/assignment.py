"""A client's choice among the clusters it was sent: for each slot the one whose adapter has the least loss on its rows.

As in IFCA (arXiv 2006.04088) the client scores all clusters' adapters before it trains the best. Several slots of a
client may be bound to choose different ones, by one minimum-cost matching.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fltac.client.batches import Rows
from fltac.client.client import Client, LocalTask, start_adapter
from fltac.client.losses import row_keys
from fltac.config import Config
from fltac.model.lanes import LaneModel
from fltac.records import Adapter, Request
from fltac.seeding import generator
from fltac.server.clustering import assign_distinct

Losses = NDArray[np.float64]


def choose(model: LaneModel, client: Client, request: Request, initial: Adapter, config: Config) -> Request:
    """Answers a request with candidates for itself.

    Args:
        model: The backbone with its lanes; its lanes are replaced.
        client: Whose slots.
        request: From the server; without candidates it is returned as it is.
        initial: v0, for heads that a candidate lacks.
        config: Gives the seed, the rows, the loss and whether slots must differ.

    Returns:
        The same request, each of the client's slots pointing at the candidate that it chose.
    """
    if not request.candidates:
        return request
    slots = sorted(client.slots)
    losses = np.array([slot_losses(model, client, slot, request, initial, config) for slot in slots])
    columns = least(losses, distinct=config.server.clustering.cannot_link)
    found = {slot: request.candidates[column] for slot, column in zip(slots, columns, strict=True)}
    return replace(request, slots=found)


def least(losses: Losses, distinct: bool) -> list[int]:
    """The candidate of each slot.

    Args:
        losses: ``[slots, candidates]``; one that is not finite counts as worse than any other.
        distinct: Different ones at the least sum; with more slots than candidates each is taken by at most
            ceil(slots / candidates) of them.

    Returns:
        Columns; the first of equal ones.
    """
    finite = np.isfinite(losses)
    # So large that no sum of others reaches it, and no larger, since sums are compared.
    worst = (np.abs(losses[finite]).max(initial=0.0) + 1.0) * (len(losses) + 1)
    costs = np.where(finite, losses, worst)
    if not distinct:
        return [int(column) for column in costs.argmin(axis=1)]
    return [int(column) for column in assign_distinct(costs, [np.arange(len(costs))[None]])]


def slot_losses(
    model: LaneModel, client: Client, slot: int, request: Request, initial: Adapter, config: Config
) -> Losses:
    """The loss of each candidate for one slot, summed over the slot's tasks: ``[candidates]``."""
    tasks = client.slots[slot]
    rows = [
        assignment_rows(local, config, request.round_number, client.id, slot + index)
        for index, local in enumerate(tasks)
    ]
    batch, kind = config.evaluation.batch_size, config.server.clustering.assignment_loss
    out = []
    for candidate in request.candidates:
        heads = [local.head_key for local in tasks]
        model.load([start_adapter(replace(request, slots={slot: candidate}), slot, heads, initial)])
        each = [row_losses(model, local, own, batch) for local, own in zip(tasks, rows, strict=True)]
        labels = [np.asarray(local.task.train.labels[own]) for local, own in zip(tasks, rows, strict=True)]
        out.append(sum(mean_loss(values, own, kind == "balanced") for values, own in zip(each, labels, strict=True)))
    return np.array(out)


def assignment_rows(local: LocalTask, config: Config, round_number: int, client: str, number: int) -> Rows:
    """The rows that candidates are scored on in a round: seeded, of those held back, else of the training rows.

    Args:
        local: The task with its rows.
        config: Gives the seed, and how many at most.
        round_number: The round; each has its own draw.
        client: The client's id.
        number: The task's number, as for its batches.

    Returns:
        Row numbers of the task's training split, the shortest first.
    """
    pool = local.held if len(local.held) else local.rows
    draw = generator(config.federation.seed, "assignment-rows", round_number, client, number)
    rows = draw.permutation(pool)[: config.server.clustering.assignment_rows]
    ordered: Rows = rows[np.argsort(local.task.train.lengths[rows], kind="stable")]
    return ordered


@torch.no_grad()
def row_losses(model: LaneModel, local: LocalTask, rows: Rows, batch_size: int) -> Losses:
    """The loss of the loaded adapter on each of some training rows: cross entropy (of a language
    model the mean over the response), or squared error: ``[rows]``."""
    train, out = local.task.train, []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        keys = row_keys(train, part) if model.prefix else []
        if local.task.kind == "causal-lm":
            sums, counts = model.predictions(model.stack([train.batch(part)]), 1, keys).row_losses()
            out.append((sums.double() / counts).cpu().numpy())
            continue
        features = model.features(model.stack([train.batch(part)]), 1, keys)
        logits = model.logits(features, 0, local.head_key).double()
        out.append(_each(logits, torch.from_numpy(np.asarray(train.labels[part])).to(logits.device)).cpu().numpy())
    return np.concatenate(out)


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels.to(logits.dtype)) ** 2
    return F.cross_entropy(logits, labels, reduction="none")


def mean_loss(losses: Losses, labels: NDArray[np.generic], balanced: bool) -> float:
    """The mean, or the mean of the means of the classes that occur, so that a common class does not decide alone.

    Args:
        losses: ``[rows]``.
        labels: ``[rows]``: int64 class numbers; with floats (a regression) there are no classes to balance.
        balanced: Whether to.
    """
    if not balanced or np.issubdtype(labels.dtype, np.floating):
        return float(losses.mean())
    return float(np.mean([losses[labels == label].mean() for label in np.unique(labels)]))
