"""Scores of a task's predictions: accuracy, F1 and Matthews by scikit-learn, Pearson by SciPy.

The metric ``loss`` of language models is made of token losses, not of predictions: see ``fltac.evaluation``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fltac.errors import InputError

Numbers = NDArray[Any]
"""Class numbers or real numbers."""


def score(metric: str, predictions: Numbers, labels: Numbers) -> float:
    """Scores predictions against labels.

    Args:
        metric: ``accuracy``, ``f1`` (of class 1 where there are two classes, else the mean over classes),
            ``matthews`` or ``pearson``.
        predictions: ``[n]`` class numbers, or real numbers for Pearson.
        labels: ``[n]`` of the same kind, n >= 1.

    Returns:
        The score. F1 without any positive is 0, and so are the correlations where one side is constant or a
        prediction is not finite.

    Raises:
        InputError: an unknown metric.
        ValueError: no rows, or different numbers of them.
    """
    if metric not in METRICS:
        raise InputError(f"metric: got {metric!r}; allowed are {', '.join(METRICS)}")
    if len(predictions) != len(labels) or len(labels) == 0:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return METRICS[metric](np.asarray(predictions), np.asarray(labels))


def predictions_from_logits(metric: str, logits: Numbers) -> Numbers:
    """What outputs ``[n, outputs]`` of a head predict: ``[n]`` class numbers, or the value for Pearson."""
    if metric == "pearson":
        return np.asarray(logits[:, 0])
    return np.asarray(logits.argmax(axis=1), dtype=np.int64)


def _accuracy(predictions: Numbers, labels: Numbers) -> float:
    return float(accuracy_score(labels, predictions))


def _f1(predictions: Numbers, labels: Numbers) -> float:
    classes = 1 + max(int(predictions.max()), int(labels.max()))
    return float(f1_score(labels, predictions, average="binary" if classes <= 2 else "macro", zero_division=0))


def _matthews(predictions: Numbers, labels: Numbers) -> float:
    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: Numbers, labels: Numbers) -> float:
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    if not np.isfinite(x).all() or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(pearsonr(x, y).statistic)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
}
