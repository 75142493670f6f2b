"""How large a pass may be, and what is kept of the frozen layers."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client.test_training import make_model, make_task
from fltac.client.schedule import POOL
from fltac.config import TrainingConfig
from fltac.model.prefix import Prefix
from fltac.runtime import lane_setup, setup
from fltac.runtime.lane_setup import (
    admit_to_prefix,
    bytes_per_token,
    choose_plan,
    choose_precision,
    fast_tokens,
    some_rows,
)
from runtime.owners import federation


def test_a_pass_holds_what_is_fast_or_what_fits(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = make_model(tiny_bert, torch.float32, packs=True), make_task(0)
    each = bytes_per_token(model, task)  # type: ignore[arg-type]
    auto = TrainingConfig()
    monkeypatch.setattr(lane_setup, "free_memory", lambda _: 2**60)
    assert choose_plan(auto, model, task, 1) == lane_setup.LanePlan(POOL, 1536, packed=True)  # type: ignore[arg-type]
    monkeypatch.setattr(lane_setup, "free_memory", lambda _: int(each * 200))
    assert choose_plan(auto, model, task, 1).tokens in (99, 100)  # type: ignore[arg-type]
    tight = choose_plan(TrainingConfig(lanes=3), model, task, 2)  # type: ignore[arg-type]
    assert tight.workers == 1, "two passes of three batches of eight rows do not fit"
    monkeypatch.setattr(lane_setup, "free_memory", lambda _: 2**60)
    fixed = choose_plan(TrainingConfig(lanes=3), model, task, 2)  # type: ignore[arg-type]
    assert (fixed.lanes, fixed.tokens, fixed.workers) == (3, lane_setup.NO_LIMIT, 2)


@pytest.mark.parametrize(
    ("device", "kind", "parameters", "tokens"),
    [
        ("cuda", "text", 22_700_000, 65536),
        ("cuda", "image", 50_000_000, 50000),
        ("cuda", "text", 7_000_000_000, 16384),
        ("cuda", "causal-lm", 22_700_000, 16384),
        ("cpu", "text", 22_700_000, 1536),
    ],
)
def test_a_small_backbone_gets_larger_passes_on_a_gpu(device: str, kind: str, parameters: int, tokens: int) -> None:
    """1e13 operations at four for each parameter and token, between 16,384 and 65,536 tokens."""
    model = SimpleNamespace(num_parameters=lambda: parameters)
    backbone = SimpleNamespace(device=torch.device(device), kind=kind, model=model)
    assert fast_tokens(backbone) == tokens  # type: ignore[arg-type]


def test_the_activations_of_a_token_are_measured(tiny_bert: Path) -> None:
    """A BERT of 2 layers x 16 with 32 in between keeps, for each token and layer, at least its two wide activations,
    its queries, keys and values, and what enters each: some hundreds of float32 numbers, not thousands."""
    model, task = make_model(tiny_bert, torch.float32, packs=True), make_task(0)
    per_layer = bytes_per_token(model, task) / 4 / 2  # type: ignore[arg-type]
    assert 2 * 32 + 5 * 16 < per_layer < 1500


def test_rows_from_the_shortest_to_the_longest_are_tried() -> None:
    task = make_task(3)
    lengths = task.train.lengths[some_rows(task.train)]  # type: ignore[arg-type]
    assert lengths[0] == task.train.lengths.min()
    assert lengths[-1] == task.train.lengths.max()


@dataclass(frozen=True)
class Rows:
    """A split of rows of ten tokens."""

    count: int

    @property
    def fingerprint(self) -> str:
        return f"{self.count} rows"

    @property
    def lengths(self) -> np.ndarray:
        return np.full(self.count, 10)

    def __len__(self) -> int:
        return self.count


def test_the_smallest_splits_that_fit_are_kept(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    model.prefix = Prefix(model.backbone.model, "encoder.layer", 1)
    row = 10 * 16 * 4
    visits = [(Rows(40), 1000), (Rows(10), 1000), (Rows(2000), 20)]  # 20 of the last one's rows are read
    admit_to_prefix(model, visits, 35 * row)  # type: ignore[arg-type]
    assert model.prefix.admitted == {"10 rows", "2000 rows"}


def test_precision_is_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(lane_setup, "multiplies_bfloat16", lambda has=has: has)
        assert choose_precision(TrainingConfig(), cpu) == expected
        assert choose_precision(TrainingConfig(precision="float32"), cpu) == torch.float32


def test_rows_of_profiles_and_of_a_choice_by_loss_are_counted_as_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else more is kept below the first adapted layer than ``training.prefix_cache`` allows."""
    seen: list[int] = []
    monkeypatch.setattr(setup, "admit_to_prefix", lambda _, visits, __: seen.append(visits[0][1]))
    steps = ("training.steps=1", "training.batch_size=1", "federation.partition.rule=iid")
    choice = ("method=ifca", "server.clustering.assignment_rows=2")
    batches = "server.clustering.gradient_batches=3"
    without, profiled = ("server.clustering.features=a",), (batches, "server.clustering.profile_rows=5")
    for more in (without, (batches,), profiled, choice, (*choice, "server.clustering.held_back=0.5")):
        setup.prepare(federation(tmp_path, *steps, *more))
    rows = 81  # of 90 of the task are training rows; 27 are at each of three clients, which hold 14 back
    assert seen == [3 * 2, 3 * (2 + 3), 3 * (2 + 3 + 5), 3 * (2 + 2 * 2), 3 * 2 + 3 * round(rows / 6)]
