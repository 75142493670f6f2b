"""The paper's experiments in tiny: the same architectures of 2 layers with random weights, and a few dozen rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from fltac.reproduce.order import Order, Scale
from runtime.owners import WORDS, tiny_backbone

COLUMNS = {"rte": ("sentence1", "sentence2"), "sst2": ("sentence",)}


def write_experiments(folder: Path, tiny_vit: Path) -> Path:
    """Configs as in ``configs/paper``, all of them tiny, and their data; returns the folder of the configs."""
    configs = folder / "configs"
    configs.mkdir()
    bert = tiny_backbone(folder / "bert")
    for number, (task, columns) in enumerate(COLUMNS.items()):
        place = folder / "data" / "glue" / task
        place.mkdir(parents=True)
        for split, rows in (("train", 60), ("validation", 30)):
            _write(place / f"{split}.parquet", columns, rows, seed=2 * number + (split == "train"))
    text = {
        "backbone": {"name": str(bert), "device": "cpu", "pooling": "mean"},
        "tasks": list(COLUMNS),
        "data_root": str(folder / "data"),
    }
    images = {"backbone": {"name": str(tiny_vit), "device": "cpu"}, "tasks": ["digits-parity", "digits-high"]}
    for stem, tree, steps in (("glue-bert", text, 3), ("cifar-vit", images, 2), ("dolly-llama", text, 2)):
        for ending, rounds in (("-small", 2), ("", 5)):
            whole = {**tree, **_settings(rounds, steps)}
            (configs / f"{stem}{ending}.yaml").write_text(yaml.safe_dump(whole))
    return configs


def order(
    name: str, out: Path, configs: Path, *overrides: str, seeds: int | None = None, scale: Scale = "small"
) -> Order:
    return Order(name, scale, overrides, seeds, out, configs)


def read(path: Path) -> dict[str, Any]:
    tree = json.loads(path.read_text())
    assert isinstance(tree, dict)
    return tree


def _settings(rounds: int, steps: int) -> dict[str, Any]:
    return {
        "federation": {"clients": 3, "rounds": rounds, "partition": {"alpha": 1.0}},
        "lora": {"rank": 1, "alpha": 8},
        "training": {"lr": 5e-3, "steps": steps, "batch_size": 4, "threads": 1, "precision": "float32"},
        "evaluation": {"every": 0},
        "methods": {"fedit": {"lora": {"rank": 2}}},
    }


def _write(path: Path, columns: tuple[str, ...], rows: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    table: dict[str, Any] = {name: [" ".join(draw.choice(WORDS, 5)) for _ in range(rows)] for name in columns}
    table["label"] = [int("good" in text) for text in table[columns[0]]]
    pyarrow.parquet.write_table(pa.table(table), path)
