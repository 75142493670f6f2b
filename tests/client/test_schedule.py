"""Which adapters share a pass."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fltac.client.schedule import LanePlan, plan_passes

sizes = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=6)
plans = st.builds(LanePlan, st.integers(1, 5), st.integers(1, 400), st.booleans())


def arrays(own: list[list[int]]) -> list[np.ndarray]:
    return [np.array(one) for one in own]


@given(sizes, plans)
def test_everybody_makes_all_steps_within_the_limits(own: list[list[int]], plan: LanePlan) -> None:
    done = [0] * len(own)
    for numbers in plan_passes(arrays(own), plan):
        assert len(set(numbers)) == len(numbers) <= plan.lanes
        upcoming = [own[number][done[number]] for number in numbers]
        tokens = sum(upcoming) if plan.packed else max(upcoming) * len(upcoming)
        assert len(numbers) == 1 or tokens <= plan.tokens
        for number in numbers:
            done[number] += 1
    assert done == [len(one) for one in own]


def test_padded_batches_of_like_length_go_together() -> None:
    own = [[10, 50], [11, 51], [50, 10], [51, 11]]
    passes = plan_passes(arrays(own), LanePlan(2, 1000))
    assert len(passes) == 4
    done = [0] * 4
    for one, other in passes:
        assert abs(own[one][done[one]] - own[other][done[other]]) <= 1
        done[one] += 1
        done[other] += 1


def test_packed_batches_fill_a_pass_whatever_their_length() -> None:
    passes = plan_passes(arrays([[70, 70], [20, 20], [30, 30], [10, 10]]), LanePlan(64, 100, packed=True))
    # 70 + 20 + 10 fit; 30 goes first in the second pass, with 70; the rest together.
    assert passes == [[0, 1, 3], [0, 2], [1, 2, 3]]


def test_all_come_to_their_end_together() -> None:
    """Twenty steps and two: the short one is not done long before the end."""
    for packed in (False, True):
        passes = plan_passes(arrays([[5] * 20, [5] * 2]), LanePlan(1, 100, packed))
        turns = [index for index, numbers in enumerate(passes) if numbers == [1]]
        assert turns[-1] > 10


def test_short_batches_fill_a_pass_with_more_adapters() -> None:
    short = plan_passes(arrays([[80]] * 12), LanePlan(64, 800))
    long = plan_passes(arrays([[800]] * 12), LanePlan(64, 800))
    assert [len(numbers) for numbers in short] == [10, 2]
    assert [len(numbers) for numbers in long] == [1] * 12
