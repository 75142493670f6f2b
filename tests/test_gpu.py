"""The same code on a CUDA device; where there is none, nothing of this can be said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fltac
from client.test_client_gradients import QUICKSTART, asked
from client.test_training import ALONE, PACKED, SETTINGS, TOGETHER, largest_difference, make_job, make_model, make_task
from fltac.client.client import plan_jobs
from fltac.client.gradients import Gradients, gradients, plan_gradients
from fltac.client.training import TrainJob, train
from fltac.config import BackboneConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.trial import keeps_lanes_apart
from fltac.runtime.setup import prepare
from language import make_language_model
from model import test_causal

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_lanes_on_a_gpu_equal_one_lane_on_a_cpu(
    tiny_bert: Path, dtype: torch.dtype, tolerance: float, packs: bool
) -> None:
    plain = make_model(tiny_bert, dtype)
    jobs = [make_job(plain, name, seed) for seed, name in enumerate("abc")]
    expected = train(plain, jobs, SETTINGS["adamw"], 0.0, ALONE)
    fast = make_model(tiny_bert, dtype, packs)
    use_own_attention(fast.backbone.model)
    fast.backbone.model.to(DEVICE)
    found = train(fast, jobs, SETTINGS["adamw"], 0.0, PACKED if packs else TOGETHER)
    for one, other in zip(expected, found, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < tolerance


def test_lanes_are_seen_to_be_apart_on_a_gpu(tiny_bert: Path) -> None:
    """Rows alone and together go through other kernels, whose rounding must not be taken for a mixture."""
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device=DEVICE), "text")
    use_own_attention(backbone.model)
    names = [name for name, _ in backbone.model.named_modules() if name.endswith((".query", ".value"))]
    model = LaneModel(backbone, dict.fromkeys(names, (16, 16)), rank=5, scaling=16.0)
    rows = make_task(0).train
    assert keeps_lanes_apart(model, [rows.batch(np.array([row]), 12) for row in (0, 1)])


def test_bfloat16_on_a_gpu_trains(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    model.backbone.model.to(DEVICE, torch.bfloat16)
    job = make_job(model, "a", seed=1)
    result = train(model, [job], SETTINGS["adamw"], 0.0, TOGETHER)[0]
    assert np.isfinite(result.loss)
    assert largest_difference(dict(result.adapter), dict(job.start)) > 1e-2


@pytest.mark.parametrize("packs", [False, True])
def test_lanes_with_other_heads_equal_one_lane_on_a_cpu(tiny_bert: Path, packs: bool) -> None:
    plain = make_model(tiny_bert, torch.float64)
    jobs = [make_job(plain, str(seed), seed, outputs=outputs) for seed, outputs in enumerate((2, 3, 2, 20))]
    jobs[0] = replace(jobs[0], steps=[replace(step, rows=step.rows[:2]) for step in jobs[0].steps])
    expected = train(plain, jobs, SETTINGS["adamw"], 0.0, ALONE)
    fast = make_model(tiny_bert, torch.float64, packs)
    use_own_attention(fast.backbone.model)
    fast.backbone.model.to(DEVICE)
    found = train(fast, jobs, SETTINGS["adamw"], 0.0, PACKED if packs else TOGETHER)
    for one, other in zip(expected, found, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < 1e-9


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_language_models_equal_one_lane_on_a_cpu(tmp_path: Path, architecture: str, packs: bool) -> None:
    folder = make_language_model(tmp_path / architecture, architecture)
    plain = test_causal.make_model(folder)
    jobs = [test_causal.make_job(plain, seed) for seed in range(3)]
    expected = train(plain, jobs, SETTINGS["adamw"], 0.0, ALONE)
    fast = test_causal.make_model(folder, packs=packs)
    fast.backbone.model.to(DEVICE)
    found = train(fast, jobs, SETTINGS["adamw"], 0.0, PACKED if packs else TOGETHER)
    # Llama's rotary angles are float32 in transformers whatever the precision, and differ between devices.
    tolerance = 1e-5 if architecture == "llama" else 1e-9
    for one, other in zip(expected, found, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < tolerance


def test_a_clients_first_gradients_and_a_vits_lanes_on_a_gpu_equal_those_on_a_cpu() -> None:
    """Images of the quickstart's digits, in float32 with the lanes that the device is given."""
    seen: list[list[Gradients]] = []
    adapters = []
    for device in ("cpu", DEVICE):
        settings = ["federation.clients=3", "server.clustering.gradient_batches=3", "training.precision=float32"]
        settings += [f"backbone.device={device}", "training.steps=5"]
        experiment = prepare(fltac.load_config(QUICKSTART, settings))
        config, plan = experiment.config, ALONE if device == "cpu" else TOGETHER
        first, jobs = list[TrainJob](), list[TrainJob]()
        for request in asked(experiment):
            client, initial = experiment.clients[request.client], request.initial or {}
            first += plan_gradients(client, request, initial, config)
            jobs += plan_jobs(client, request, initial, config)
        seen.append(gradients(experiment.model, first, config.training, plan))
        adapters.append(train(experiment.model, jobs, config.training, 0.0, plan))
    for one, other in zip(*seen, strict=True):
        assert (one.client, one.slot) == (other.client, other.slot)
        for name, rows in one.directions.items():
            moment, found = rows.T @ rows, other.directions[name].T @ other.directions[name]
            np.testing.assert_allclose(found, moment, atol=1e-3)
    for trained, again in zip(*adapters, strict=True):
        assert largest_difference(dict(trained.adapter), dict(again.adapter)) < 2e-3
