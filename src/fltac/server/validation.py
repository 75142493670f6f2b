"""Checks every upload before anything is computed from it; what fails is left out, named, and the round goes on."""

from collections.abc import Container, Mapping, Sequence

import numpy as np

from fltac.config import GRADIENT_DIRECTIONS, ServerSettings
from fltac.config.aggregation import STEPPING
from fltac.records import (
    LORA_A,
    LORA_B,
    Adapter,
    LateReply,
    Rejection,
    Reply,
    Request,
    SlotKey,
    Update,
    at_rank,
    is_head,
    lora_modules,
)
from fltac.server.beside import FLOAT32, choice_fault, profile_fault
from fltac.server.gradients import compared

LARGEST = 1e6
"""An upload with a larger number has diverged, and its square would leave float32's accuracy in a mean."""

LARGEST_PRODUCT = 6e4
"""Likewise of an upload's ``B A`` where a rule decomposes products: its singular values have to be sent, perhaps in
float16, which ends at 65504."""

Shapes = Mapping[str, tuple[int, ...]]


class Expected:
    """The names and shapes that an upload has to have: v0's body, and those of v0's heads of which it holds a part.

    Of the body only what is trained in the round, at the client's rank.
    """

    def __init__(self, initial: Adapter, frozen: str | None = None, rank: int | None = None) -> None:
        """Args:
        initial: v0.
        frozen: The ending of the names of factors that are not uploaded.
        rank: Of the client's factors; None for v0's.
        """
        trained = {name: x for name, x in initial.items() if is_head(name) or not frozen or not name.endswith(frozen)}
        initial = trained if rank is None else at_rank(trained, rank)
        self._body = {name: tensor.shape for name, tensor in initial.items() if not is_head(name)}
        self._heads: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, tensor in initial.items():
            if is_head(name):
                self._heads.setdefault(name.rpartition(".")[0], {})[name] = tensor.shape
        self._whole: dict[tuple[str, ...], Shapes] = {}
        self.hidden = next(
            (tensor.shape[1] for name, tensor in initial.items() if is_head(name) and tensor.ndim == 2), 0
        )

    def of(self, adapter: Adapter) -> Shapes:
        """By name; without any head for an adapter that lacks all of v0's."""
        held = tuple(head for head, parts in self._heads.items() if any(name in adapter for name in parts))
        if held not in self._whole:
            self._whole[held] = self._body | {name: shape for head in held for name, shape in self._heads[head].items()}
        return self._whole[held]

    def lacks_head(self, shapes: Shapes) -> bool:
        """Whether v0 has heads and these shapes of an upload none."""
        return bool(self._heads) and len(shapes) == len(self._body)


class Expectations:
    """What is expected of each client in a round."""

    def __init__(self, initial: Adapter, settings: ServerSettings, round_number: int) -> None:
        """Args:
        initial: v0, whose names, shapes and head keys every upload has to have.
        settings: The server's.
        round_number: The round that the clients were asked in.
        """
        self._initial, self._settings = initial, settings
        self._frozen = settings.aggregation.frozen(round_number)
        self.noise = settings.clustering.profile_noise
        self.decomposed = settings.aggregation.rule not in STEPPING
        self.by_gradients = compared(initial, settings) == "gradients"
        self._by_rank: dict[int | None, Expected] = {}
        self.gradients = Expected(
            {
                name: np.empty((GRADIENT_DIRECTIONS, tensor.shape[1]), dtype=np.float32)
                for name, tensor in initial.items()
                if name.endswith(LORA_A) and not is_head(name)
            }
        )

    def of(self, client: str) -> Expected:
        """Of one client's uploads."""
        rank = self._settings.ranks.get(client)
        if rank not in self._by_rank:
            self._by_rank[rank] = Expected(self._initial, self._frozen, rank)
        return self._by_rank[rank]


def accept_updates(
    replies: Sequence[Reply],
    requests: Sequence[Request],
    expectations: Expectations,
) -> tuple[list[Update], list[Rejection]]:
    """Sorts the replies of a round into updates to use and rejections.

    Args:
        replies: In any order.
        requests: What was sent, one to each client of the cohort.
        expectations: Of their uploads.

    Returns:
        The updates sorted by (client, slot), and one rejection for each reply or update that cannot be used,
        a client of the cohort without a reply included.
    """
    updates: list[Update] = []
    rejections: list[Rejection] = []
    asked = {request.client: request for request in requests}
    answered: set[str] = set()
    for reply in sorted(replies, key=lambda reply: reply.client):
        reason = _reply_fault(reply, asked, answered)
        answered.add(reply.client)
        if reason is not None:
            rejections.append(Rejection(reply.client, None, reason))
            continue
        seen, expected, request = set[int](), expectations.of(reply.client), asked[reply.client]
        for update in reply.updates:
            fault = update_fault(update, reply.client, seen, expected)
            fault = fault or choice_fault(update, request.candidates)
            fault = fault or profile_fault(update, request.profile, expected.hidden, expectations.noise)
            due = expectations.by_gradients and update.slot not in request.slots and not request.candidates
            fault = fault or gradients_fault(update, due, expectations.gradients)
            fault = fault or (product_fault(update.adapter) if expectations.decomposed else None)
            seen.add(update.slot)
            if fault is None:
                updates.append(update)
            else:
                rejections.append(Rejection(reply.client, update.slot, fault))
    silent = [client for client in asked if client not in answered]
    rejections += [Rejection(client, None, "no reply") for client in silent]
    return sorted(updates, key=lambda update: update.key), rejections


def accept_late(
    late: LateReply, known: Container[SlotKey], initial: Adapter, settings: ServerSettings
) -> tuple[list[Update], list[Rejection]]:
    """Says what of a reply that came after its round's deadline can be used in the round that is being finished.

    Args:
        late: The reply with the request that it answers.
        known: The slots that have an update of this round already.
        initial: v0.
        settings: The server's; they say whether such replies are used at all.
    """
    client, number = late.request.client, late.request.round_number
    if late.reply.error is not None:
        return [], [Rejection(client, None, f"late, of round {number}: {late.reply.error}")]
    if settings.stale == "drop":
        return [], [Rejection(client, None, f"its reply to round {number} came after the deadline")]
    updates, rejections = accept_updates([late.reply], [late.request], Expectations(initial, settings, number))
    newer = [update for update in updates if update.key in known]
    rejections += [
        Rejection(client, update.slot, f"its update of round {number} came after a newer one") for update in newer
    ]
    return [update for update in updates if update.key not in known], rejections


def _reply_fault(reply: Reply, cohort: Container[str], answered: set[str]) -> str | None:
    if reply.client not in cohort:
        return "was not asked in this round"
    if reply.client in answered:
        return "replied twice; the first reply counts"
    return reply.error


def update_fault(update: Update, client: str, seen: set[int], expected: Expected) -> str | None:
    """Says in one line why an update cannot be used; None if it can.

    Args:
        update: As decoded.
        client: Whose reply it came in.
        seen: Slots of the same reply that came before.
        expected: From v0.
    """
    if update.client != client:
        return f"slot {update.slot} claims to be of client {update.client!r}"
    if update.slot < 0:
        return f"slot is {update.slot}; allowed are numbers from 0"
    if update.slot in seen:
        return f"slot {update.slot} occurs twice"
    if update.examples < 1:
        return f"examples is {update.examples}; allowed are numbers from 1"
    return _adapter_fault(update.adapter, expected)


def gradients_fault(update: Update, due: bool, expected: Expected) -> str | None:
    """Says in one line what is wrong with an update's gradients; None if they can be used.

    Args:
        update: As decoded.
        due: Whether it is the slot's first update by which it is compared.
        expected: Their names and shapes.
    """
    if update.gradients is None:
        return "has no gradients, by which slots are compared" if due else None
    if not due:
        return "has gradients that were not asked for"
    fault = _adapter_fault(update.gradients, expected)
    return None if fault is None else f"gradients: {fault}"


def product_fault(adapter: Adapter) -> str | None:
    """Says in one line which product may be too large to be sent once it is decomposed; None if none is."""
    for module in lora_modules(adapter):
        a, b = (np.linalg.norm(adapter[module + part].astype(np.float64)) for part in (LORA_A, LORA_B))
        if a * b > LARGEST_PRODUCT:
            return f"the norms of the factors of {module} are {a:.3g} and {b:.3g}; allowed are up to " + (
                f"{LARGEST_PRODUCT:g} for their product"
            )
    return None


def _adapter_fault(adapter: Adapter, expected: Expected) -> str | None:
    shapes = expected.of(adapter)
    if not _is_sound(adapter, shapes):
        for name, shape in shapes.items():
            if name not in adapter:
                return f"tensor {name} is missing"
            if adapter[name].shape != shape:
                return f"tensor {name} has shape {list(adapter[name].shape)}; expected {list(shape)}"
        for name in adapter:
            if name not in shapes:
                return f"tensor {name} is not part of the adapter"
        for name, tensor in adapter.items():
            if tensor.dtype != FLOAT32:
                return f"tensor {name} is {tensor.dtype}; expected float32"
            if not np.isfinite(tensor).all():
                return f"tensor {name} has values that are not finite"
            if tensor.size and float(np.abs(tensor).max()) > LARGEST:
                return f"tensor {name} has the value {float(np.abs(tensor).max()):.3g}; allowed are up to {LARGEST:g}"
    return "it has no head" if expected.lacks_head(shapes) else None


def _is_sound(adapter: Adapter, shapes: Shapes) -> bool:
    """True if names, shapes and values are as they have to be, by one fast pass; False says nothing.

    No value can be too large, or not a number, where the sum of the squares is small.
    """
    if adapter.keys() != shapes.keys():
        return False
    tensors = [adapter[name] for name in shapes]
    for tensor, shape in zip(tensors, shapes.values(), strict=True):
        if tensor.shape != shape or tensor.dtype is not FLOAT32:
            return False
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.concatenate(tensors, axis=None)
        return bool(values.dot(values) < LARGEST**2)
