"""Which adapters share a pass."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fltac.client.schedule import LanePlan, plan_passes

lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=6)
plans = st.builds(LanePlan, st.integers(1, 5), st.integers(1, 400))


def arrays(own: list[list[int]]) -> list[np.ndarray]:
    return [np.array(one) for one in own]


@given(lengths, plans)
def test_everybody_makes_all_steps_within_the_limits(own: list[list[int]], plan: LanePlan) -> None:
    done = [0] * len(own)
    for numbers in plan_passes(arrays(own), 4, plan):
        assert len(set(numbers)) == len(numbers) <= plan.lanes
        longest = max(own[number][done[number]] for number in numbers)
        assert len(numbers) == 1 or longest * 4 * len(numbers) <= plan.tokens
        for number in numbers:
            done[number] += 1
    assert done == [len(one) for one in own]


def test_batches_of_like_length_go_together() -> None:
    own = [[10, 50], [11, 51], [50, 10], [51, 11]]
    passes = plan_passes(arrays(own), 1, LanePlan(2, 1000))
    assert len(passes) == 4
    done = [0] * 4
    for one, other in passes:
        assert abs(own[one][done[one]] - own[other][done[other]]) <= 1
        done[one] += 1
        done[other] += 1


def test_all_come_to_their_end_together() -> None:
    """Twenty steps and two: the short one is not done long before the end."""
    passes = plan_passes(arrays([[5] * 20, [5] * 2]), 1, LanePlan(1, 100))
    turns = [index for index, numbers in enumerate(passes) if numbers == [1]]
    assert turns[-1] > 10


def test_short_batches_fill_a_pass_with_more_adapters() -> None:
    short = plan_passes(arrays([[10]] * 12), 8, LanePlan(64, 800))
    long = plan_passes(arrays([[100]] * 12), 8, LanePlan(64, 800))
    assert [len(numbers) for numbers in short] == [10, 2]
    assert [len(numbers) for numbers in long] == [1] * 12
