"""Whole runs of a tiny causal language model: methods, resuming, lanes, a data owner's node, export to plain PEFT."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fltac
from fltac.cli import main
from fltac.data.prompts import alpaca
from fltac.data.text_scores import rouge_l
from fltac.errors import InputError
from fltac.evaluation import response_losses
from fltac.records import Request
from fltac.report.compare import comparison_table
from fltac.report.results import load_results
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.experiment import evaluate
from fltac.runtime.node import Node
from fltac.runtime.owner import load_owner
from fltac.runtime.partition_files import write_partition
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
from judge.scripted_judge import Reply, serving, verdict
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


def test_the_model_cards_lines_generate(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = next(finished.glob("adapters/cluster-*"))
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "fltac" not in code
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}").replace("max_new_tokens=64", "max_new_tokens=4"))
    assert "### Response:" in capsys.readouterr().out


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


def graded(_: int, question: Any) -> Reply:
    return verdict(0.5)


def test_answers_are_written_scored_and_judged(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A judge that fails leaves everything else; the next call asks for what is missing and computes nothing anew."""
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRADER_KEY", "sk-secret")
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / "summary.json").read_bytes(), (out / "config.yaml").read_bytes()
    settings = ["evaluation.generation.max_rows=3", "evaluation.generation.max_new_tokens=6"]
    with serving(lambda number, question: graded(number, question) if number < 4 else Reply(500)) as server:
        judge = [
            f"evaluation.judge.base_url={server.url}",
            "evaluation.judge.model=grader",
            "evaluation.judge.key_env=GRADER_KEY",
            "evaluation.judge.attempts=1",
        ]
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", str(out), *settings, *judge])
        assert caught.value.code == 1
    record = json.loads((out / "evaluation.json").read_text())
    assert "judge" not in record
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == {"colour", "number", "animal"}
    for line in lines:
        assert line["prompt"].startswith("Below is an instruction")
        assert line["prompt"].endswith("### Response:\n")
        assert f"Which {line['task']}?" in line["prompt"]
        assert line["reference"] == line["task"][0] * len(line["reference"])
        assert line["rouge_l"] == rouge_l(line["answer"], line["reference"])
        assert (out / "adapters" / line["adapter"]).is_dir()
    for name, scores in record["generation"]["tasks"].items():
        own = [line for line in lines if line["task"] == name]
        weights = [line["clients"] for line in own]
        assert scores["rouge_l"] == pytest.approx(np.average([line["rouge_l"] for line in own], weights=weights))
        assert scores["n"] == 3
    kept = len((out / "verdicts.jsonl").read_text().splitlines())
    assert kept >= 4
    again = (out / "generations.jsonl").stat().st_mtime_ns
    with serving(graded) as server:
        judge[0] = f"evaluation.judge.base_url={server.url}"
        done = evaluate(out, overrides=[*settings, *judge])
        asked = len({(line["prompt"], line["answer"], line["reference"]) for line in lines})
        assert len(server.questions) == asked - 4
    assert done["judge"]["tasks"] == {"colour": 0.5, "number": 0.5, "animal": 0.5}
    assert done["tasks"] == record["tasks"]
    assert (out / "generations.jsonl").stat().st_mtime_ns == again
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == len(lines)
    assert ((out / "summary.json").read_bytes(), (out / "config.yaml").read_bytes()) == before
    assert b"sk-secret" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_answers_of_an_adapter_are_those_of_plain_peft(finished: Path, tmp_path: Path) -> None:
    """Every exported adapter generates by plain PEFT what the evaluation wrote down."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    evaluate(out, overrides=["evaluation.generation.max_rows=1", "evaluation.generation.max_new_tokens=5"])
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    folder = fltac.load_config(out / "config.yaml").backbone.name
    letters = AutoTokenizer.from_pretrained(folder)
    assert len({line["adapter"] for line in lines}) == 3
    for line in lines:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, out / "adapters" / line["adapter"]).eval()
        batch = letters(line["prompt"], return_tensors="pt", return_token_type_ids=False)
        whole = plain.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        text = letters.decode(whole[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["answer"] == text.strip()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=1", "override 'training.lr=1': a run's settings are fixed; allowed are those of evaluation"),
        ("evaluation.judge.model=m", "evaluation.judge.base_url"),
        ("evaluation.generation.max_new_tokens=199", "max_new_tokens: 199 tokens leave no room for a prompt"),
    ],
)
def test_what_cannot_be_evaluated(finished: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(finished, overrides=[override])


def test_a_key_that_is_not_set_is_said_before_anything_is_computed(finished: Path) -> None:
    judge = ["evaluation.judge.base_url=http://h/v1", "evaluation.judge.model=m", "evaluation.judge.key_env=NOT_SET"]
    with pytest.raises(InputError, match="the environment variable NOT_SET is not set"):
        evaluate(finished, overrides=["evaluation.generation.max_rows=1", *judge])


def test_data_owners_get_the_rows_of_the_simulation(tree: dict[str, Any], tmp_path: Path) -> None:
    """Some rows are left out when they are encoded, so the partition is of the others."""
    prompt = alpaca("", "a context")
    template = len(prompt.text) - (prompt.stop - prompt.start)
    config = fltac.load_config(tree, [f"backbone.max_length={template + 4}"])
    experiment = prepare(config)
    train = experiment.tasks["colour"].train
    assert train.counts["dropped_long"] > 0
    write_partition(config, tmp_path / "out")
    coordinator = fltac.load_config(tmp_path / "out" / "coordinator.yaml")
    assert coordinator.backbone.kind == "causal-lm"
    for name, client in experiment.clients.items():
        owner = load_owner(coordinator, tmp_path / "out" / name / "client.yaml")
        for slot, (local,) in client.slots.items():
            (own,) = owner.client.slots[slot]
            assert own.task.name == local.task.name
            for here, there in zip(own.rows, local.rows, strict=True):
                one, other = own.task.train.batch(np.array([here])), local.task.train.batch(np.array([there]))
                np.testing.assert_array_equal(one["labels"], other["labels"])
                np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
