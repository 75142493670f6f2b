"""Every random choice of a run, derived from (seed, purpose, round, client, slot).

Nothing depends on the order in which clients are visited: each choice has its own generator, keyed by what it
is for. Purposes in use: ``partition``, ``task-cap``, ``client-labels``, ``client-rows``, ``client-quarter``, ``slots``,
``validation-split``, ``validation-rows``, ``initial-adapter``, ``initial-head-<key>``, ``cohort``, ``batches``,
``batch-order``, ``interleave``, ``dropout``, ``clustering``, ``embedding``, ``choose-k``, ``subspace``,
``sketch <tensor>``, ``random-groups``, ``evaluation-rows``, ``profile-rows``, ``profile-noise``, ``first-cluster``,
``assignment-rows``, ``held-back``, ``fresh-factors``, ``gradients``, ``gradient-outputs``, ``probes``,
``probes <tensor>``, ``images <tensor>``, ``augment``, ``two-sines-data``, ``two-sines-<arm>-<width>``;
with seed 0, whatever the run's, ``quarter-turns``, ``digits-halves``, ``digits-vit-weights``, ``digits-vit-batches``.
"""

import hashlib
from typing import Final

import numpy as np

NO_CLIENT: Final = ""
NO_SLOT: Final = -1


def derive(seed: int, purpose: str, round_number: int = 0, client: str = NO_CLIENT, slot: int = NO_SLOT) -> int:
    """Returns a 63-bit integer that is a fixed function of its arguments (SHA-256, the same on all machines)."""
    text = "\x1f".join((str(seed), purpose, str(round_number), client, str(slot)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(
    seed: int, purpose: str, round_number: int = 0, client: str = NO_CLIENT, slot: int = NO_SLOT
) -> np.random.Generator:
    """Returns the NumPy generator of one random choice; see :func:`derive` for the key."""
    return np.random.default_rng(derive(seed, purpose, round_number, client, slot))
