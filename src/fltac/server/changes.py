"""What each slot has learned since each of its rounds began, all rounds together, as sketches of fixed size.

Of each adapted matrix the change of the product ``B A``, or that of A alone (``server.clustering.features``). In
``ServerState.memory`` a slot has the tensor ``body`` with the sketches of all of them one after the other, and
``head.<key>`` for each head that it ever sent, both ``[directions, width]``. Products are summed: since sketches are
linear, that is adding numbers. Of changes of A, which are compared without their sign, the leading directions are kept
(``server.directions``): as many as the server had rounds, up to three. Beside them lies its ``profile``, if it has
sent one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fltac.records import (
    HEAD,
    LORA_A,
    LORA_B,
    Adapter,
    FloatArray,
    ServerState,
    SlotKey,
    Update,
    head_keys,
    is_head,
    lora_modules,
)
from fltac.server.directions import DIRECTIONS, added
from fltac.server.sketch import ProductSketch, VectorSketch

BODY, PROFILE = "body", "profile"
NARROWEST, WIDEST = 128, 2**13
"""Numbers kept of an adapted matrix: many where slots are few and each pair counts, few where slots are many."""
ROOM = 2**22
"""Width times the square of the number of clients, between the two."""
HEAD_WIDTH = 16
"""A head's sketch is as wide as those of so many matrices, for it counts as much as all of them."""
BLOCK = 2**18
"""Numbers gathered at a time, about what the cache holds."""


def width_for(clients: int) -> int:
    """Numbers kept of each adapted matrix of a slot: the fewer, the more clients there are.

    What the slots of a task share grows in the kernel's leading eigenvalues with the number of slots, the error of
    the sketches with the root of the number over the width.
    """
    largest = ROOM // max(1, clients) ** 2
    return max(NARROWEST, min(WIDEST, 1 << largest.bit_length() >> 1))


@dataclass(frozen=True)
class Vectors:
    """What some of the slots have: the changes of the heads of one key, or profiles.

    Attributes:
        rows: int64 ``[m]``: the slots, as indices, that ever sent such a thing; sorted.
        values: float32 ``[m, directions, width]``; of a profile there is one.
    """

    rows: NDArray[np.int64]
    values: FloatArray


@dataclass(frozen=True)
class Changes:
    """What all slots ever seen have learned.

    Attributes:
        keys: The slots, sorted.
        body: float32 ``[n, directions, sum of widths]``.
        modules: For each adapted matrix its place along the last axis of ``body``.
        heads: By head key.
        profiles: Of the rows that the slots train on, where they were asked for.
        of_a: Whether ``body`` holds changes of A alone, or gradients of it.
    """

    keys: tuple[SlotKey, ...]
    body: FloatArray
    modules: tuple[slice, ...]
    heads: Mapping[str, Vectors]
    profiles: Vectors | None = None
    of_a: bool = False

    def only(self, rows: NDArray[np.int64]) -> "Changes":
        """Of some slots, given as sorted indices."""
        place = np.full(len(self.keys), -1)
        place[rows] = np.arange(len(rows))

        def of(vectors: Vectors | None) -> Vectors | None:
            if vectors is None or not (kept := place[vectors.rows] >= 0).any():
                return None
            return Vectors(place[vectors.rows[kept]], vectors.values[kept])

        heads = {key: found for key, own in self.heads.items() if (found := of(own)) is not None}
        keys = tuple(self.keys[row] for row in rows.tolist())
        return Changes(keys, self.body[rows], self.modules, heads, of(self.profiles), self.of_a)

    def memory(self) -> dict[SlotKey, Adapter]:
        """The same by slot, as ``ServerState`` holds it: views, no copies."""
        by_slot: list[dict[str, FloatArray]] = [{BODY: row} for row in self.body]
        for key, heads in self.heads.items():
            for row, values in zip(heads.rows, heads.values, strict=True):
                by_slot[row][HEAD + key] = values
        if self.profiles is not None:
            for row, values in zip(self.profiles.rows, self.profiles.values, strict=True):
                by_slot[row][PROFILE] = values[0]
        return dict(zip(self.keys, by_slot, strict=True))


def received_by(state: ServerState) -> dict[SlotKey, Adapter]:
    """The adapter that each slot with a cluster continues from."""
    return {key: cluster.adapter for cluster in state.clusters for key in cluster.members}


def width_of(state: ServerState, of_a: bool = False) -> int:
    """Numbers kept of each adapted matrix: as many as are held of it already, whoever has joined since."""
    initial = state.initial
    sizes = [
        initial[name + LORA_A].size if of_a else len(initial[name + LORA_B]) * initial[name + LORA_A].shape[1]
        for name in lora_modules(initial)
    ]
    held = {name: values.shape[-1] for tensors in state.memory.values() for name, values in tensors.items()}

    def made(width: int) -> bool:
        heads = {
            name: sum(initial[name + part].size for part in (".weight", ".bias")) for name in held if is_head(name)
        }
        return sum(min(size, width) for size in sizes) == held[BODY] and all(
            min(size, width * HEAD_WIDTH) == held[name] for name, size in heads.items()
        )

    widths = (WIDEST >> down for down in range(WIDEST.bit_length()))
    return next(width for width in widths if made(width)) if held else width_for(len(state.clients))


def remember(
    state: ServerState,
    updates: Sequence[Update],
    began: Mapping[SlotKey, Adapter],
    decay: float,
    seed: int,
    of_a: bool = False,
    most: int = DIRECTIONS,
) -> Changes:
    """Adds to each slot's memory what it has learned since its round began.

    Args:
        state: Before the round; not changed.
        updates: Checked.
        began: What each of the updates began from; a head that it lacks was taken from v0.
        decay: Weight of what was learned in earlier rounds, for slots with an update.
        seed: Of the run.
        of_a: Of each adapted matrix the change of A alone, the same in all rounds.
        most: Directions that are kept of changes of A.
    """
    width = width_of(state, of_a)
    directions = 1
    if of_a:
        decay **= 0.5  # of directions, so that second moments have the weight itself
        directions = min(most, 1 + max((len(held[BODY]) for held in state.memory.values()), default=0))
    index = {key: row for row, key in enumerate(sorted(state.memory.keys() | {update.key for update in updates}))}
    sketches = _sketches(state.initial, width, seed, of_a)
    body, modules = _body(state, updates, began, index, decay, sketches, directions)
    held = {name[len(HEAD) :] for tensors in state.memory.values() for name in tensors if is_head(name)}
    sent = {
        key for key in head_keys(state.initial) if any(f"{HEAD}{key}.weight" in update.adapter for update in updates)
    }
    heads = {
        key: _heads(key, state, updates, began, index, decay, width * HEAD_WIDTH, seed, directions)
        for key in sorted(held | sent)
    }
    return Changes(tuple(index), body, modules, heads, profiles_sent(state, updates, index), of_a)


def profiles_sent(state: ServerState, updates: Sequence[Update], index: Mapping[SlotKey, int]) -> Vectors | None:
    """The profile that each slot of an index sent last."""
    found = {key: held[PROFILE] for key, held in state.memory.items() if PROFILE in held}
    found |= {update.key: update.profile for update in updates if update.profile is not None}
    if not found:
        return None
    slots = sorted(found.keys() & index.keys())
    return Vectors(np.array([index[slot] for slot in slots]), np.stack([found[slot] for slot in slots])[:, None])


def _sketches(initial: Adapter, width: int, seed: int, of_a: bool) -> dict[str, ProductSketch | VectorSketch]:
    """The sketch of each adapted matrix."""
    out: dict[str, ProductSketch | VectorSketch] = {}
    for module in lora_modules(initial):
        a, b = initial[module + LORA_A], initial[module + LORA_B]
        if of_a:
            out[module] = VectorSketch.draw(seed, module + LORA_A, a.size, width)
        else:
            out[module] = ProductSketch.draw(seed, module, len(b), a.shape[1], width)
    return out


def _body(
    state: ServerState,
    updates: Sequence[Update],
    began: Mapping[SlotKey, Adapter],
    index: Mapping[SlotKey, int],
    decay: float,
    sketches: Mapping[str, ProductSketch | VectorSketch],
    directions: int,
) -> tuple[FloatArray, tuple[slice, ...]]:
    """The sketches of all adapted matrices, and each one's columns."""
    initial = state.initial
    ends = np.cumsum([0, *(sketch.width for sketch in sketches.values())]).tolist()
    columns = {module: slice(*edges) for module, edges in zip(sketches, pairwise(ends), strict=True)}
    end = ends[-1]
    # The most numbers that one update becomes on the way through a sketch.
    largest = max(
        (
            max(initial[part].size, len(initial[module + LORA_A]) * sketch.width)
            for module, sketch in sketches.items()
            for part in (module + LORA_A, module + LORA_B)
        ),
        default=1,
    )
    body = np.zeros((len(index), directions, end), dtype=np.float32)
    updated = {update.key for update in updates}
    for key, held in state.memory.items():
        np.multiply(held[BODY], decay if key in updated else 1.0, out=body[index[key], : len(held[BODY])])
    groups: dict[int, list[Update]] = {}  # those that continued from the same adapter, by its identity
    for update in updates:
        groups.setdefault(id(began[update.key]), []).append(update)
    # Some updates at a time, with all their tensors: those of one lie close together.
    step = max(1, BLOCK // largest)
    parts = [group[start : start + step] for group in groups.values() for start in range(0, len(group), step)]

    for part in parts:
        base = began[part[0].key]
        rows = [index[update.key] for update in part]
        own = body[rows]
        for module, sketch in sketches.items():
            matrix = own[:, :, columns[module]]
            matrix[:] = _together(matrix, _matrix_changes(part, base, module, sketch))
        body[rows] = own
    return body, tuple(columns.values())


def _together(held: FloatArray, changes: FloatArray) -> FloatArray:
    """Of products the sum; of A, of which one direction is held where nothing is yet, the change as it is."""
    return held + changes[:, None] if held.shape[1] == 1 else added(held, changes)


def _matrix_changes(
    part: Sequence[Update], base: Adapter, module: str, sketch: ProductSketch | VectorSketch
) -> FloatArray:
    """The sketches of one matrix's changes since ``base``."""
    name_a, name_b = module + LORA_A, module + LORA_B
    a, b = base[name_a], base[name_b]
    da = np.concatenate([update.adapter[name_a] for update in part]).reshape(len(part), *a.shape) - a
    if isinstance(sketch, VectorSketch):
        return sketch(da.reshape(len(part), -1))
    db = np.concatenate([update.adapter[name_b] for update in part]).reshape(len(part), *b.shape) - b
    return sketch.change(b.T, a, db.transpose(0, 2, 1), da)


def _heads(
    key: str,
    state: ServerState,
    updates: Sequence[Update],
    began: Mapping[SlotKey, Adapter],
    index: Mapping[SlotKey, int],
    decay: float,
    width: int,
    seed: int,
    directions: int,
) -> Vectors:
    """The sketches of the heads of one key."""
    name, parts = HEAD + key, (HEAD + key + ".weight", HEAD + key + ".bias")
    updated = {update.key for update in updates}
    sent = [update for update in updates if parts[0] in update.adapter]
    slots = sorted({slot for slot, held in state.memory.items() if name in held} | {update.key for update in sent})
    place = {slot: row for row, slot in enumerate(slots)}
    size = sum(state.initial[part].size for part in parts)
    sketch = VectorSketch.draw(seed, name, size, width)
    values = np.zeros((len(slots), directions, sketch.width), dtype=np.float32)
    for slot in slots:
        if name in state.memory.get(slot, {}):
            held = state.memory[slot][name]
            np.multiply(held, decay if slot in updated else 1.0, out=values[place[slot], : len(held)])
    step = max(1, BLOCK // size)
    for start in range(0, len(sent), step):
        block = np.empty((len(sent[start : start + step]), size), dtype=np.float32)
        for row, update in zip(block, sent[start : start + step], strict=True):
            # A client takes a head that its cluster's adapter lacks from v0.
            base = began[update.key]
            change = [update.adapter[part] - base.get(part, state.initial[part]) for part in parts]
            np.concatenate([tensor.ravel() for tensor in change], out=row)
        rows = [place[update.key] for update in sent[start : start + step]]
        values[rows] = _together(values[rows], sketch(block))
    return Vectors(np.array([index[slot] for slot in slots], dtype=np.int64), values)
