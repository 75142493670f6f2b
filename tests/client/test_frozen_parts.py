"""Training on a base, at a smaller rank, and of one factor alone, against plain training that must be the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.test_training import SCALING, make_job, make_model
from fltac.client.client import Client, reply_of
from fltac.client.schedule import LanePlan
from fltac.client.training import Trained, TrainJob, train
from fltac.config import TrainingConfig
from fltac.model.lanes import LaneModel
from fltac.records import Adapter

CONFIG = TrainingConfig(lr=1e-2, weight_decay=0.1)
BASE_RANK = 3


def plan(packed: bool) -> LanePlan:
    return LanePlan(4, 10**6, packed)


def with_base(job: TrainJob, model: LaneModel) -> TrainJob:
    draw = np.random.default_rng(9)
    base = {}
    for path in model.layers:
        base[path + ".base_A"] = draw.normal(size=(BASE_RANK, 16)).astype(np.float32) * 0.2
        base[path + ".base_B"] = draw.normal(size=(16, BASE_RANK)).astype(np.float32) * 0.2
    return replace(job, start={**job.start, **base})


def merge_into_weights(model: LaneModel, base: Adapter) -> None:
    for path, layer in model.layers.items():
        product = torch.from_numpy(base[path + ".base_B"].astype(np.float64) @ base[path + ".base_A"])
        layer.base.weight.data += SCALING * product  # type: ignore[operator]


def assert_close(one: Adapter, other: Adapter) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_base_is_as_good_as_changed_weights(tiny_bert: Path, packed: bool, dropout: float) -> None:
    """Of two adapters in one pass, one has a base; dropout is the adapters' alone."""
    model = make_model(tiny_bert, torch.float64, packed)
    jobs = [with_base(make_job(model, "a", 1, 5), model), make_job(model, "b", 2, 5)]
    changed, plain = train(model, jobs, CONFIG, dropout, plan(packed))
    assert not any("base" in name for name in changed.adapter)
    other = make_model(tiny_bert, torch.float64, packed)
    (same,) = train(other, [jobs[1]], CONFIG, dropout, plan(packed))
    assert_close(plain.adapter, same.adapter)
    (bare,) = train(other, [make_job(other, "a", 1, 5)], CONFIG, dropout, plan(packed))
    merge_into_weights(other, jobs[0].start)
    (expected,) = train(other, [make_job(other, "a", 1, 5)], CONFIG, dropout, plan(packed))
    assert_close(changed.adapter, expected.adapter)
    assert changed.loss == pytest.approx(expected.loss, rel=1e-5)
    assert changed.loss != pytest.approx(bare.loss, rel=1e-3), "the base does nothing"


def test_a_smaller_rank_trains_as_in_a_model_of_that_rank(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float64)
    job = make_job(model, "a", 1, 5)
    cut = {
        name: x[:1] if name.endswith("lora_A") else x[:, :1] if name.endswith("lora_B") else x
        for name, x in job.start.items()
    }
    small = replace(job, start=cut)
    (trained,) = train(model, [small], CONFIG, 0.0, plan(False))
    modules = dict.fromkeys(model.layers, (16, 16))
    model.restore()
    backbone = make_model(tiny_bert, torch.float64).backbone
    fresh = LaneModel(unwrapped(backbone, modules), modules, 1, SCALING, torch.float64)
    (expected,) = train(fresh, [small], CONFIG, 0.0, plan(False))
    (update,) = reply_of(Client("a", {}), [trained]).updates
    assert_close(update.adapter, expected.adapter)


def unwrapped(backbone, modules):  # type: ignore[no-untyped-def]
    """The backbone with its own layers where lanes were."""
    for path in modules:
        parent, _, name = path.rpartition(".")
        holder = backbone.model.get_submodule(parent)
        setattr(holder, name, getattr(holder, name).base)
    return backbone


@pytest.mark.parametrize("frozen", [".lora_A", ".lora_B"])
def test_a_frozen_factor_stays_and_is_not_uploaded(tiny_bert: Path, frozen: str) -> None:
    model = make_model(tiny_bert, torch.float32)
    jobs = [replace(make_job(model, client, seed, 5), frozen=frozen) for seed, client in enumerate("ab")]
    trained: list[Trained] = train(model, jobs, CONFIG, 0.0, plan(False))
    for job, result in zip(jobs, trained, strict=True):
        moved = {name for name, tensor in job.start.items() if not np.array_equal(tensor, result.adapter[name])}
        assert moved == {name for name in job.start if not name.endswith(frozen)}
        (update,) = reply_of(Client(job.client, {}), [result]).updates
        assert set(update.adapter) == moved
