"""Checks every upload before anything is computed from it; what fails is left out, named, and the round goes on."""

from collections.abc import Container, Mapping, Sequence
from typing import Literal

import numpy as np

from fltac.records import HEAD, Adapter, LateReply, Rejection, Reply, SlotKey, Update, head_keys, is_head

LARGEST = 1e6
"""An upload with a larger number has diverged, and its square would leave float32's accuracy in a mean."""


def accept_updates(
    replies: Sequence[Reply], cohort: Sequence[str], initial: Adapter
) -> tuple[list[Update], list[Rejection]]:
    """Sorts the replies of a round into updates to use and rejections.

    Args:
        replies: In any order.
        cohort: Ids of the clients that were asked.
        initial: v0, whose names, shapes and head keys every upload has to have.

    Returns:
        The updates sorted by (client, slot), and one rejection for each reply or update that cannot be used,
        a client of the cohort without a reply included.
    """
    updates: list[Update] = []
    rejections: list[Rejection] = []
    answered: set[str] = set()
    for reply in sorted(replies, key=lambda reply: reply.client):
        reason = _reply_fault(reply, cohort, answered)
        answered.add(reply.client)
        if reason is not None:
            rejections.append(Rejection(reply.client, None, reason))
            continue
        seen: set[int] = set()
        for update in reply.updates:
            fault = update_fault(update, reply.client, seen, initial)
            seen.add(update.slot)
            if fault is None:
                updates.append(update)
            else:
                rejections.append(Rejection(reply.client, update.slot, fault))
    silent = [client for client in cohort if client not in answered]
    rejections += [Rejection(client, None, "no reply") for client in silent]
    return sorted(updates, key=lambda update: update.key), rejections


def accept_late(
    late: LateReply, known: Container[SlotKey], initial: Adapter, stale: Literal["drop", "use"]
) -> tuple[list[Update], list[Rejection]]:
    """Says what of a reply that came after its round's deadline can be used in the round that is being finished.

    Args:
        late: The reply with the request that it answers.
        known: The slots that have an update of this round already.
        initial: v0, as for :func:`accept_updates`.
        stale: Whether such replies are used at all.
    """
    client, number = late.request.client, late.request.round_number
    if late.reply.error is not None:
        return [], [Rejection(client, None, f"late, of round {number}: {late.reply.error}")]
    if stale == "drop":
        return [], [Rejection(client, None, f"its reply to round {number} came after the deadline")]
    updates, rejections = accept_updates([late.reply], [client], initial)
    newer = [update for update in updates if update.key in known]
    rejections += [
        Rejection(client, update.slot, f"its update of round {number} came after a newer one") for update in newer
    ]
    return [update for update in updates if update.key not in known], rejections


def _reply_fault(reply: Reply, cohort: Sequence[str], answered: set[str]) -> str | None:
    if reply.client not in cohort:
        return "was not asked in this round"
    if reply.client in answered:
        return "replied twice; the first reply counts"
    return reply.error


def update_fault(update: Update, client: str, seen: set[int], initial: Adapter) -> str | None:
    """Says in one line why an update cannot be used; None if it can.

    Args:
        update: As decoded.
        client: Whose reply it came in.
        seen: Slots of the same reply that came before.
        initial: v0.
    """
    if update.client != client:
        return f"slot {update.slot} claims to be of client {update.client!r}"
    if update.slot < 0:
        return f"slot is {update.slot}; allowed are numbers from 0"
    if update.slot in seen:
        return f"slot {update.slot} occurs twice"
    if update.examples < 1:
        return f"examples is {update.examples}; allowed are numbers from 1"
    return _adapter_fault(update.adapter, initial)


def _adapter_fault(adapter: Adapter, initial: Adapter) -> str | None:
    expected = expected_shapes(adapter, initial)
    for name, shape in expected.items():
        if name not in adapter:
            return f"tensor {name} is missing"
        if adapter[name].shape != shape:
            return f"tensor {name} has shape {list(adapter[name].shape)}; expected {list(shape)}"
    for name in adapter:
        if name not in expected:
            return f"tensor {name} is not part of the adapter"
    for name, tensor in adapter.items():
        if tensor.dtype != np.float32:
            return f"tensor {name} is {tensor.dtype}; expected float32"
        if not np.isfinite(tensor).all():
            return f"tensor {name} has values that are not finite"
        if tensor.size and float(np.abs(tensor).max()) > LARGEST:
            return f"tensor {name} has the value {float(np.abs(tensor).max()):.3g}; allowed are up to {LARGEST:g}"
    if head_keys(initial) and not head_keys(adapter):
        return "it has no head"
    return None


def expected_shapes(adapter: Adapter, initial: Adapter) -> Mapping[str, tuple[int, ...]]:
    """v0's body and those of v0's heads of which the adapter holds a part."""
    held = {name[len(HEAD) :].rpartition(".")[0] for name in adapter if is_head(name)}
    return {
        name: tensor.shape
        for name, tensor in initial.items()
        if not is_head(name) or name[len(HEAD) :].rpartition(".")[0] in held
    }
