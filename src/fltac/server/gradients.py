"""What each slot says at first, from v0: its gradients, and what its first training changed. Kept, and not added to.

In ``ServerState.memory`` a slot has, beside what ``server.changes`` keeps of its first training, the tensor
``gradients``: ``[directions, width]``, the sketches of all adapted matrices one after the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fltac.config import GRADIENT_DIRECTIONS, ServerSettings
from fltac.config.clustering import Compared
from fltac.records import LORA_A, Adapter, ServerState, SlotKey, Update, lora_modules
from fltac.server.changes import BLOCK, Changes, profiles_sent, remember
from fltac.server.sketch import VectorSketch

GRADIENTS = "gradients"


@dataclass(frozen=True)
class First:
    """Of all slots that ever sent gradients, in the same order.

    Attributes:
        gradients: As if they were changes of A, of several rounds; no heads.
        changes: Of A and of the heads in the first training of each.
    """

    gradients: Changes
    changes: Changes

    def memory(self) -> dict[SlotKey, Adapter]:
        """By slot, as ``ServerState`` holds it."""
        kept = self.changes.memory()
        return {
            key: {**kept[key], GRADIENTS: row} for key, row in zip(self.changes.keys, self.gradients.body, strict=True)
        }


def compared(initial: Adapter, settings: ServerSettings) -> Compared | None:
    """What the rule ``spectral`` compares in a run, in all its rounds; None with other rules.

    Args:
        initial: v0.
        settings: The server's.
    """
    return settings.clustering.compared(bool(lora_modules(initial)))


def gathered(state: ServerState, updates: Sequence[Update], began: Mapping[SlotKey, Adapter], seed: int) -> First:
    """Adds the slots whose gradients came with this round's updates to those that are known.

    Args:
        state: Before the round; not changed.
        updates: Checked; what a slot has sent before stays, whatever comes now.
        began: What each of the updates began from: those with gradients from v0.
        seed: Of the run.
    """
    new = [update for update in updates if update.gradients is not None and update.key not in state.memory]
    changes = remember(state, new, began, 1.0, seed, of_a=True, most=1)
    index = {key: row for row, key in enumerate(changes.keys)}
    changes = replace(changes, profiles=profiles_sent(state, updates, index))
    initial = state.initial
    inputs = {module + LORA_A: initial[module + LORA_A].shape[1] for module in lora_modules(initial)}
    # As wide as the changes' sketches: of those of the widest matrix nothing more is kept.
    width = max((columns.stop - columns.start for columns in changes.modules), default=0)
    sketches = {name: VectorSketch.draw(seed, name, size, width) for name, size in inputs.items()}
    ends = np.cumsum([0, *(sketch.width for sketch in sketches.values())]).tolist()
    edges = [slice(*pair) for pair in pairwise(ends)]
    body = np.zeros((len(index), GRADIENT_DIRECTIONS, ends[-1]), dtype=np.float32)
    for key, held in state.memory.items():
        body[index[key]] = held[GRADIENTS]
    step = max(1, BLOCK // max([1, *inputs.values()]) // GRADIENT_DIRECTIONS)
    for start in range(0, len(new), step):
        part = new[start : start + step]
        rows = [index[update.key] for update in part]
        own = np.empty((len(part), GRADIENT_DIRECTIONS, ends[-1]), dtype=np.float32)
        for (name, sketch), columns in zip(sketches.items(), edges, strict=True):
            sent = np.concatenate([(update.gradients or {})[name] for update in part])
            own[:, :, columns] = sketch(sent).reshape(len(part), GRADIENT_DIRECTIONS, -1)
        body[rows] = own
    return First(replace(changes, body=body, modules=tuple(edges), heads={}), changes)
