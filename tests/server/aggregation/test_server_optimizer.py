"""Server optimizers against numbers computed by hand."""

import numpy as np
import pytest

from fltac.config import AggregationConfig
from fltac.records import Adapter
from fltac.server.aggregation import optimized


def one(value: float) -> Adapter:
    return {"m.lora_A": np.array([[value]], np.float32)}


def config(**settings: object) -> AggregationConfig:
    return AggregationConfig.model_validate(settings)


def test_without_an_optimizer_the_mean_is_taken() -> None:
    mean = one(3.0)
    after, moments = optimized(mean, one(1.0), {}, {"m.lora_A"}, config())
    assert after is mean
    assert moments == {}


def test_fedavgm() -> None:
    """From 1 to a mean of 3: v = 2. From there to a mean of 4: v = 0.5 * 2 + 4 - 2 = 3."""
    settings = config(optimizer="fedavgm", momentum=0.5, server_lr=0.5)
    after, moments = optimized(one(3.0), one(1.0), {}, {"m.lora_A"}, settings)
    assert after["m.lora_A"][0, 0] == 2.0
    after, _ = optimized(one(4.0), after, moments, {"m.lora_A"}, settings)
    assert after["m.lora_A"][0, 0] == 2.0 + 0.5 * 3.0


def test_fedavgm_without_momentum_at_rate_1_takes_the_mean() -> None:
    after, _ = optimized(one(4.0), one(1.0), {}, {"m.lora_A"}, config(optimizer="fedavgm", momentum=0.0))
    assert after["m.lora_A"][0, 0] == 4.0


def test_fedadam() -> None:
    """m = .2, v = .9 * .01 + .1 * 4; then d = 1: m = .9 * .2 + .1, v = .9 v + .1."""
    settings = config(optimizer="fedadam", server_lr=0.5, beta1=0.9, beta2=0.9, tau=0.1)
    after, moments = optimized(one(3.0), one(1.0), {}, {"m.lora_A"}, settings)
    first = 1.0 + 0.5 * 0.2 / (0.409**0.5 + 0.1)
    assert after["m.lora_A"][0, 0] == pytest.approx(first, rel=1e-6)
    held = after["m.lora_A"][0, 0]
    after, _ = optimized(one(float(held) + 1.0), after, moments, {"m.lora_A"}, settings)
    assert after["m.lora_A"][0, 0] == pytest.approx(held + 0.5 * 0.28 / ((0.9 * 0.409 + 0.1) ** 0.5 + 0.1), rel=1e-5)


def test_what_nobody_trained_does_not_move_by_momentum() -> None:
    settings = config(optimizer="fedavgm")
    _, moments = optimized(one(3.0), one(1.0), {}, {"m.lora_A"}, settings)
    after, kept = optimized(one(3.0), one(3.0), moments, set(), settings)
    assert after["m.lora_A"][0, 0] == 3.0
    np.testing.assert_array_equal(kept["first/m.lora_A"], moments["first/m.lora_A"])
