"""One lane against plain PEFT training, and G lanes against G separate runs, on equal batches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from fltac.client.losses import Step, alike_lanes, lane_losses
from fltac.client.schedule import LanePlan
from fltac.client.training import TrainJob, pools, train, train_pool
from fltac.config import BackboneConfig, TrainingConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import first_position

STEPS, ROWS = 20, 4
SCALING = 4.0


@dataclass(frozen=True)
class TextRows:
    """Rows of random tokens with the interface of ``data.encoded.Split``."""

    tokens: list[np.ndarray]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens])

    def batch(self, rows: np.ndarray, pad_to: int | None = None) -> dict[str, np.ndarray]:
        length = pad_to or max(len(self.tokens[row]) for row in rows)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        mask = np.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : len(self.tokens[row])] = self.tokens[row]
            mask[line, : len(self.tokens[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Task:
    train: TextRows
    outputs: int
    kind: str = "text"


def make_task(seed: int, outputs: int = 2, shortest: int = 3, longest: int = 12) -> Task:
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(1, 50, draw.integers(shortest, longest + 1)) for _ in range(30)]
    return Task(TextRows(tokens, draw.integers(0, outputs, 30)), outputs)


def make_job(model: LaneModel, client: str, seed: int, steps: int = STEPS, **task: int) -> TrainJob:
    draw = np.random.default_rng(seed)
    data = make_task(seed, **task)
    start = {name: draw.normal(size=shape).astype(np.float32) * 0.1 for name, shape in model.body_shapes.items()}
    hidden = model.backbone.hidden
    start[f"head.{data.outputs}.weight"] = draw.normal(size=(data.outputs, hidden)).astype(np.float32) * 0.1
    start[f"head.{data.outputs}.bias"] = np.zeros(data.outputs, dtype=np.float32)
    batches = [Step(data, str(data.outputs), draw.choice(30, ROWS, replace=False)) for _ in range(steps)]
    return TrainJob(client, 0, start, batches, 30, dropout_seed=seed)


def make_model(folder: Path, dtype: torch.dtype, packs: bool = False) -> LaneModel:
    backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu"), "text")
    modules = {name: (16, 16) for name, _ in backbone.model.named_modules() if name.endswith((".query", ".value"))}
    if packs:
        assert use_own_attention(backbone.model)
    first = first_position(backbone, make_task(0).train.batch(np.arange(5))) if packs else None
    assert first == (0 if packs else None)
    backbone.model.to(dtype)
    model = LaneModel(backbone, modules, rank=2, scaling=SCALING, dtype=dtype)
    model.first_position = first
    return model


def peft_training(folder: Path, job: TrainJob, config: TrainingConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same training written with PEFT and torch.optim alone."""
    base = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype)
    settings = LoraConfig(r=2, lora_alpha=2 * SCALING, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(base, settings).eval()
    names = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            ours = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = torch.tensor(job.start[ours], dtype=dtype)
            names[ours] = parameter
    head = torch.nn.Linear(16, job.steps[0].task.outputs).to(dtype)
    key = job.steps[0].head_key
    head.weight.data = torch.tensor(job.start[f"head.{key}.weight"], dtype=dtype)
    head.bias.data = torch.tensor(job.start[f"head.{key}.bias"], dtype=dtype)
    names |= {f"head.{key}.weight": head.weight, f"head.{key}.bias": head.bias}
    parameters = list(names.values())
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    received = [parameter.detach().clone() for parameter in parameters]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / STEPS if config.schedule == "linear" else 1.0
    )
    for step in job.steps:
        batch = {name: torch.from_numpy(value) for name, value in step.task.train.batch(step.rows).items()}
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(dtype)
        features = (states * mask).sum(1) / mask.sum(1)
        loss = F.cross_entropy(head(features), torch.from_numpy(step.task.train.labels[step.rows]))
        for parameter, first in zip(parameters, received, strict=True):
            loss = loss + 0.5 * config.prox * (parameter - first).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        schedule.step()
    return {name: parameter.detach() for name, parameter in names.items()}


def trained_values(model: LaneModel, lane: int) -> dict[str, torch.Tensor]:
    """The lane's tensors in the model's own precision (``read`` rounds to float32)."""
    return {
        name: model.rows()[lane, part.start : part.stop].view(part.shape).clone()
        for name, part in model.parts(lane).items()
    }


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((torch.as_tensor(one[name]) - torch.as_tensor(other[name])).abs().max()) for name in one)


ALONE, TOGETHER = LanePlan(1, 2**62), LanePlan(3, 2**62)
MIXED = LanePlan(2, 2**62)
"""With three jobs, the two in a pass change from pass to pass."""
PACKED, PACKED_MIXED = LanePlan(3, 2**62, packed=True), LanePlan(2, 2**62, packed=True)

SETTINGS = {
    "adamw": TrainingConfig(lr=1e-2, clip_norm=0.05, weight_decay=0.1),
    "adamw-linear": TrainingConfig(lr=1e-2, clip_norm=None, schedule="linear"),
    "sgd-momentum": TrainingConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, clip_norm=1.0),
    "prox": TrainingConfig(optimizer="sgd", lr=0.1, prox=0.5, clip_norm=0.1),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_lane_equals_peft(tiny_bert: Path, setting: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make_model(tiny_bert, dtype)
    job = make_job(model, "a", seed=1)
    train_pool(model, [job], SETTINGS[setting], 0.0, ALONE)
    ours = trained_values(model, 0)
    theirs = peft_training(tiny_bert, job, SETTINGS[setting], dtype)
    assert largest_difference(ours, theirs) < tolerance
    start = {name: torch.from_numpy(value) for name, value in job.start.items()}
    assert largest_difference(ours, start) > 1e-2, "nothing was trained"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("plan", [TOGETHER, MIXED, PACKED, PACKED_MIXED])
def test_lanes_equal_separate_runs(
    tiny_bert: Path, plan: LanePlan, dtype: torch.dtype, tolerance: float, dropout: float
) -> None:
    """Lanes of other lengths, other heads and fewer steps beside it change nothing for a lane, nor does packing."""
    model = make_model(tiny_bert, dtype, plan.packed)
    config = TrainingConfig(lr=1e-2, clip_norm=0.05, schedule="cosine", warmup_steps=3)
    jobs = [
        make_job(model, "a", seed=1),
        make_job(model, "b", seed=2, outputs=3, longest=6),
        make_job(model, "c", seed=3, steps=11, shortest=10),
    ]
    train_pool(model, jobs, config, dropout, plan)
    together = [trained_values(model, lane) for lane in range(3)]
    model.first_position = None  # the reference: one lane, padded
    for lane, job in enumerate(jobs):
        train_pool(model, [job], config, dropout, ALONE)
        assert largest_difference(together[lane], trained_values(model, 0)) < tolerance


def test_dropout_changes_the_result(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    job = make_job(model, "a", seed=1)
    plain = train_pool(model, [job], SETTINGS["adamw"], 0.0, ALONE)[0].adapter
    dropped = train_pool(model, [job], SETTINGS["adamw"], 0.3, ALONE)[0].adapter
    assert largest_difference(dict(plain), dict(dropped)) > 1e-4


def test_results_come_in_the_order_of_the_jobs_whatever_the_lanes(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    jobs = [make_job(model, name, seed) for seed, name in enumerate("dbca")]
    alone = train(model, jobs, SETTINGS["adamw"], 0.0, ALONE)
    grouped = train(model, jobs, SETTINGS["adamw"], 0.0, TOGETHER)
    assert [result.job.client for result in grouped] == list("dbca")
    for one, other in zip(alone, grouped, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < 1e-4
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


def test_pools_do_not_depend_on_the_order(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    jobs = [make_job(model, name, seed) for seed, name in enumerate("abcde")]
    for packed in (False, True):
        found = [[job.client for job in pool] for pool in pools(jobs, 2, LanePlan(64, 2**62, packed))]
        assert found == [[job.client for job in pool] for pool in pools(jobs[::-1], 2, LanePlan(64, 2**62, packed))]
        assert sorted(len(pool) for pool in found) == [1, 2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_a_lane_that_diverges_leaves_the_others_alone(tiny_bert: Path, packed: bool) -> None:
    model = make_model(tiny_bert, torch.float32, packed)
    jobs = [make_job(model, name, seed) for seed, name in enumerate("ab")]
    broken = {name: np.full_like(tensor, np.nan) for name, tensor in jobs[0].start.items()}
    sick = TrainJob("a", 0, broken, jobs[0].steps, 30, 0)
    plan = LanePlan(2, 2**62, packed)
    healthy = train(model, jobs, SETTINGS["adamw"], 0.0, plan)[1]
    beside = train(model, [sick, jobs[1]], SETTINGS["adamw"], 0.0, plan)[1]
    for name, tensor in healthy.adapter.items():
        np.testing.assert_array_equal(beside.adapter[name], tensor)


def test_packed_batches_may_have_different_numbers_of_rows(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float64, packs=True)
    jobs = [make_job(model, name, seed) for seed, name in enumerate("ab")]
    fewer = [Step(step.task, step.head_key, step.rows[:2]) for step in jobs[0].steps]
    jobs[0] = TrainJob("a", 0, jobs[0].start, fewer, 30, 0)
    train_pool(model, jobs, SETTINGS["adamw"], 0.0, PACKED)
    together = [trained_values(model, lane) for lane in range(2)]
    model.first_position = None
    for lane, job in enumerate(jobs):
        train_pool(model, [job], SETTINGS["adamw"], 0.0, ALONE)
        assert largest_difference(together[lane], trained_values(model, 0)) < 1e-9


def test_lanes_with_other_heads_and_rows_have_the_losses_that_they_have_alone(tiny_bert: Path) -> None:
    """Heads of other shapes, a regression, and batches of other sizes; against one lane after the other."""
    model = make_model(tiny_bert, torch.float64, packs=True)
    jobs = [
        make_job(model, str(seed), seed, outputs=outputs) for seed, outputs in enumerate((2, 2, 1, 2, 3, 3, 20, 20))
    ]
    steps = [job.steps[0] for job in jobs]
    steps[3] = replace(steps[3], rows=steps[3].rows[:2])
    numbers = replace(steps[2].task.train, labels=np.linspace(0, 1, 30))
    steps[2] = replace(steps[2], task=replace(steps[2].task, train=numbers))
    model.load([job.start for job in jobs])
    assert alike_lanes(model, steps) == [[0, 1], [2], [3], [4, 5], [6], [7]]
    losses = lane_losses(model, steps)
    losses.sum().backward()
    together = model.gradients.clone()
    for lane, (job, step) in enumerate(zip(jobs, steps, strict=True)):
        model.load([job.start])
        features = model.features(model.stack([step.task.train.batch(step.rows)]))
        logits = model.logits(features, 0, step.head_key)
        labels = torch.from_numpy(step.task.train.labels[step.rows])
        alone = F.mse_loss(logits[:, 0], labels) if lane == 2 else F.cross_entropy(logits, labels)
        assert losses[lane].item() == pytest.approx(alone.item(), rel=1e-9)
        alone.backward()
        width = model.gradients.shape[1]
        torch.testing.assert_close(together[lane, :width], model.gradients[0], atol=1e-12, rtol=1e-8)
        assert not together[lane, width:].any()


def test_full_fine_tuning_equals_torch_and_restores_the_backbone(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    model = LaneModel(backbone, {}, rank=1, scaling=1.0)
    draw = make_job(model, "a", seed=1)
    start = {name: np.zeros_like(tensor) if name.endswith(".delta") else tensor for name, tensor in draw.start.items()}
    job = TrainJob("a", 0, start, draw.steps, 30, 0)
    config = TrainingConfig(optimizer="sgd", lr=0.05, clip_norm=None)
    result = train_pool(model, [job], config, 0.0, ALONE)[0].adapter
    model.restore()

    reference = AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    head = torch.nn.Linear(16, 2)
    head.weight.data = torch.tensor(start["head.2.weight"])
    head.bias.data = torch.tensor(start["head.2.bias"])
    optimizer = torch.optim.SGD([*reference.eval().parameters(), *head.parameters()], lr=0.05)
    for step in job.steps:
        batch = {name: torch.from_numpy(value) for name, value in step.task.train.batch(step.rows).items()}
        states, mask = reference(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
        loss = F.cross_entropy(
            head((states * mask).sum(1) / mask.sum(1)), torch.from_numpy(step.task.train.labels[step.rows])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in reference.named_parameters():
        expected = (parameter.detach() - weights[name]).numpy()
        np.testing.assert_allclose(result[f"{name}.delta"], expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lanes", [1, 3])
def test_workers_side_by_side_change_nothing(tiny_bert: Path, packed: bool, lanes: int) -> None:
    """Twelve jobs of different steps and heads, three workers; the threads of torch are as they were."""
    model = make_model(tiny_bert, torch.float64, packed)
    config = TrainingConfig(lr=1e-2, clip_norm=0.05)
    jobs = [make_job(model, f"c{n:02}", seed=n, steps=4 + n % 3, outputs=2 + n % 2) for n in range(12)]
    alone = train(model, jobs, config, 0.2, LanePlan(lanes, 2**62, packed))
    before = torch.get_num_threads()
    crew = train(model, jobs, config, 0.2, LanePlan(lanes, 2**62, packed, workers=3))
    assert torch.get_num_threads() == before
    for one, other in zip(alone, crew, strict=True):
        assert one.job is other.job
        assert largest_difference(dict(one.adapter), dict(other.adapter)) < 1e-6
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
    again = train(model, jobs[::-1], config, 0.2, LanePlan(lanes, 2**62, packed, workers=3))[::-1]
    for one, other in zip(crew, again, strict=True):
        assert largest_difference(dict(one.adapter), dict(other.adapter)) == 0.0, "the same bits whatever the order"


def test_workers_get_about_equally_much(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    jobs = [make_job(model, f"c{n}", n, steps=2 + n) for n in range(9)]
    found = pools(jobs, 64, LanePlan(64, 2**62, True, workers=3))
    tokens = [sum(int(job.packed_sizes.sum()) for job in pool) for pool in found]
    assert len(found) == 3
    assert max(tokens) - min(tokens) <= max(int(job.packed_sizes.sum()) for job in jobs)


def test_an_error_in_a_worker_is_raised(tiny_bert: Path) -> None:
    model = make_model(tiny_bert, torch.float32)
    jobs = [make_job(model, f"c{n}", n) for n in range(4)]
    bad = {**jobs[2].start}
    del bad[next(iter(bad))]
    jobs[2] = TrainJob("c2", 0, bad, jobs[2].steps, 30, 0)
    with pytest.raises(KeyError):
        train(model, jobs, SETTINGS["adamw"], 0.0, LanePlan(1, 2**62, workers=2))


def test_few_large_jobs_among_many_small_ones_share_passes(tiny_bert: Path) -> None:
    """A skewed partition: pools are full, whatever the number of steps."""
    model = make_model(tiny_bert, torch.float32)
    jobs = [make_job(model, f"c{n:03}", 1, steps=1 if n < 60 else 40) for n in range(70)]
    for workers in (1, 2):
        found = pools(jobs, 16, LanePlan(64, 2**62, True, workers))
        assert all(11 <= len(pool) <= 16 for pool in found)
        assert sorted(job.client for pool in found for job in pool) == [job.client for job in jobs]
    assert [len(pool) for pool in pools(jobs, 1, LanePlan(1, 2**62))] == [1] * 70
