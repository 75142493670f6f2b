"""Scores against numbers computed by hand."""

import numpy as np
import pytest

from fltac.data.metrics import predictions_from_logits, score
from fltac.errors import InputError


def test_accuracy() -> None:
    assert score("accuracy", np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


def test_f1_of_class_1() -> None:
    # 2 true positives, 1 false positive, 1 false negative: precision 2/3, recall 2/3.
    assert score("f1", np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])) == pytest.approx(2 / 3)
    assert score("f1", np.array([0, 0]), np.array([0, 1])) == 0.0


def test_f1_of_three_classes_is_the_mean_over_classes() -> None:
    # F1 of class 0: 1; of class 1: precision 1/2, recall 1 -> 2/3; of class 2: 0.
    assert score("f1", np.array([0, 1, 1]), np.array([0, 1, 2])) == pytest.approx((1 + 2 / 3) / 3)


def test_matthews() -> None:
    # tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2).
    assert score("matthews", np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])) == pytest.approx(1 / 6)
    assert score("matthews", np.array([1, 1]), np.array([0, 1])) == 0.0


def test_pearson() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 1.0, 4.0, 6.0], dtype=np.float32)
    centred_x, centred_y = x - x.mean(), y - y.mean()
    expected = (centred_x @ centred_y) / np.sqrt((centred_x @ centred_x) * (centred_y @ centred_y))
    assert score("pearson", x, y) == pytest.approx(expected)
    assert score("pearson", -x, y) == pytest.approx(-expected)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([3.0, 3.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0, np.nan], [1.0, 2.0]), ([1.0], [1.0])],
)
def test_pearson_without_a_correlation_is_zero(predictions: list[float], labels: list[float]) -> None:
    assert score("pearson", np.array(predictions), np.array(labels)) == 0.0


def test_predictions() -> None:
    logits = np.array([[0.1, 0.9, 0.3], [2.0, -1.0, 1.0]])
    assert predictions_from_logits("accuracy", logits).tolist() == [1, 0]
    assert predictions_from_logits("accuracy", logits).dtype == np.int64
    assert predictions_from_logits("pearson", np.array([[0.5], [-2.0]])).tolist() == [0.5, -2.0]


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="metric: got 'bleu'; allowed are accuracy, f1, matthews, pearson"):
        score("bleu", np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        score("accuracy", np.array([1, 0]), np.array([1]))
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        score("accuracy", np.array([]), np.array([]))
