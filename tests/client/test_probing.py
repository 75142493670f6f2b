"""Probes at the client: which slots train them, on which rows, and what of them is sent."""

from typing import Any

import numpy as np
import pytest

from fltac.client.client import Client, LocalTask, plan_jobs, reply_of
from fltac.client.training import Trained
from fltac.config import Config, load_config
from fltac.errors import InputError
from fltac.records import Request
from fltac.runtime.setup import wrapped_backbone

V0 = {
    "m.lora_A": np.ones((1, 2), np.float32),
    "m.lora_B": np.zeros((2, 1), np.float32),
    "head.2.weight": np.zeros((2, 2), np.float32),
    "head.2.bias": np.zeros(2, np.float32),
}


class Rows:
    lengths = np.arange(40)


class Task:
    name, train, mirror = "x", Rows(), True


def config(probes: int, **training: Any) -> Config:
    settings = {
        "backbone": {"name": "x"},
        "tasks": ["sst2"],
        "server": {"clustering": {"probes": probes, "probe_steps": 2}},
        "training": {"batch_size": 4, "steps": 5, **training},
    }
    return load_config(settings)


def client() -> Client:
    task: Any = Task()
    first, second = (LocalTask(task, np.arange(start, start + 20), "2", 5) for start in (0, 20))
    return Client("a", {0: (first,), 1: (second,)})


def rows_of(job: Any) -> list[list[int]]:
    return [step.rows.tolist() for step in job.steps]


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_a_slot_that_begins_from_v0_trains_probes_beside(augment: str) -> None:
    first = Request(1, "a", {}, {}, V0)
    jobs = plan_jobs(client(), first, V0, config(3, augment=augment))
    assert [job.key for job in jobs] == [("a", slot, probe) for slot in (0, 1) for probe in range(4)]
    assert [len(job.steps) for job in jobs] == [5, 2, 2, 2] * 2
    for slot in (0, 1):
        own = [job for job in jobs if job.slot == slot]
        for job in own:
            assert all(job.start[name] is V0[name] for name in V0)
            assert {row // 20 for step in rows_of(job) for row in step} == {slot}
        assert len({str(rows_of(job)[:2]) for job in own}) == 4, "each visits rows of its own"
        assert len({job.dropout_seed for job in own}) == 4


def test_probes_change_nothing_of_the_slots_own_training() -> None:
    first = Request(1, "a", {}, {}, V0)
    without = plan_jobs(client(), first, V0, config(0))
    beside = [job for job in plan_jobs(client(), first, V0, config(2)) if not job.probe]
    assert [rows_of(job) for job in beside] == [rows_of(job) for job in without]
    assert [job.dropout_seed for job in beside] == [job.dropout_seed for job in without]


def test_only_new_slots_are_probed() -> None:
    later = Request(2, "a", {0: 7}, {7: V0}, V0)
    assert [job.key for job in plan_jobs(client(), later, V0, config(1))] == [("a", 0, 0), ("a", 1, 0), ("a", 1, 1)]


def test_a_reply_brings_a_and_the_heads_of_probes() -> None:
    jobs = plan_jobs(client(), Request(1, "a", {}, {}, V0), V0, config(2))
    trained = [
        Trained(job, {name: tensor + 10 * job.slot + job.probe for name, tensor in V0.items()}, 0.0) for job in jobs
    ]
    trained.sort(key=lambda result: (-result.job.probe, result.job.slot))  # in whatever order they are done
    reply = reply_of(client(), trained)
    assert [update.slot for update in reply.updates] == [0, 1]
    for update in reply.updates:
        assert float(update.adapter["m.lora_B"][0, 0]) == 10 * update.slot
        assert [sorted(probe) for probe in update.probes] == [["head.2.bias", "head.2.weight", "m.lora_A"]] * 2
        assert [float(probe["head.2.bias"][0]) for probe in update.probes] == [
            10 * update.slot + number for number in (1, 2)
        ]


def test_language_models_are_compared_by_products() -> None:
    with pytest.raises(InputError, match="causal-lm tasks are compared by products; allowed: 0, or features=a"):
        wrapped_backbone(config(2), "causal-lm")
