"""Tiny causal language models with random weights and a tokenizer of bytes, in which every letter is a token."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

UNKNOWN, BEGIN, END = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(LETTERS)
POSITIONS = 256

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=BEGIN,
        eos_token_id=END,
    ),
}


def tokenizer(chat_template: str | None = None, end: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, without a padding token; no special token is added to a text."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *LETTERS))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if end else None
    )
    made.chat_template = chat_template
    return made


def make_language_model(folder: Path, architecture: str = "llama", chat_template: str | None = None) -> Path:
    """Saves model and tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


QUESTIONS = ("colour", "number", "animal")


def write_instructions(file: Path, rows: int = 60) -> Path:
    """A jsonl file with ``q``, ``c``, ``a`` and ``kind``: short questions of three kinds with answers of their own."""
    lines = []
    for number in range(rows):
        kind = QUESTIONS[number % 3]
        context = f"case {number}" if number % 2 else ""
        lines.append(
            json.dumps({"q": f"Which {kind}?", "c": context, "a": f"{kind[0] * (2 + number % 4)}", "kind": kind})
        )
    file.write_text("\n".join(lines) + "\n")
    return file


def language_tree(root: Path) -> dict[str, Any]:
    """The settings of a small run, its files below ``root``: three kinds of questions, three clients, two rounds."""
    file = write_instructions(root / "rows.jsonl", 120)
    task = {"kind": "causal-lm", "path": str(file), "columns": ["q", "c", "a"], "validation": 0.2}
    return {
        "backbone": {"name": str(make_language_model(root / "llama")), "device": "cpu", "max_length": 200},
        "tasks": {kind: {**task, "filter": {"kind": kind}} for kind in ("colour", "number", "animal")},
        "federation": {"clients": 3, "rounds": 2, "partition": {"rule": "iid"}},
        "lora": {"rank": 2, "alpha": 16},
        "training": {"lr": 2e-2, "steps": 4, "batch_size": 4, "precision": "float32", "threads": 1},
        "evaluation": {"max_rows": 6},
        "output": {"adapters": False},
    }
