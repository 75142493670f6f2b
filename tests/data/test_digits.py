"""The built-in digits: two halves that share nothing, and four tasks that ask about the same images."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fltac.data.digits import POSITIVE, halves, pretraining_rows, task_rows
from fltac.data.task_presets import DIGITS, TASK_PRESETS

ANSWERS = {
    #                 0  1  2  3  4  5  6  7  8  9
    "digits-parity": [0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
    "digits-high": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    "digits-loop": [1, 0, 0, 0, 1, 0, 1, 0, 1, 1],
    "digits-three": [1, 0, 0, 1, 0, 0, 1, 0, 0, 1],
}


def test_the_halves_share_no_row_and_leave_none_out() -> None:
    first, second = halves(load_digits().target.astype(np.int64))
    assert sorted([*first, *second]) == list(range(1797))
    assert len(pretraining_rows()[0]) + len(task_rows("digits-parity")[0]) == 1797


def test_no_image_is_in_both_halves() -> None:
    first = {image.tobytes() for image in pretraining_rows()[0]}
    assert first.isdisjoint(image.tobytes() for image in task_rows("digits-parity")[0])


def test_every_digit_is_split_equally() -> None:
    digits = load_digits().target.astype(np.int64)
    first, second = (np.bincount(digits[rows], minlength=10) for rows in halves(digits))
    assert np.abs(first - second).max() <= 1


def test_every_preset_has_an_answer() -> None:
    presets = {name for name, preset in TASK_PRESETS.items() if preset.path == DIGITS}
    assert presets == set(POSITIVE) == set(ANSWERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_labels(name: str) -> None:
    digits = load_digits().target.astype(np.int64)
    _, rows = halves(digits)
    images, labels = task_rows(name)
    assert labels.dtype == np.int64
    assert labels.tolist() == [ANSWERS[name][digit] for digit in digits[rows]]
    np.testing.assert_array_equal(images, task_rows("digits-parity")[0])


def test_the_tasks_contradict_each_other() -> None:
    labels = np.stack([task_rows(name)[1] for name in ANSWERS])
    agreement = (labels[:, None] == labels[None]).mean(axis=2)
    # The closest pair, a loop and a multiple of three, differs in three digits of ten.
    assert agreement[~np.eye(len(ANSWERS), dtype=bool)].max() < 0.75


def test_pixels_fill_a_byte() -> None:
    digits = load_digits()
    _, rows = halves(digits.target.astype(np.int64))
    images, _ = task_rows("digits-parity")
    assert images.dtype == np.uint8
    assert images.shape == (898, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_allclose(images, digits.images[rows] * 255 / 16, atol=0.5)


def test_the_pretraining_half_has_the_digits_themselves() -> None:
    images, digits = pretraining_rows()
    assert images.dtype == np.uint8
    assert digits.dtype == np.int64
    assert images.shape == (899, 8, 8)
    assert sorted(set(digits.tolist())) == list(range(10))
