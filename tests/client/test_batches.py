"""Which rows a round visits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fltac.client.batches import BatchKey, make_batches, visited_rows

KEY = BatchKey(seed=3, round_number=2, client="a", slot=1)


@given(n=st.integers(1, 40), visits=st.integers(1, 100))
def test_every_row_is_visited_equally_often_up_to_one(n: int, visits: int) -> None:
    rows = np.arange(100, 100 + n)
    visited = visited_rows(rows, visits, KEY)
    counts = np.bincount(visited, minlength=100 + n)[100:]
    assert counts.sum() == visits
    assert counts.max() - counts.min() <= 1


@given(n=st.integers(1, 40), steps=st.integers(1, 12), size=st.integers(1, 9))
def test_batching_by_length_visits_the_same_rows(n: int, steps: int, size: int) -> None:
    rows = np.arange(n)
    lengths = (rows * 7) % 11
    shuffled = make_batches(rows, lengths, steps, size, "shuffled", KEY)
    by_length = make_batches(rows, lengths, steps, size, "length", KEY)
    assert shuffled.shape == by_length.shape == (steps, size)
    assert sorted(shuffled.ravel()) == sorted(by_length.ravel())


def test_batches_by_length_overlap_in_length_at_their_ends_only() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    batches = make_batches(np.arange(200), lengths, 25, 8, "length", KEY)
    ends = sorted((lengths[batch].min(), lengths[batch].max()) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ends))
    assert [lengths[batch].min() for batch in batches] != [low for low, _ in ends], "the batches are not shuffled"


def test_slots_with_equal_steps_take_their_long_batches_at_the_same_time() -> None:
    lengths = np.arange(100)
    one = make_batches(np.arange(50), lengths, 5, 10, "length", KEY)
    other = make_batches(np.arange(50, 100), lengths, 5, 10, "length", BatchKey(3, 2, "b", 0))
    assert list(np.argsort(one.mean(axis=1))) == list(np.argsort(other.mean(axis=1)))


@pytest.mark.parametrize(
    "key", [BatchKey(4, 2, "a", 1), BatchKey(3, 1, "a", 1), BatchKey(3, 2, "b", 1), BatchKey(3, 2, "a", 0)]
)
def test_the_order_depends_on_seed_round_client_and_slot(key: BatchKey) -> None:
    rows = np.arange(50)
    assert list(visited_rows(rows, 50, key)) != list(visited_rows(rows, 50, KEY))
    assert list(visited_rows(rows, 50, KEY)) == list(visited_rows(rows, 50, KEY))
