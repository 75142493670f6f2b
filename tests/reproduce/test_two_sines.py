"""The two-sines experiment: its sizes, that nets which train together do not touch each other, and what it shows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fltac.errors import InputError
from fltac.reproduce.figure3 import make
from fltac.reproduce.registry import reproduce
from fltac.reproduce.two_sines import ARMS, errors, small_width, trained
from fltac.runtime.progress import Silent
from reproduce.experiments import order, read


@pytest.mark.parametrize("width", [3, 5, 8, 16, 33])
def test_two_small_nets_have_no_more_parameters_than_one(width: int) -> None:
    """A net of width w has w weights in, w shifts, w weights out and one offset."""
    small = small_width(width)
    assert 2 * (3 * small + 1) <= 3 * width + 1 < 2 * (3 * (small + 1) + 1)
    assert small < width / 2


def test_two_small_nets_are_below_one_of_the_same_total_at_small_width() -> None:
    """Width 7 against two of 3. One net that is not told the task cannot be below sin(1/4)^2 / 2 in the mean."""
    found = errors(7, range(3), points=100, epochs=600)
    one, two = found.of["one"].mean(axis=0), found.of["two"].mean(axis=0)
    assert found.small == 3
    assert (two < one).all()
    assert one.mean() > np.sin(0.25) ** 2 / 2


def test_untrained_nets_are_no_better_than_zero() -> None:
    """One epoch at a small rate: the error is about that of answering 0, the mean of sin^2."""
    found = errors(5, range(4), points=50, epochs=1)
    assert all(0.2 < values.mean() < 1.0 for values in found.of.values())


def test_nets_that_train_together_do_not_touch_each_other() -> None:
    """The second net's rows change; the first one's answers do not."""
    draw = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(2, 30, 1, generator=draw), torch.randn(2, 30, generator=draw)
    other = targets * torch.tensor([[1.0], [-2.0]])
    first, second = (
        trained(rows, wanted, rows, 4, 20, [torch.Generator().manual_seed(1)]) for wanted in (targets, other)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_a_seeds_errors_do_not_depend_on_the_other_seeds() -> None:
    few, many = (errors(5, seeds, points=20, epochs=5).of for seeds in ([1], [0, 1, 2]))
    for arm in ARMS:
        assert few[arm][0] == pytest.approx(many[arm][1], rel=1e-4)
        assert few[arm][0] != pytest.approx(many[arm][0], rel=1e-2)


def test_the_figure_is_written_with_its_numbers(tmp_path: Path) -> None:
    wanted = order("figure3", tmp_path / "out", tmp_path, "epochs=2", "points=5", seeds=2)
    made, output = reproduce(wanted, Silent())
    assert all(path.stat().st_size > 0 for path in output.files(made))
    rows = read(tmp_path / "out" / "figure3.json")["rows"]
    assert {(row["arm"], row["task"]) for row in rows} == {(a, t) for a in ("one", "told", "two") for t in (0, 1)}
    assert all(row["seeds"] == 2 and row["std"] is not None for row in rows)
    first = (tmp_path / "out" / "figure3.svg").read_bytes()
    reproduce(wanted, Silent())
    assert (tmp_path / "out" / "figure3.svg").read_bytes() == first


@pytest.mark.parametrize("override", ["epochs=0", "points=many", "rank=2"])
def test_wrong_settings(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=override.partition("=")[0]):
        make(order("figure3", tmp_path, tmp_path, override), Silent())
