"""The configs of the paper's scale, against the architecture that they name, built without any weights."""

from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fltac.config import load_config
from fltac.model.targets import find_targets, layer_shapes

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


def test_the_small_one_differs_in_size_alone() -> None:
    paper, small = (load_config(PAPER / name) for name in ("dolly-llama.yaml", "dolly-llama-small.yaml"))
    assert list(small.tasks) == list(paper.tasks)
    assert small.federation.partition == paper.federation.partition
    assert (small.lora.rank, small.lora.alpha, small.lora.targets) == (
        paper.lora.rank,
        paper.lora.alpha,
        paper.lora.targets,
    )
