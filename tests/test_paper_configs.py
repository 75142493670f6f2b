"""The configs of the paper's scale: real architectures without any weights, and whole runs of tiny ones."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

import fltac
from fltac.config import load_config
from fltac.model.targets import find_targets, layer_shapes
from fltac.runtime.experiment import evaluate
from language import POSITIONS, make_language_model

PAPER = Path(__file__).parent.parent / "configs" / "paper"
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)


@pytest.mark.parametrize(("method", "parameters"), [("fltac", 524_288), ("fedit", 16 * 524_288)])
def test_dolly_llama_has_the_papers_parameters(method: str, parameters: int) -> None:
    """4,259,840 printed for FL-TAC are 8 x (524,288 + 8,192), and 8,519,680 for FedIT 16 times that.

    The 8,192 are a 2-way head, which a language model does not need.
    """
    config = load_config(PAPER / "dolly-llama.yaml", [f"method={method}"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_7B)
    shapes = layer_shapes(model, find_targets(model, config.lora.targets, config.lora.layers))
    assert sum(config.lora.rank * (inputs + outputs) for inputs, outputs in shapes.values()) == parameters
    assert sum(prod(parameter.shape) for parameter in model.parameters()) == 6_738_415_616
    assert (len(config.tasks), config.federation.clients, config.lora.scaling) == (8, 10, 16.0)


@pytest.mark.parametrize(
    ("architecture", "whole", "adapter"),
    [
        (GPT2Config(), 124_439_808, 12 * (768 + 3 * 768)),  # c_attn
        (
            Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            494_032_768,
            24 * (896 + 896 + 896 + 128),  # q_proj, v_proj
        ),
        (MistralConfig(vocab_size=32000), 7_241_732_096, 32 * (4096 + 4096 + 4096 + 1024)),  # q_proj, v_proj
    ],
    ids=["gpt2", "qwen2.5-0.5b", "mistral-7b"],
)
def test_targets_of_real_architectures_are_those_of_pefts_table(
    architecture: PretrainedConfig, whole: int, adapter: int
) -> None:
    """The published numbers of parameters, and those of an adapter of rank 1."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    assert sum(prod(parameter.shape) for parameter in model.parameters()) == whole
    shapes = layer_shapes(model, find_targets(model, None, None))
    assert sum(inputs + outputs for inputs, outputs in shapes.values()) == adapter


def write_dolly(file: Path, categories: list[str]) -> None:
    """A file like Dolly's: 40 rows of each category; the first response of each is too long, its second prompt is."""
    rows = []
    for category in categories:
        for number in range(40):
            context = f"the {category} of {number} " * (30 if number == 1 else 1) if number % 2 else ""
            answer = category[0] * (2 * POSITIONS if number == 0 else 3 + number % 3)
            rows.append(
                {"instruction": f"What? {number}", "context": context, "response": answer, "category": category}
            )
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize("method", ["fltac", "fedit"])
@pytest.mark.parametrize("name", ["dolly-llama", "dolly-llama-small"])
def test_a_whole_run_of_a_tiny_llama(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as in the config but the model's size, the data, and how long it trains."""
    model = make_language_model(tmp_path / "models" / "stories260K")
    monkeypatch.setenv("FLTAC_DATA", str(tmp_path))
    overrides = [f"method={method}", f"backbone.name={model}", f"data_root={tmp_path / 'data'}"]
    overrides += ["backbone.device=cpu", "training.steps=2", "training.threads=1", "federation.rounds=1"]
    overrides += ["training.precision=float32"]  # so that plain PEFT, in float32, writes the same
    config = load_config(PAPER / f"{name}.yaml", overrides)
    presets = [task.removeprefix("dolly-").replace("-", "_") for task in config.tasks]
    write_dolly(tmp_path / "data" / "dolly" / "train.parquet", presets)

    summary = fltac.run(config, tmp_path / "run").summary

    assert list(summary["tasks"]) == list(config.tasks)
    # 2 layers of q: 16 -> 16 and v: 16 -> 8.
    assert summary["trainable_parameters"] == {"none": config.lora.rank * 2 * (32 + 24)}
    counted: dict[str, int] = {}
    for counts in summary["row_counts"].values():
        for split in ("train", "validation"):
            for reason, count in counts[split].items():
                counted[reason] = counted.get(reason, 0) + count
    assert counted == {"used": 8 * 39, "dropped_long": 8, "prompt_cut": 8}
    answers_are_those_of_plain_peft(tmp_path / "run", model, list(config.tasks), POSITIONS)


def answers_are_those_of_plain_peft(run: Path, model: Path, tasks: list[str], positions: int) -> None:
    """Every exported adapter answers a prompt that fits whole by plain PEFT as in the evaluation."""
    answered = ["evaluation.generation.max_rows=2", "evaluation.generation.max_new_tokens=4"]
    record: dict[str, Any] = evaluate(run, overrides=answered)
    assert set(record["generation"]["tasks"]) == set(tasks)
    lines = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    compared = set()
    for folder in sorted((run / "adapters").iterdir()):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder)
        for line in lines:
            batch = tokenizer(line["prompt"], return_tensors="pt", return_token_type_ids=False)
            size = batch["input_ids"].shape[1]
            if line["adapter"] == folder.name and size + 4 <= positions:
                out = plain.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
                assert line["answer"] == tokenizer.decode(out[0, size:], skip_special_tokens=True).strip()
                compared.add(folder.name)
    assert compared == {line["adapter"] for line in lines}


@pytest.mark.data
def test_dolly_on_the_small_llama(data_root: Path, tmp_path: Path) -> None:
    """Two categories, two clients, one short round: the loss of each falls well below the untuned model's."""
    categories = {name: {"preset": name, "validation": 0.03} for name in ("dolly-open-qa", "dolly-brainstorming")}
    tree = yaml.safe_load((PAPER / "dolly-llama-small.yaml").read_text()) | {"tasks": categories}
    short = ["federation.clients=2", "federation.partition.rule=iid", "federation.rounds=1", "training.steps=20"]
    trained, untuned = (
        fltac.run(load_config(tree, [*short, f"method={method}"]), tmp_path / method).summary
        for method in ("fltac", "zero")
    )
    for name, task in trained["tasks"].items():
        assert task["score"] < untuned["tasks"][name]["score"] - 0.2
        counts = trained["row_counts"][name]["train"]
        assert min(counts["dropped_long"], counts["prompt_cut"], counts["used"]) > 0, "beyond 512 tokens"
    answers_are_those_of_plain_peft(tmp_path / "fltac", data_root / "models" / "stories260K", list(categories), 512)


def test_the_small_one_differs_in_size_alone() -> None:
    paper, small = (load_config(PAPER / name) for name in ("dolly-llama.yaml", "dolly-llama-small.yaml"))
    assert list(small.tasks) == list(paper.tasks)
    assert small.federation.partition == paper.federation.partition
    assert (small.lora.rank, small.lora.alpha, small.lora.targets) == (
        paper.lora.rank,
        paper.lora.alpha,
        paper.lora.targets,
    )
