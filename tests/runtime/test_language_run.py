"""Whole runs of a tiny causal language model: methods, resuming, lanes, data owners, plain PEFT, wrong input."""

import json
import math
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
from fltac.cli import main
from fltac.data.prompts import alpaca
from fltac.errors import InputError
from fltac.evaluation import response_losses
from fltac.records import Reply, Request
from fltac.report.compare import comparison_table
from fltac.report.results import load_results
from fltac.runtime.checkpoint import latest_checkpoint
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
from language import language_tree

TIMES = {"seconds", "seconds_total", "peak_rss_bytes"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return language_tree(tmp_path_factory.mktemp("language"))


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
    first, *later = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert first["bytes"]["up"] > 1.2 * max(record["bytes"]["up"] for record in later), "gradients come with the first"
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
    assert (settings["bias"], settings["modules_to_save"]) == ("none", None)
    assert not (folder / "head.safetensors").exists()
    factors = {name.split(".self_attn.")[-1] for name in load_file(folder / "adapter_model.safetensors")}
    assert factors == {f"{layer}_proj.lora_{factor}.weight" for layer in "qv" for factor in "AB"}, "nothing else"
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
    request = Request(1, "a", {}, {}, initial, gradients=True)
    reply = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(reply, Reply)
    assert [set(update.gradients or {}) for update in reply.updates] == 3 * [
        {name for name in initial if name.endswith("lora_A")}
    ]
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


def write_config(tree: dict[str, Any], folder: Path) -> str:
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "own.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.name=nobody/none", "'nobody/none' has no tokenizer, needed by the causal-lm task"),
        ("backbone.name=nobody/none", "allowed are a local Hugging Face folder with a tokenizer, package:"),
        ("backbone.kind=text", "backbone.kind: got 'text'; allowed with causal-lm tasks are auto, causal-lm"),
        ("backbone.max_length=40", "backbone.max_length: 40 tokens leave no room for text beside the 100 of"),
        ("tasks.colour.template=chat", "tasks.colour.template: 'chat', but the backbone's tokenizer has no chat"),
        ("tasks.colour.template=vicuna", "tasks.colour.template: got 'vicuna'; input should be 'alpaca' or 'chat'"),
        ("tasks.colour.columns=[q]", "tasks.colour.columns: got ['q']; a causal-lm task has different columns"),
        ("tasks.colour.columns=[q, reply]", "has no column 'reply'; it has q, c, a, kind"),
        ("tasks.colour.filter={kind: smell}", "has 'smell' in column 'kind'"),
        ("tasks.colour.metric=accuracy", "tasks.colour.metric: got 'accuracy'; allowed for a causal-lm task is loss"),
        ("tasks.colour.label=kind", "tasks.colour.label: got 'kind'; a causal-lm task has no classes"),
        ("tasks.extra={preset: dolly-open-qa}", "'databricks/databricks-dolly-15k' could not be loaded"),
        ("tasks.extra={preset: dolly-open-qa}", "with data_root= (presets) or tasks.extra.path= it is read from local"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    tree: dict[str, Any], tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", write_config(tree, tmp_path), override, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_partition_written_by_the_command_is_what_an_owner_checks(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["tasks.colour.long_response=cut", "tasks.number.prompt_cut=left"]
    owners = tmp_path / "owners"
    with pytest.raises(SystemExit) as caught:
        main(["partition", write_config(tree, tmp_path), *settings, "--write", str(owners), "--json"])
    assert caught.value.code == 0
    counts = json.loads(capsys.readouterr().out)["clients"]
    assert {sum(row.values()) for row in counts.values()} == {33, 30}
    own = yaml.safe_load((owners / "client-0" / "client.yaml").read_text())
    prompting = {name: (task["prompt_cut"], task["long_response"]) for name, task in own["tasks"].items()}
    assert prompting == {"colour": ("right", "cut"), "number": ("left", "drop"), "animal": ("right", "drop")}
    file = str(owners / "client-0" / "client.yaml")
    with pytest.raises(SystemExit) as caught:
        main(["client", "check", file, "--config", str(owners / "coordinator.yaml"), "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [(task["metric"], task["outputs"], task["majority"]) for task in found["tasks"]] == [("loss", 0, None)] * 3
    assert sum(task["rows"] for task in found["tasks"]) == sum(counts["client-0"].values())


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
