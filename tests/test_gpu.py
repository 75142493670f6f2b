"""The same code on a CUDA device; where there is none, nothing of this can be said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.test_training import ALONE, PACKED, SETTINGS, TOGETHER, largest_difference, make_job, make_model
from fltac.client.training import train
from fltac.model.attention import use_own_attention

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


def test_bfloat16_on_a_gpu_trains(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    model.backbone.model.to("cuda", torch.bfloat16)
    job = make_job(model, "a", seed=1)
    result = train(model, [job], SETTINGS["adamw"], 0.0, TOGETHER)[0]
    assert np.isfinite(result.loss)
    assert largest_difference(dict(result.adapter), dict(job.start)) > 1e-2
