"""Fixtures shared by all tests: no hub, a cache of their own, and tiny models with random weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache folder for the whole session, so that no test sees what an earlier session left."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FLTAC_CACHE")
    os.environ["FLTAC_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FLTAC_CACHE"]
    else:
        os.environ["FLTAC_CACHE"] = before


@pytest.fixture
def data_root() -> Path:
    """The folder that FLTAC_DATA names; skips with the reason where there is none."""
    root = os.environ.get("FLTAC_DATA")
    if not root:
        pytest.skip("FLTAC_DATA is not set: no real data here")
    return Path(root)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers x 16 with random weights and a pooler, as a Hugging Face folder (no tokenizer)."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 2 layers x 16 on 8 x 8 images with random weights."""
    import torch
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
