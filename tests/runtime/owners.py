"""A small federation on text, whose backbone needs no download: three tasks, a tiny random BERT, a word tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fltac.config import Config, load_config

WORDS = ["good", "bad", "fine", "poor", "new", "old", "big", "small", "red", "blue"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SECRETS = ["mood", "hues", "letters", "feeling", "sunny", "cloudy", "words"]
"""Names of tasks, columns and classes: none of them may be in what a node answers."""


def tiny_backbone(folder: Path) -> Path:
    """A BERT of 2 layers x 16 with a tokenizer of whole words."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows: int = 90) -> None:
    """Two classes by name, three by number, and a regression, on texts of 2 to 11 words."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(2, 12))) for _ in range(rows)]
    content: dict[str, list[dict[str, Any]]] = {
        "mood": [{"words": text, "feeling": "sunny" if "good" in text else "cloudy"} for text in texts],
        "hues": [{"words": text, "other": "red", "feeling": number % 3} for number, text in enumerate(texts)],
        "letters": [{"words": text, "feeling": len(text) / 10} for text in texts],
    }
    for name, lines in content.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def federation(folder: Path, *overrides: str) -> Config:
    """Three clients of these tasks; everything lies in ``folder``."""
    if not (folder / "mood.jsonl").exists():
        tiny_backbone(folder / "backbone")
        write_rows(folder)
    task = {"kind": "text", "columns": ["words"], "label": "feeling"}
    tree: dict[str, Any] = {
        "backbone": {"name": str(folder / "backbone"), "device": "cpu"},
        "tasks": {
            "mood": {**task, "path": str(folder / "mood.jsonl")},
            "hues": {**task, "path": str(folder / "hues.jsonl"), "columns": ["words", "other"], "metric": "f1"},
            "letters": {**task, "path": str(folder / "letters.jsonl"), "metric": "pearson", "validation": 0.2},
        },
        "federation": {"clients": 3, "rounds": 2, "partition": {"alpha": 1.0}},
        "lora": {"rank": 1, "alpha": 8, "dropout": 0.1},
        "training": {"lr": 5e-3, "steps": 4, "batch_size": 4, "threads": 1},
        "server": {"clustering": {"k": 3}},
    }
    return load_config(tree, overrides)
