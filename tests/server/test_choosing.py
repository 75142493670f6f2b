"""K by prediction, against sums written out slot by slot; confidence against numbers by hand."""

from functools import partial

import numpy as np
import pytest

from fltac.server.choosing import choose_k, confidence, held_out_residual
from fltac.server.spectrum import leading


def residual_by_hand(rows: np.ndarray, labels: np.ndarray) -> float:
    """The same from the features themselves."""
    total = 0.0
    for index, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != index and labels[j] == labels[index]]
        others = others or [j for j in range(len(rows)) if j != index]
        total += float(((row - rows[others].mean(axis=0)) ** 2).sum())
    return total / float((rows**2).sum())


@pytest.mark.parametrize("labels", [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
def test_the_residual_is_that_of_each_slot_from_the_others_of_its_group(labels: list[int]) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 4))
    found = held_out_residual(rows @ rows.T, np.array(labels))
    assert found == pytest.approx(residual_by_hand(rows, np.array(labels)))


def test_nothing_learned_leaves_nothing_to_predict() -> None:
    assert held_out_residual(np.zeros((3, 3)), np.zeros(3, int)) == 0.0
    assert held_out_residual(np.ones((1, 1)), np.zeros(1, int)) == 0.0


def planted(groups: int, owners: int, noise: float, seed: int) -> tuple[list[np.ndarray], list[str], np.ndarray]:
    """Two views of slots: each owner has each group once."""
    draw = np.random.default_rng(seed)
    truth = np.tile(np.arange(groups), owners)
    views = []
    for _ in range(2):
        centres = draw.standard_normal((groups, 40))
        views.append(centres[truth] + noise * draw.standard_normal((len(truth), 40)))
    return views, [f"c{number // groups}" for number in range(len(truth))], truth


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("linked", [False, True])
def test_planted_groups_are_counted(groups: int, linked: bool) -> None:
    (first, second), owners, _ = planted(groups, 8, 0.8, seed=groups)
    kernels = first @ first.T, second @ second.T
    views = [(partial(leading, kernels[0]), kernels[1]), (partial(leading, kernels[1]), kernels[0])]
    choice = choose_k(views, owners if linked else None, 5, 0)
    assert choice.k == groups
    assert min(choice.residuals, key=choice.residuals.__getitem__) == groups


def test_noise_alone_is_not_split_and_one_slot_is_one_group() -> None:
    draw = np.random.default_rng(3)
    first, second = draw.standard_normal((2, 30, 500))
    views = [(partial(leading, first @ first.T), second @ second.T)]
    assert choose_k(views, None, 5, 0).k == 1
    one = np.ones((1, 1))
    assert choose_k([(partial(leading, one), one)], ["a"], 5, 0).k == 1


def test_cannot_link_bounds_k_from_below() -> None:
    (first, second), _, _ = planted(2, 8, 0.5, seed=1)
    views = [(partial(leading, first @ first.T), second @ second.T)]
    owners = [f"c{number // 4}" for number in range(16)]
    assert choose_k(views, owners, 5, 0).k >= 4


def test_k_stays_unless_another_is_better_by_the_share() -> None:
    (first, second), _, _ = planted(3, 8, 0.8, seed=3)
    views = [(partial(leading, first @ first.T), second @ second.T)]
    free = choose_k(views, None, 5, 0)
    assert free.k == 3
    gain = 1 - free.residuals[3] / free.residuals[4]
    assert choose_k(views, None, 5, 0, before=4, share=gain / 2).k == 3
    assert choose_k(views, None, 5, 0, before=4, share=gain * 1.01).k == 4


def test_confidence_by_hand() -> None:
    points = np.array([[0.0], [1.0], [4.0], [6.0]])
    found = confidence(points, np.array([0, 0, 1, 1]))
    # The first: 1 from its group without itself, 5 from the other; 1 - 1/5.
    assert found.tolist() == pytest.approx([1 - 1 / 5, 1 - 1 / 4, 1 - 2 / 3.5, 1 - 2 / 5.5])
    wrong = confidence(points, np.array([0, 1, 1, 1]))
    assert wrong[0] == 0.0  # alone
    assert wrong[1] == pytest.approx(1 / 4 - 1)  # 4 from its group without itself, 1 from the other
    assert confidence(points, np.zeros(4, int)).tolist() == [0.0] * 4
