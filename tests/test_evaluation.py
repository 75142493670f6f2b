"""Scores of what was received, and the clustering against the truth."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fltac import evaluation
from fltac.config import Config, load_config
from fltac.evaluation import Holding, best_match_accuracy, clustering_record, evaluation_rows, score_state
from fltac.records import Cluster, RoundReport, ServerState


@dataclass(frozen=True)
class Rows:
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    name: str
    validation: Rows
    metric: str = "accuracy"
    kind: str = "text"


def adapter(value: float, heads: tuple[str, ...] = ("2",)) -> dict[str, np.ndarray]:
    body = {"m.lora_A": np.full((1, 2), value, np.float32), "m.lora_B": np.full((2, 1), value, np.float32)}
    for key in heads:
        body[f"head.{key}.weight"] = np.full((2, 2), value, np.float32)
        body[f"head.{key}.bias"] = np.zeros(2, np.float32)
    return body


TASKS: dict[str, Any] = {
    "one": Task("one", Rows(np.array([3, 1, 2, 5]), np.array([1, 1, 0, 0]))),
    "two": Task("two", Rows(np.array([1, 1, 1, 1]), np.array([1, 1, 1, 0]))),
}
HOLDINGS = [Holding("a", 0, "one", "2"), Holding("a", 1, "two", "2"), Holding("b", 0, "one", "2")]


def config() -> Config:
    return load_config({"backbone": {"name": "x"}, "tasks": ["sst2"]})


def state(*clusters: Cluster) -> ServerState:
    return ServerState(1, adapter(0.0), ("a", "b"), clusters)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Replaces the model: an adapter of ones answers 1, any other 0; notes what was scored."""
    seen: list[tuple[float, str]] = []

    def predict(_model: Any, given: Any, _key: str, task: Task, rows: np.ndarray, _size: int) -> np.ndarray:
        seen.append((float(given["m.lora_A"][0, 0]), task.name))
        answer = int(given["m.lora_A"][0, 0] == 1.0)
        return np.eye(2)[np.full(len(rows), answer)]

    monkeypatch.setattr(evaluation, "predict_logits", predict)
    return seen


def test_every_client_is_scored_by_what_it_received(calls: list[tuple[float, str]]) -> None:
    clusters = (
        Cluster(0, adapter(1.0), (("a", 0), ("a", 1))),
        Cluster(1, adapter(2.0), (("b", 0),)),
    )
    scores = score_state(None, state(*clusters), HOLDINGS, TASKS, config(), None)  # type: ignore[arg-type]
    # "one": half of the labels are 1, so both adapters score .5; "two": three of four are 1.
    assert scores["one"].record() == {"metric": "accuracy", "score": 0.5, "worst_client": 0.5, "n_eval": 4}
    assert scores["two"].score == 0.75
    assert sorted(calls) == [(1.0, "one"), (1.0, "two"), (2.0, "one")]


def test_no_pair_is_scored_twice_and_the_worst_client_is_kept(calls: list[tuple[float, str]]) -> None:
    holdings = [Holding(client, 0, "two", "2") for client in "abcd"]
    clusters = (
        Cluster(0, adapter(1.0), (("a", 0), ("b", 0), ("c", 0))),
        Cluster(1, adapter(2.0), (("d", 0),)),
    )
    scores = score_state(None, state(*clusters), holdings, TASKS, config(), None)  # type: ignore[arg-type]
    assert scores["two"].score == pytest.approx((3 * 0.75 + 0.25) / 4)
    assert scores["two"].worst_client == 0.25
    assert len(calls) == 2


def test_a_slot_without_a_cluster_holds_the_first_adapter(calls: list[tuple[float, str]]) -> None:
    scores = score_state(None, state(), HOLDINGS, TASKS, config(), None)  # type: ignore[arg-type]
    assert scores["two"].score == 0.25
    assert sorted(calls) == [(0.0, "one"), (0.0, "two")]


def test_evaluation_rows_are_a_fixed_subset_the_shortest_first() -> None:
    task = TASKS["one"]
    assert list(evaluation_rows(task, None, 0)) == [1, 2, 0, 3]
    subset = evaluation_rows(task, 2, 0)
    assert len(subset) == 2
    assert list(subset) == list(evaluation_rows(task, 2, 0))
    assert list(task.validation.lengths[subset]) == sorted(task.validation.lengths[subset])


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.5),
        ([0, 0, 1, 1, 2], [0, 0, 0, 0, 0], 0.4),
        ([0, 0, 0, 1], [0, 1, 2, 3], 0.5),
    ],
)
def test_best_match_accuracy(truth: list[int], found: list[int], expected: float) -> None:
    assert best_match_accuracy(truth, found) == pytest.approx(expected)


def test_clustering_record() -> None:
    clusters = (
        Cluster(0, adapter(1.0), (("a", 0), ("b", 0))),
        Cluster(4, adapter(2.0), (("a", 1),)),
    )
    report = RoundReport(1, ("a", "b"), 3, (), 2, 0.25)
    record = clustering_record(state(*clusters), report, HOLDINGS)
    assert record == {"k": 2, "ari": 1.0, "accuracy": 1.0, "silhouette": 0.25}
    assert clustering_record(state(*clusters), RoundReport(1, (), 0, (), None, None), HOLDINGS) is None


def test_an_adapter_that_has_not_changed_is_not_scored_again(calls: list[tuple[float, str]]) -> None:
    known: dict[evaluation.ScoreKey, float] = {}

    def scored(second: float, max_rows: int | None = None) -> dict[str, float]:
        clusters = (
            Cluster(0, adapter(1.0), (("a", 0), ("a", 1))),
            Cluster(1, adapter(second), (("b", 0),)),
        )
        scores = score_state(None, state(*clusters), HOLDINGS, TASKS, config(), max_rows, known)  # type: ignore[arg-type]
        return {name: score.score for name, score in scores.items()}

    first = scored(2.0)
    assert len(calls) == 3
    assert scored(2.0) == first
    assert len(calls) == 3
    scored(3.0)
    assert calls[3:] == [(3.0, "one")]
    scored(3.0, max_rows=2)
    assert len(calls) == 7, "other rows are other scores"
    scored(2.0, max_rows=2)
    assert calls[7:] == [(2.0, "one")], "what nobody holds any more is forgotten"
