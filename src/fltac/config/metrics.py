"""The names of metrics, and which way is better; everything that compares scores asks here."""

from collections.abc import Iterable, Sequence
from typing import Literal

Metric = Literal["accuracy", "f1", "matthews", "pearson", "loss"]

LOWER_IS_BETTER = frozenset({"loss"})
"""``loss``: mean negative log-likelihood of a response's tokens, in nats. Of all other metrics, higher is better."""


def higher_is_better(metrics: Iterable[str]) -> bool | None:
    """Whether a higher number is better under all of these metrics; None where they do not agree, or there are none."""
    found = {metric not in LOWER_IS_BETTER for metric in metrics}
    return found.pop() if len(found) == 1 else None


def worst(metric: str, scores: Sequence[float]) -> float:
    """The worst of some scores."""
    return max(scores) if metric in LOWER_IS_BETTER else min(scores)


HIGHEST_LOSS = 100.0
"""Nats; what a loss that is higher, or not a number, is reported as by a data owner. A guess is at log(vocabulary)."""
