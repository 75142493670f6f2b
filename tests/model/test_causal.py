"""Predictions of a causal language model, packed or padded, and training in lanes, against transformers and PEFT."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from fltac.client.losses import Step
from fltac.client.schedule import LanePlan
from fltac.client.training import TrainJob, train_pool
from fltac.config import BackboneConfig, TrainingConfig
from fltac.errors import InputError
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.causal import IGNORED, predict, reads_ahead
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import first_position
from fltac.model.packing import pack
from fltac.model.targets import find_targets, layer_shapes
from language import ARCHITECTURES, VOCABULARY, make_language_model

STEPS, ROWS = 6, 3
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Rows:
    """Rows of random tokens, the second half of each a response; the interface of ``data.encoded.Split``."""

    tokens: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens])

    def batch(self, rows: np.ndarray, pad_to: int | None = None) -> dict[str, np.ndarray]:
        length = pad_to or max(len(self.tokens[row]) for row in rows)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
        for line, row in enumerate(rows):
            own = self.tokens[row]
            ids[line, : len(own)], mask[line, : len(own)] = own, 1
            labels[line, len(own) // 2 : len(own)] = own[len(own) // 2 :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Task:
    train: Rows
    outputs: int = 0
    kind: str = "causal-lm"


def make_rows(seed: int, longest: int = 14) -> Rows:
    draw = np.random.default_rng(seed)
    return Rows([draw.integers(3, VOCABULARY, draw.integers(3, longest + 1)) for _ in range(20)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language")
    return {name: make_language_model(root / name, name) for name in ARCHITECTURES}


def make_model(folder: Path, dtype: torch.dtype = torch.float64, packs: bool = False) -> LaneModel:
    backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu"), "causal-lm")
    assert use_own_attention(backbone.model)
    targets = find_targets(backbone.model, None, None)
    first = first_position(backbone, make_rows(0).batch(np.arange(5)))
    backbone.model.to(dtype)
    model = LaneModel(backbone, layer_shapes(backbone.model, targets), 2, 4.0, dtype)
    model.first_position = first if packs else None
    return model


def make_job(model: LaneModel, seed: int, longest: int = 14) -> TrainJob:
    draw, data = np.random.default_rng(seed), Task(make_rows(seed, longest))
    start = {name: draw.normal(size=shape).astype(np.float32) * 0.1 for name, shape in model.body_shapes.items()}
    steps = [Step(data, "", draw.choice(20, ROWS, replace=False)) for _ in range(STEPS)]  # type: ignore[arg-type]
    return TrainJob(str(seed), 0, start, steps, 20, dropout_seed=seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_that_of_transformers_on_the_labelled_tokens(folders: dict[str, Path], architecture: str) -> None:
    backbone = load_backbone(BackboneConfig(name=str(folders[architecture]), device="cpu"), "causal-lm")
    batch = {name: torch.from_numpy(value) for name, value in make_rows(3).batch(np.arange(4)).items()}
    plain = AutoModelForCausalLM.from_pretrained(folders[architecture], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(**batch).loss
        sums, counts = predict(backbone, batch).row_losses()
    assert counts.tolist() == [int((row != IGNORED).sum()) for row in batch["labels"]]
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(expected), rel=1e-5)


def test_only_asked_tokens_reach_the_output_layer(folders: dict[str, Path]) -> None:
    backbone = load_backbone(BackboneConfig(name=str(folders["llama"]), device="cpu"), "causal-lm")
    seen: list[int] = []
    backbone.model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    batch = {name: torch.from_numpy(value) for name, value in make_rows(3).batch(np.arange(4)).items()}
    predicted = predict(backbone, batch)
    assert seen == [len(predicted.tokens)] == [int((batch["labels"] != IGNORED).sum())]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_packed_rows_give_the_same(folders: dict[str, Path], architecture: str) -> None:
    model = make_model(folders[architecture], packs=True)
    assert model.first_position == 0
    batch = make_rows(4).batch(np.arange(6))
    packed = predict(model.backbone, pack([batch], model.backbone.device))
    padded = predict(model.backbone, {name: torch.from_numpy(value) for name, value in batch.items()})
    assert packed.tokens.tolist() == padded.tokens.tolist()
    assert packed.rows.tolist() == padded.rows.tolist()
    torch.testing.assert_close(packed.logits, padded.logits, rtol=1e-5, atol=1e-6)


def test_attention_in_a_window_is_not_packed(folders: dict[str, Path]) -> None:
    assert make_model(folders["mistral"], packs=True).first_position is None


def plain_training(folder: Path, job: TrainJob, config: TrainingConfig, targets: list[str]) -> dict[str, torch.Tensor]:
    """The same training written with transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    fan = type(base).__name__.startswith("GPT2")
    settings = LoraConfig(
        r=2, lora_alpha=8, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", fan_in_fan_out=fan
    )
    model = get_peft_model(base, settings).eval()
    names = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            ours = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = torch.tensor(job.start[ours], dtype=torch.float64)
            names[ours] = parameter
    optimizer = torch.optim.AdamW(list(names.values()), lr=config.lr, weight_decay=0.0)
    for step in job.steps:
        batch = {name: torch.from_numpy(value) for name, value in step.task.train.batch(step.rows).items()}
        loss = model(**batch).loss  # transformers' own: the mean over labelled tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(names.values()), 1.0)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in names.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lanes_train_as_plain_transformers_and_peft_do(folders: dict[str, Path], architecture: str) -> None:
    """Three adapters side by side, packed where the backbone can be, each against a run of its own.

    Llama normalises in float32, so no more digits agree.
    """
    model = make_model(folders[architecture], packs=True)
    config = TrainingConfig(lr=1e-2)
    jobs = [make_job(model, 1), make_job(model, 2, longest=6), make_job(model, 3)]
    train_pool(model, jobs, config, 0.0, LanePlan(3, NO_LIMIT, packed=model.packs))
    for number, job in enumerate(jobs):
        expected = plain_training(folders[architecture], job, config, list(model.layers))
        row = model.rows()[number]
        for name, part in model.parts(number).items():
            torch.testing.assert_close(row[part.start : part.stop].view(part.shape), expected[name], rtol=0, atol=1e-6)
            assert (expected[name] - torch.from_numpy(job.start[name])).abs().max() > 1e-3, "nothing was trained"


def test_a_lanes_loss_is_the_mean_over_its_own_tokens(folders: dict[str, Path]) -> None:
    """By hand from the logits: rows of different lengths weigh by their tokens."""
    model = make_model(folders["llama"])
    rows = make_rows(5)
    batch = {name: torch.from_numpy(value) for name, value in rows.batch(np.array([0, 1])).items()}
    with torch.no_grad():
        logits = model.backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, tokens = 0.0, 0
    for row in range(2):
        own = rows.tokens[row]
        for place in range(len(own) // 2, len(own)):
            total -= float(F.log_softmax(logits[row, place - 1], dim=0)[own[place]])
            tokens += 1
    sums, counts = predict(model.backbone, batch).row_losses()
    assert float(sums.sum() / counts.sum()) == pytest.approx(total / tokens, rel=1e-6)


def test_an_encoder_loaded_as_a_decoder_reads_ahead(tmp_path: Path, folders: dict[str, Path]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    bert = load_backbone(BackboneConfig(name=str(tmp_path), device="cpu"), "causal-lm")
    batch = make_rows(6).batch(np.arange(2))
    assert reads_ahead(bert, batch)
    llama = load_backbone(BackboneConfig(name=str(folders["llama"]), device="cpu"), "causal-lm")
    assert not reads_ahead(llama, batch)


def test_pooling_is_refused(folders: dict[str, Path]) -> None:
    config = BackboneConfig(name=str(folders["llama"]), pooling="cls")
    with pytest.raises(InputError, match=r"backbone.pooling: got 'cls'; allowed with causal-lm tasks is auto"):
        load_backbone(config, "causal-lm")
