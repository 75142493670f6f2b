"""Whole runs of a tiny causal language model: methods, resuming, lanes, a data owner's node, export to plain PEFT."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import fltac
from fltac.errors import InputError
from fltac.evaluation import response_losses
from fltac.records import Request
from fltac.report.compare import comparison_table
from fltac.report.results import load_results
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.node import Node
from fltac.runtime.progress import Silent
from fltac.runtime.setup import prepare
from fltac.wire.node_protocol import (
    NodeHello,
    Scores,
    decode_answer,
    encode_hello_question,
    encode_score_question,
    encode_train_question,
)
from language import make_language_model, write_instructions

TIMES = {"seconds", "seconds_total", "peak_rss_bytes"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three kinds of questions over one file, four clients, two rounds."""
    root = tmp_path_factory.mktemp("language")
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


def run(tree: dict[str, Any], out: Path, *overrides: str) -> dict[str, Any]:
    return dict(fltac.run(fltac.load_config(tree, overrides), out).summary)


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fltac"
    run(tree, out, "output.adapters=true")
    return out


def test_training_lowers_the_held_out_loss(finished: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    untrained = run(tree, tmp_path / "zero", "method=zero")
    summary = json.loads((finished / "summary.json").read_text())
    for name, task in summary["tasks"].items():
        assert task["metric"] == "loss"
        assert task["score"] < untrained["tasks"][name]["score"] - 0.1
        assert task["worst_client"] >= task["score"] - 1e-9, "the worst loss is the highest"
        assert task["perplexity"] == pytest.approx(math.exp(task["score"]))
        assert 0 <= task["token_accuracy"] <= 1
        assert task["n_eval"] == 8
    assert summary["baselines"]["majority"] == {}
    assert summary["row_counts"]["colour"] == {"train": {"used": 32}, "validation": {"used": 8}}
    assert list(summary["trainable_parameters"]) == ["none"]
    table = comparison_table(load_results([finished, tmp_path / "zero"]))
    assert "| method | colour (loss)" in table


@pytest.mark.parametrize(
    "method", ["fltac-paper", "fedit", "fedit-heads", "local", "oracle", "central", "central-full"]
)
def test_methods_run_without_heads(method: str, tree: dict[str, Any], tmp_path: Path) -> None:
    summary = run(tree, tmp_path / method, f"method={method}", "federation.rounds=1", "training.steps=2")
    assert set(summary["tasks"]) == {"colour", "number", "animal"}
    assert all(math.isfinite(task["score"]) for task in summary["tasks"].values())
    state = latest_checkpoint(tmp_path / method)
    assert state is not None
    assert not any(name.startswith("head.") for name in state.state.initial)


def test_a_killed_run_goes_on_bit_by_bit(finished: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    class Stop(Silent):
        def round_finished(self, record: Any) -> None:
            raise KeyboardInterrupt

    config = fltac.load_config(tree, ["output.adapters=true"])
    with pytest.raises(KeyboardInterrupt):
        fltac.run(config, tmp_path / "killed", progress=Stop())
    fltac.resume(tmp_path / "killed")
    for name in ("rounds.jsonl", "summary.json"):
        one, other = ((folder / name).read_text() for folder in (finished, tmp_path / "killed"))
        lines = one.splitlines(), other.splitlines()
        if name == "summary.json":
            lines = [one], [other]
        for left, right in zip(*lines, strict=True):
            assert {k: v for k, v in json.loads(left).items() if k not in TIMES} == {
                k: v for k, v in json.loads(right).items() if k not in TIMES
            }
    for path in sorted(finished.glob("adapters/*/*.safetensors")):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(finished)).read_bytes()


def test_lanes_and_packing_change_rounding_alone(finished: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    run(tree, tmp_path / "one", "training.lanes=1", "training.packing=false", "output.adapters=true")
    paths = sorted(finished.glob("adapters/*/adapter_model.safetensors"))
    assert len(paths) == 3
    for path in paths:
        one, other = load_file(path), load_file(tmp_path / "one" / path.relative_to(finished))
        for name, tensor in one.items():
            np.testing.assert_allclose(tensor, other[name], atol=2e-4)


def test_an_exported_adapter_is_what_was_scored(finished: Path) -> None:
    """The held-out loss by plain PEFT equals the evaluator's; the folder says what it is for."""
    experiment = prepare(fltac.load_config(finished / "config.yaml", ["training.precision=float32"]))
    checkpoint = latest_checkpoint(finished)
    assert checkpoint is not None
    cluster = checkpoint.state.clusters[0]
    task, rows = experiment.tasks["colour"], np.arange(4)
    ours = response_losses(experiment.model, cluster.adapter, task, rows, 4)["loss"]
    folder = finished / "adapters" / f"cluster-{cluster.id}"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert not (folder / "head.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(experiment.backbone.folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, folder).eval()
    batch = {name: torch.from_numpy(value) for name, value in task.validation.batch(rows).items()}
    with torch.no_grad():
        assert float(plain(**batch).loss) == pytest.approx(ours, rel=1e-5)


def test_the_model_cards_lines_generate(finished: Path) -> None:
    """In another process, which does not import fltac."""
    folder = next(finished.glob("adapters/cluster-*"))
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace("max_new_tokens=64", "max_new_tokens=4")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; assert 'fltac' not in sys.modules"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "### Response:" in done.stdout


def test_a_data_owners_node_trains_and_reports_its_loss(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text(yaml.safe_dump({"client": "a", "tasks": tree["tasks"]}))
    config = fltac.load_config({**tree, "tasks": {}, "server": {"clustering": {"k": 3}}})
    node = Node.open(config, tmp_path / "client.yaml")
    hello = decode_answer(node.answer(encode_hello_question()))
    assert isinstance(hello, NodeHello)
    assert hello.heads == {0: {}, 1: {}, 2: {}}
    initial = {
        name: np.zeros(shape, np.float32) if name.endswith("lora_B") else np.ones(shape, np.float32)
        for name, shape in hello.body_shapes.items()
    }
    request = Request(1, "a", {}, {}, initial)
    reply = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert getattr(reply, "error", "") is None
    scores = decode_answer(node.answer(encode_score_question(request, "float32", 4)))
    assert isinstance(scores, Scores)
    assert all(4 < slot.score < 7 and slot.rows == 4 for slot in scores.slots.values()), "near log(259)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.loss=balanced", "training.loss: got 'balanced'; allowed with causal-lm tasks is plain"),
        ("federation.partition.client_skew=labels", "client_skew: got 'labels', but the task colour has no classes"),
        ("federation.partition.rule=label-skew", "rule: got 'label-skew', but the task colour has no classes"),
    ],
)
def test_settings_for_classes_are_refused(tree: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(fltac.load_config(tree, [override]))
