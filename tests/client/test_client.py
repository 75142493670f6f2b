"""What a client trains for a request, and what it continues from."""

from typing import Any

import numpy as np
import pytest

from fltac.client.batches import BatchKey, make_batches
from fltac.client.client import Client, LocalTask, plan_jobs, start_adapter
from fltac.config import Config, load_config
from fltac.records import Request


class Rows:
    lengths = np.arange(40)


class Task:
    train = Rows()

    def __init__(self, name: str) -> None:
        self.name = name


def config(**training: Any) -> Config:
    settings = {"steps": 3, "batch_size": 4, **training}
    return load_config({"backbone": {"name": "x"}, "tasks": ["sst2"], "training": settings})


def tensors(value: float, *heads: str) -> dict[str, np.ndarray]:
    out = {"m.lora_A": np.full((1, 2), value, np.float32), "m.lora_B": np.full((2, 1), value, np.float32)}
    for key in heads:
        out[f"head.{key}.weight"] = np.full((int(key), 2), value, np.float32)
        out[f"head.{key}.bias"] = np.full(int(key), value, np.float32)
    return out


V0 = tensors(0.5, "2", "3")


def local(name: str, first: int, steps: int = 3, key: str = "2") -> LocalTask:
    return LocalTask(Task(name), np.arange(first, first + 10), key, steps)  # type: ignore[arg-type]


def test_a_slot_continues_from_its_clusters_adapter_and_head() -> None:
    request = Request(2, "a", {0: 4}, {4: tensors(7.0, "2")}, None)
    start = start_adapter(request, 0, ["2"], V0)
    assert {float(tensor.flat[0]) for tensor in start.values()} == {7.0}
    assert set(start) == set(tensors(7.0, "2"))


def test_a_head_that_the_cluster_lacks_comes_from_v0_and_others_stay_behind() -> None:
    request = Request(2, "a", {0: 4}, {4: tensors(7.0, "2")}, None)
    start = start_adapter(request, 0, ["3"], V0)
    assert start["m.lora_A"][0, 0] == 7.0
    assert start["head.3.weight"][0, 0] == 0.5
    assert "head.2.weight" not in start


def test_a_new_slot_starts_from_v0() -> None:
    start = start_adapter(Request(1, "a", {}, {}, V0), 0, ["2"], V0)
    assert set(start) == set(tensors(0.5, "2"))
    assert start["head.2.bias"][0] == 0.5


def test_a_shared_adapter_makes_the_steps_of_all_its_tasks_on_the_rows_that_they_would_visit_alone() -> None:
    tasks = (local("x", 0, steps=3), local("y", 10, steps=5, key="3"), local("z", 20, steps=2))
    (job,) = plan_jobs(Client("a", {0: tasks}), Request(1, "a", {}, {}, V0), V0, config())
    assert len(job.steps) == 10
    assert job.examples == 30
    for index, task in enumerate(tasks):
        own = sorted(tuple(step.rows) for step in job.steps if step.task.name == task.task.name)
        alone = make_batches(task.rows, Rows.lengths, task.steps, 4, "length", BatchKey(0, 1, "a", index))
        assert own == sorted(map(tuple, alone))
        assert {step.head_key for step in job.steps if step.task.name == task.task.name} == {task.head_key}
    order = [step.task.name for step in job.steps]
    assert order != sorted(order), "the tasks are mixed batch by batch"


def test_every_slot_has_a_job_of_its_own_that_depends_on_the_round() -> None:
    client = Client("a", {0: (local("x", 0),), 1: (local("y", 10),)})
    one = plan_jobs(client, Request(1, "a", {}, {}, V0), V0, config())
    two = plan_jobs(client, Request(2, "a", {}, {}, V0), V0, config())
    assert [job.slot for job in one] == [0, 1]
    assert one[0].dropout_seed != one[1].dropout_seed != two[1].dropout_seed
    assert [list(step.rows) for step in one[0].steps] != [list(step.rows) for step in two[0].steps]
    assert one[0].packed_sizes.tolist() == [int(Rows.lengths[step.rows].sum()) for step in one[0].steps]
    assert one[0].padded_sizes.tolist() == [
        len(step.rows) * int(Rows.lengths[step.rows].max()) for step in one[0].steps
    ]


@pytest.mark.parametrize(("training", "rows", "expected"), [({}, 99, 3), ({"steps": None, "epochs": 1.5}, 10, 4)])
def test_local_steps(training: dict[str, Any], rows: int, expected: int) -> None:
    from fltac.client.client import local_steps

    assert local_steps(config(**training).training, rows) == expected
