"""What is in a recording's uploads: how many groups they support, and how those that learned something are grouped."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from kernels import KERNELS, cosine, unsigned
from numpy.typing import NDArray
from recording import Gram, Recording
from rules import RULES
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from fltac.server.choosing import choose_k
from fltac.server.grouping import EXTRA_OF_A, SHARPNESS_OF_A
from fltac.server.pairing import paired
from fltac.server.spectrum import leading

CLEAR = 0.05
"""Points of the score that a slot has to be above the majority class to have clearly learned something."""
RIDGE = 0.25
"""Of the classifier, as a share of the kernel's diagonal."""


def described(recording: Recording, draws: int) -> dict[str, Any]:
    """All that the lab says of a recording's uploads, for its results."""
    truth = recording.truth
    return {
        "slots": len(truth),
        "tasks": len(set(truth.tolist())),
        "ceiling": ceiling(KERNELS["a+head"](recording), truth, recording.clients),
        "k": chosen(recording, True),
        "k_no_link": chosen(recording, False),
        "learned": learned(recording, draws),
    }


def ceiling(kernel: Gram, truth: NDArray[np.int64], owners: Sequence[str]) -> float:
    """ARI of a classifier that is told the tasks of all other clients' slots, with cannot-link on its answers.

    Kernel ridge regression, one client left out at a time.

    Args:
        kernel: ``[n, n]``.
        truth: ``[n]`` the task of each slot.
        owners: Its client.
    """
    clients, classes = np.asarray(owners), np.eye(int(truth.max()) + 1)[truth]
    found, ridge = np.empty(len(clients), dtype=int), RIDGE * float(np.diag(kernel).mean())
    for client in np.unique(clients):
        held, rest = np.flatnonzero(clients == client), np.flatnonzero(clients != client)
        mean = classes[rest].mean(axis=0)
        dual = np.linalg.solve(kernel[np.ix_(rest, rest)] + ridge * np.eye(len(rest)), classes[rest] - mean)
        rows, columns = linear_sum_assignment(-(kernel[np.ix_(held, rest)] @ dual))
        found[held[rows]] = columns
    return float(adjusted_rand_score(truth, found))


def chosen(recording: Recording, linked: bool) -> int:
    """K as ``server.clustering.k: auto`` chooses it."""
    grams, none = recording.grams["a"], np.zeros_like(recording.grams["head"])
    first, second = unsigned(grams[0::2], none, 0.0), unsigned(grams[1::2], none, 0.0)
    head = 0.5 * np.abs(cosine(recording.grams["head"].sum(0)))
    pairs: list[tuple[Gram, Gram]] = [(first + head, second), (second + head, first), ((first + second) / 2, head)]
    own, sharpness = list(recording.clients), SHARPNESS_OF_A if linked else 0.0
    views = [(partial(eigenvectors, paired(by, own, sharpness)), within) for by, within in pairs]
    return choose_k(views, own if linked else None, 5, 0).k


def eigenvectors(kernel: Gram, k: int) -> Gram:
    """As many as the default rule takes."""
    return leading(kernel, k + EXTRA_OF_A)


def learned(recording: Recording, draws: int) -> list[dict[str, Any]]:
    """Of the slots above the majority class, and of those clearly above: how many, of how many tasks, and their ARI.

    ARI is the mean over the draws of changes of A, of these slots in the grouping of all; None where they are of
    one task. Empty where no scores were taken.
    """
    if np.isnan(recording.scores).any():
        return []
    k = len(set(recording.truth.tolist()))
    found = [RULES["changes of A"](recording, k, start) for start in range(draws)]

    def ari(own: NDArray[np.bool_]) -> float:
        return float(np.mean([adjusted_rand_score(recording.truth[own], labels[own]) for labels in found]))

    out = []
    for margin in (0.0, CLEAR):
        own = recording.scores > recording.majority + margin
        tasks = len(set(recording.truth[own].tolist()))
        out.append({"slots": int(own.sum()), "tasks": tasks, "ari": ari(own) if tasks > 1 else None})
    return out
