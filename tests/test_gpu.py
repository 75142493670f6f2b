"""The same code on a CUDA device; where there is none, nothing of this can be said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.test_training import ALONE, PACKED, SETTINGS, TOGETHER, largest_difference, make_job, make_model, make_task
from fltac.client.training import train
from fltac.config import BackboneConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.trial import keeps_lanes_apart

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
    fast.backbone.model.to("cuda")
    found = train(fast, jobs, SETTINGS["adamw"], 0.0, PACKED if packs else TOGETHER)
    for one, other in zip(expected, found, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < tolerance


def test_lanes_are_seen_to_be_apart_on_a_gpu(tiny_bert: Path) -> None:
    """Rows alone and together go through other kernels, whose rounding must not be taken for a mixture."""
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cuda"), "text")
    use_own_attention(backbone.model)
    names = [name for name, _ in backbone.model.named_modules() if name.endswith((".query", ".value"))]
    model = LaneModel(backbone, dict.fromkeys(names, (16, 16)), rank=5, scaling=16.0)
    rows = make_task(0).train
    assert keeps_lanes_apart(model, [rows.batch(np.array([row]), 12) for row in (0, 1)])


def test_bfloat16_on_a_gpu_trains(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    model.backbone.model.to("cuda", torch.bfloat16)
    job = make_job(model, "a", seed=1)
    result = train(model, [job], SETTINGS["adamw"], 0.0, TOGETHER)[0]
    assert np.isfinite(result.loss)
    assert largest_difference(dict(result.adapter), dict(job.start)) > 1e-2
