"""A client's choice: planted losses by hand, rows that are scored, rows that are held back."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fltac.client.assignment as module
from fltac.client.assignment import assignment_rows, choose, least, mean_loss
from fltac.client.batches import hold_back
from fltac.client.client import Client, LocalTask, local_task, reply_of
from fltac.client.training import Trained, TrainJob
from fltac.config import Config, load_config
from fltac.records import Request


def config(*overrides: str) -> Config:
    return load_config({"backbone": {"name": "x"}, "tasks": ["sst2"], "method": "ifca"}, overrides)


def test_each_slot_takes_the_least_loss_the_first_of_equal_ones() -> None:
    assert least(np.array([[0.5, 0.2, 0.9], [0.3, 0.1, 0.1]]), distinct=False) == [1, 1]


def test_distinct_slots_take_the_least_sum() -> None:
    """Apart both want the second; the first slot loses 0.1 by giving it up, the second 0.5."""
    losses = np.array([[0.3, 0.2, 0.9], [0.6, 0.1, 0.7]])
    assert least(losses, distinct=False) == [1, 1]
    assert least(losses, distinct=True) == [0, 1]


def test_more_slots_than_candidates_fill_each_evenly() -> None:
    losses = np.array([[0.1, 0.2], [0.1, 0.9], [0.1, 0.3]])
    assert least(losses, distinct=True) == [1, 0, 0]
    assert least(losses[:, :1], distinct=True) == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("distinct", [True, False])
def test_a_loss_that_is_not_finite_is_worse_than_any_other(bad: float, distinct: bool) -> None:
    losses = np.array([[bad, 1e6, 2e6], [0.5, bad, 0.4]])
    assert least(losses, distinct=distinct) == [1, 2]
    assert least(np.full((2, 2), bad), distinct=False) == [0, 0]


def test_the_matching_is_not_blunted_by_a_loss_that_is_not_finite() -> None:
    losses = np.array([[np.inf, 0.30, 0.31], [np.inf, 0.10, 0.13]])
    assert least(losses, distinct=True) == [2, 1]


def test_a_balanced_loss_is_the_mean_of_the_classes_means() -> None:
    losses, labels = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 2])
    assert mean_loss(losses, labels, balanced=False) == 2.0
    assert mean_loss(losses, labels, balanced=True) == 3.0
    assert mean_loss(losses, labels.astype(np.float32), balanced=True) == 2.0, "a regression has no classes"


class Train:
    lengths = np.arange(100)[::-1].copy()


TASK: Any = SimpleNamespace(train=Train(), name="x")


def test_held_back_rows_are_never_trained_on_and_the_same_wherever_they_lie() -> None:
    rows = np.arange(50, 90)
    trained, held = hold_back(rows, 0.25, 3, "a", 1)
    assert (len(trained), len(held)) == (30, 10)
    assert sorted([*trained, *held]) == list(rows)
    again = hold_back(np.arange(40), 0.25, 3, "a", 1)
    np.testing.assert_array_equal(again[0] + 50, trained)
    assert not np.array_equal(hold_back(rows, 0.25, 4, "a", 1)[1], held)
    assert not np.array_equal(hold_back(rows, 0.25, 3, "a", 2)[1], held)


@pytest.mark.parametrize(
    ("rows", "share", "expected"), [(1, 0.5, (1, 0)), (2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (9, 0.0, (9, 0))]
)
def test_something_is_left_to_train_on(rows: int, share: float, expected: tuple[int, int]) -> None:
    trained, held = hold_back(np.arange(rows), share, 0, "a", 0)
    assert (len(trained), len(held)) == expected


def test_a_task_is_scored_on_what_it_holds_back_else_on_training_rows() -> None:
    rows = np.arange(10, 50)
    kept = local_task(TASK, rows, "2", config("server.clustering.held_back=0.5", "training.epochs=1"), "a", 0)
    assert (len(kept.rows), len(kept.held), kept.steps) == (20, 20, 3)
    few = config("server.clustering.assignment_rows=8")
    scored = assignment_rows(kept, few, 1, "a", 0)
    assert len(set(scored)) == 8
    assert set(scored) <= set(kept.held)
    assert list(scored) == sorted(scored, reverse=True), "the shortest first"
    plain = local_task(TASK, rows, "2", few, "a", 0)
    assert set(assignment_rows(plain, few, 1, "a", 0)) <= set(rows)
    assert not np.array_equal(assignment_rows(plain, few, 2, "a", 0), assignment_rows(plain, few, 1, "a", 0))
    assert len(assignment_rows(plain, config(), 1, "a", 0)) == 40, "fewer rows than asked for"


def test_a_choice_turns_candidates_into_slots_and_goes_into_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {0: [0.9, 0.1, 0.5], 4: [0.8, 0.2, 0.3]}
    monkeypatch.setattr(module, "slot_losses", lambda model, client, slot, *_: np.array(planted[slot]))
    model: Any = None
    local = LocalTask(TASK, np.arange(3), "2", 1)
    client = Client("a", {4: (local,), 0: (local,)})
    request = Request(1, "a", {0: 7}, {7: {}, 8: {}, 9: {}}, None, (7, 8, 9))
    free = choose(model, client, request, {}, config())
    assert free.slots == {0: 8, 4: 8}
    apart = choose(model, client, request, {}, config("server.clustering.cannot_link=true"))
    assert apart.slots == {0: 8, 4: 9}
    job = TrainJob("a", 4, {}, (), 3, 0)
    assert [update.cluster for update in reply_of(client, [Trained(job, {}, 0.0)], apart).updates] == [9]
    decided = Request(1, "a", {4: 7}, {7: {}}, None)
    assert choose(model, client, decided, {}, config()) is decided
    assert [update.cluster for update in reply_of(client, [Trained(job, {}, 0.0)], decided).updates] == [None]
