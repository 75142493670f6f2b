"""What a language model writes, against generation by plain PEFT and transformers, and sampling by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fltac.config import BackboneConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.generate import Sampling, choose, generate
from fltac.model.lanes import LaneModel
from fltac.model.targets import find_targets, layer_shapes
from language import ARCHITECTURES, END, VOCABULARY, make_language_model

PROMPTS = [[1, 40, 41, 42, 43], [1, 60], list(range(100, 112))]


def draws(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(number) for number in range(count)]


def adapted(folder: Path) -> tuple[LaneModel, dict[str, np.ndarray]]:
    backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu"), "causal-lm")
    use_own_attention(backbone.model)
    targets = find_targets(backbone.model, None, None)
    model = LaneModel(backbone, layer_shapes(backbone.model, targets), 2, 4.0)
    draw = np.random.default_rng(0)
    adapter = {name: draw.normal(size=shape).astype(np.float32) for name, shape in model.body_shapes.items()}
    model.load([adapter])
    return model, adapter


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_plain_peft(architecture: str, tmp_path: Path) -> None:
    """A batch of prompts of different lengths against one prompt at a time."""
    folder = make_language_model(tmp_path / architecture, architecture)
    model, adapter = adapted(folder)
    ours = generate(model, PROMPTS, Sampling(10), None, draws(3))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fan = architecture == "gpt2"
    settings = LoraConfig(
        r=2, lora_alpha=8, target_modules=list(model.layers), task_type="CAUSAL_LM", fan_in_fan_out=fan
    )
    plain = get_peft_model(base, settings).eval()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = torch.from_numpy(adapter[key])
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=VOCABULARY + 1,
            pad_token_id=0,
        )
        assert answer == out[0, len(prompt) :].tolist()
    assert len({tuple(answer) for answer in ours}) > 1, "the prompts matter"


def test_an_answer_ends_with_the_end_token_and_does_not_hold_it(tmp_path: Path) -> None:
    model, _ = adapted(make_language_model(tmp_path / "llama"))
    whole = generate(model, PROMPTS, Sampling(10), None, draws(3))
    end = whole[0][4]
    cut = generate(model, PROMPTS, Sampling(10), end, draws(3))
    for before, after in zip(whole, cut, strict=True):
        stop = before.index(end) if end in before else 10
        assert after == before[:stop]


def test_draws_depend_on_the_rows_own_generator_alone(tmp_path: Path) -> None:
    model, _ = adapted(make_language_model(tmp_path / "llama"))
    sampling = Sampling(8, temperature=1.0, top_p=0.9)
    together = generate(model, PROMPTS, sampling, END, draws(3))
    alone = [generate(model, [PROMPTS[number]], sampling, END, [draws(3)[number]])[0] for number in range(3)]
    assert together == alone
    assert together != generate(model, PROMPTS, sampling, END, draws(4)[1:])


def test_the_most_likely_tokens_are_drawn_by_their_shares() -> None:
    """Shares .5, .3, .15, .05: with top_p .8 two are left, as 5 : 3."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    draw = np.random.default_rng(0)
    counts = Counter(choose(logits, Sampling(1, 1.0, 0.8), draw) for _ in range(4000))
    assert set(counts) == {1, 3}
    assert counts[1] / 4000 == pytest.approx(5 / 8, abs=0.03)
    assert {choose(logits, Sampling(1, 1.0, 0.5), draw) for _ in range(50)} == {1}, "the one that reaches it is in"
    assert {choose(logits, Sampling(1, 1.0, 1.0), draw) for _ in range(500)} == {0, 1, 2, 3}
    # Temperature 1/2 squares the shares: 25 : 9 between the first two.
    cold = Counter(choose(logits, Sampling(1, 0.5, 0.8), draw) for _ in range(4000))
    assert cold[1] / 4000 == pytest.approx(25 / 34, abs=0.03)
    assert choose(logits, Sampling(1), draw) == 1


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    """After the prompts only the last token of each goes through the model."""
    model, _ = adapted(make_language_model(tmp_path / "llama"))
    lengths: list[int] = []
    embeddings = model.backbone.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    generate(model, PROMPTS, Sampling(4), None, draws(3))
    assert lengths == [12, 1, 1, 1]
