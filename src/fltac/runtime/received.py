"""Whether a data owner can train from what it was sent, in words that may leave the machine."""

from collections.abc import Mapping

import numpy as np

from fltac.records import BASE_A, BASE_B, HEAD, LORA_A, LORA_B, Adapter, Request, is_base, is_head
from fltac.runtime.owner import Owner


def received_fault(
    request: Request, initial: Adapter | None, slot: int, heads: Mapping[str, tuple[int, int]], owner: Owner
) -> str | None:
    """Says in one line why a slot cannot start from what was received; None if it can."""
    cluster = request.slots.get(slot)
    received = initial if cluster is None else request.adapters[cluster]
    if received is None:
        return "it has no cluster yet, and the first adapter v0 was not sent"
    if cluster is not None and (frozen := owner.config.server.aggregation.frozen(request.round_number)):
        # Factors that are never trained are not sent again.
        kept = {name: tensor for name, tensor in (initial or {}).items() if name.endswith(frozen)}
        received = {**kept, **received}
    rank = owner.config.lora.rank_of(owner.client.id)
    expected = {name: _at_rank(name, shape, rank) for name, shape in owner.model.body_shapes.items()}
    fault = _base_fault(received, owner.model.body_shapes)
    if fault is not None:
        return fault
    for key, (outputs, hidden) in heads.items():
        expected |= {f"{HEAD}{key}.weight": (outputs, hidden), f"{HEAD}{key}.bias": (outputs,)}
    for name in received:
        if not is_head(name) and not is_base(name) and name not in expected:
            return f"tensor {name} is not part of this client's adapter"
    for name, shape in expected.items():
        tensor = received.get(name, (initial or {}).get(name) if is_head(name) else None)
        if tensor is None:
            return f"tensor {name} is missing"
        if tensor.shape != shape:
            return f"tensor {name} has shape {list(tensor.shape)}; expected {list(shape)}"
        if not np.isfinite(tensor).all():
            return f"tensor {name} has values that are not finite"
    return None


def _at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A body tensor's shape for a client of this rank."""
    if name.endswith(LORA_A):
        return (rank, *shape[1:])
    return (*shape[:1], rank) if name.endswith(LORA_B) else shape


def _base_fault(received: Adapter, body_shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the bases: both factors of an adapted module, of one rank, finite."""
    for name in filter(is_base, received):
        module = name.removesuffix(BASE_A).removesuffix(BASE_B)
        if module + LORA_A not in body_shapes:
            return f"tensor {name} is not part of this client's adapter"
        pair = received.get(module + BASE_B), received.get(module + BASE_A)
        outputs, inputs = body_shapes[module + LORA_B][0], body_shapes[module + LORA_A][1]
        if any(part is None or part.ndim != 2 for part in pair):
            return f"tensor {name} has no counterpart, or is no matrix"
        b, a = (part for part in pair if part is not None)
        if b.shape != (outputs, len(a)) or a.shape[1] != inputs:
            return f"tensor {name} is of a base {list(b.shape)} {list(a.shape)}; expected {[outputs]} by {[inputs]}"
        if not (np.isfinite(b).all() and np.isfinite(a).all()):
            return f"tensor {name} has values that are not finite"
    return None
