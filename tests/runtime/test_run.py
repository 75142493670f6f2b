"""Whole runs on the digits: what a run leaves, every method, and resuming after a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fltac
from fltac.config import GRADIENT_DIRECTIONS, PRESETS
from fltac.errors import InputError
from fltac.records import LORA_A, Reply, Request, Update
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.progress import Silent
from fltac.runtime.setup import prepare
from fltac.server.round import plan_delivery
from fltac.wire.codec import encode_reply, encode_request

SMALL: dict[str, Any] = {
    "backbone": {"name": "builtin:digits-vit", "device": "cpu"},
    "tasks": ["digits-parity", "digits-high", "digits-loop"],
    "federation": {"clients": 4, "rounds": 3, "partition": {"alpha": 1.0}},
    "lora": {"rank": 1, "alpha": 8},
    "training": {"lr": 5e-3, "steps": 4, "batch_size": 8, "threads": 1},
    "evaluation": {"every": 1, "max_rows": 50},
}
NOT_REPRODUCED = {"seconds", "seconds_total", "peak_rss_bytes"}


def small(*overrides: str) -> fltac.Config:
    return fltac.load_config(SMALL, overrides)


def scores_of(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    """All that a run leaves except what time and memory it took."""
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    rounds = [{key: value for key, value in json.loads(line).items() if key not in NOT_REPRODUCED} for line in lines]
    summary = json.loads((directory / "summary.json").read_text())
    adapters = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.glob("adapters/**/*.safetensors"))
    }
    return rounds, {key: value for key, value in summary.items() if key not in NOT_REPRODUCED}, adapters


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fltac"
    fltac.run(small(), out)
    return out


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    rounds, summary, adapters = scores_of(finished)
    assert [record["round"] for record in rounds] == [1, 2, 3]
    for record in rounds[:2]:
        assert all(task["n_eval"] == 50 for task in record["tasks"].values())
    last = rounds[-1]
    assert last["tasks"] == summary["tasks"]
    assert set(last["tasks"]) == set(SMALL["tasks"])
    assert last["mean_score"] == pytest.approx(np.mean([task["score"] for task in last["tasks"].values()]))
    assert last["tasks"]["digits-parity"]["n_eval"] > 50, "the last evaluation uses all validation rows"
    assert (summary["method"], summary["rounds"], summary["seed"]) == ("fltac", 3, 0)
    assert set(summary["baselines"]["majority"]) == set(SMALL["tasks"])
    assert summary["bytes_total"]["up"] == sum(record["bytes"]["up"] for record in rounds)
    assert summary["clustering"]["k"] == 3
    assert len(adapters) >= 3
    assert len(list((finished / "checkpoints").iterdir())) == 2
    assert str(finished.parent) not in (finished / "manifest.json").read_text()


def test_bytes_are_those_of_the_payloads(finished: Path) -> None:
    """Each slot uploads its adapter, in round 1 with gradients; every client is sent v0, and then its clusters'."""
    rounds, _, _ = scores_of(finished)
    checkpoint = latest_checkpoint(finished)
    assert checkpoint is not None
    state, experiment = checkpoint.state, prepare(fltac.load_config(finished / "config.yaml"))
    adapter, up, more = state.clusters[0].adapter, 0, 0
    factors = {name: tensor for name, tensor in adapter.items() if name.endswith(LORA_A)}
    seen = {name: np.ones((GRADIENT_DIRECTIONS, tensor.shape[1]), np.float32) for name, tensor in factors.items()}
    for client in experiment.clients.values():
        examples = {slot: sum(len(local.rows) for local in own) for slot, own in client.slots.items()}
        updates = tuple(Update(client.id, slot, adapter, count) for slot, count in examples.items())
        up += len(encode_reply(Reply(client.id, updates), "float32"))
        first_reply = Reply(client.id, tuple(replace(update, gradients=seen) for update in updates))
        more += len(encode_reply(first_reply, "float32"))
    assert [record["bytes"]["up"] for record in rounds] == [more, up, up]
    requests = [Request(1, name, {}, {}, state.initial, gradients=True) for name in experiment.clients]
    first = sum(len(encode_request(request, "float32")) for request in requests)
    last = sum(
        len(encode_request(request, "float32")) for request in plan_delivery(state, experiment.config.server_settings)
    )
    down = [record["bytes"]["down"] for record in rounds]
    assert down[0] == first
    assert down[1] == pytest.approx(last, rel=0.3)
    assert down[2] == pytest.approx(2 * last, rel=0.3)


def test_running_the_resolved_config_again_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    fltac.run(fltac.load_config(finished / "config.yaml"), tmp_path / "again")
    assert scores_of(tmp_path / "again") == scores_of(finished)


def test_lane_grouping_changes_rounding_alone(finished: Path, tmp_path: Path) -> None:
    fltac.run(small("training.lanes=1"), tmp_path / "one")
    for name, blob in scores_of(tmp_path / "one")[2].items():
        one, other = load_file(tmp_path / "one" / name), load_file(finished / name)
        assert blob
        for tensor in one:
            np.testing.assert_allclose(one[tensor], other[tensor], atol=2e-4)


def test_bfloat16_scores_as_float32_does(tmp_path: Path) -> None:
    """Adam amplifies rounding, so numbers are not compared but mean scores over seeds."""

    def mean_score(precision: str) -> float:
        settings = [f"training.precision={precision}", "federation.rounds=2", "training.steps=20", "method=oracle"]
        runs = [
            fltac.run(small(*settings, f"federation.seed={seed}"), tmp_path / f"{precision}-{seed}")
            for seed in range(3)
        ]
        return float(np.mean([run.summary["mean_score"] for run in runs]))

    exact = mean_score("float32")
    assert exact > 0.8
    assert mean_score("bfloat16") == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("method", [name for name in PRESETS if name != "fltac"])
def test_every_method_runs(method: str, tmp_path: Path) -> None:
    result = fltac.run(small(f"method={method}", "federation.rounds=2"), tmp_path / method)
    summary = result.summary
    assert set(summary["tasks"]) == set(SMALL["tasks"])
    assert summary["method"] == method
    silent = method in {"local", "zero", "central", "central-single", "central-full"}
    assert (summary["bytes_total"]["up"] == 0) == silent
    clustered = method in {"fltac-paper", "oracle", "random", "ifca", "cfl", "fedlease"}
    assert (summary["clustering"] is not None) == clustered
    if method == "oracle":
        assert summary["clustering"]["ari"] == 1.0


def test_budgets_are_equal() -> None:
    """tau T steps a slot in all; the central trainings as said in docs/architecture.md."""
    totals = {}
    for method in ("fltac", "fedit", "fedit-heads", "local", "central", "central-single"):
        experiment = prepare(small(f"method={method}"))
        steps = [
            local.steps
            for client in experiment.clients.values()
            for locals_ in client.slots.values()
            for local in locals_
        ]
        totals[method] = sum(steps) * experiment.config.rounds
        if method == "fltac":
            slots = len(steps)
    assert totals["fltac"] == slots * 4 * 3
    assert totals["fltac"] == totals["fedit"] == totals["fedit-heads"] == totals["local"] == totals["central"]
    assert totals["central-single"] == 3 * 4 * 3


def test_partial_participation(tmp_path: Path) -> None:
    half = ("federation.participation=0.5", "federation.rounds=2", "server.clustering.gradient_batches=3")
    fltac.run(small(*half), tmp_path / "half")
    rounds, summary, _ = scores_of(tmp_path / "half")
    assert [record["clients"] for record in rounds] == [2, 2]
    checkpoint = latest_checkpoint(tmp_path / "half")
    assert checkpoint is not None
    steps = 4 * sum(record["updates"] for record in rounds)
    assert summary["slot_steps"] == steps + 3 * len(checkpoint.state.memory)
    central = fltac.run(small(*half, "method=central"), tmp_path / "central").summary
    assert central["updates"] == 3, "all three tasks are trained"
    assert central["slot_steps"] == steps


def test_float16_on_the_wire_is_what_all_sides_hold(tmp_path: Path) -> None:
    fltac.run(small("wire.dtype=float16", "federation.rounds=1"), tmp_path / "half")
    checkpoint = latest_checkpoint(tmp_path / "half")
    assert checkpoint is not None
    for adapter in (checkpoint.state.initial, *(cluster.adapter for cluster in checkpoint.state.clusters)):
        for tensor in adapter.values():
            np.testing.assert_array_equal(tensor, tensor.astype(np.float16).astype(np.float32))


def test_values_that_do_not_fit_the_wire_cost_their_client_alone(tmp_path: Path) -> None:
    overrides = ["wire.dtype=float16", "training.optimizer=sgd", "training.lr=1e9", "training.clip_norm=null"]
    fltac.run(small(*overrides, "federation.rounds=1"), tmp_path / "diverged")
    (record,) = scores_of(tmp_path / "diverged")[0]
    assert record["updates"] == 0
    assert all("float16" in item["reason"] or "finite" in item["reason"] for item in record["rejections"])


def start_process(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fltac", "run", str(config), "--out", str(out)]

    def heed() -> None:
        """A shell's background job ignores Ctrl-C, and so would all that it starts."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.005)


@pytest.mark.parametrize("after", ["config", "round-1", "round-2-record"])
def test_kill_and_resume_gives_the_same_run(finished: Path, tmp_path: Path, after: str) -> None:
    config, out = finished / "config.yaml", tmp_path / "killed"
    process = start_process(config, out)
    reached = {
        "config": lambda: (out / "config.yaml").exists(),
        "round-1": lambda: (out / "checkpoints" / "round-0001").exists(),
        "round-2-record": lambda: (
            (out / "rounds.jsonl").exists() and (out / "rounds.jsonl").read_text().count("\n") >= 2
        ),
    }[after]
    wait_for(reached, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    fltac.resume(out)
    assert scores_of(out) == scores_of(finished)


def test_workers_and_kept_layers_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Two workers, the frozen layers' results kept, half of the clients a round: stopped after the first round."""
    overrides = ("training.threads=2", "lora.layers=[1]", "federation.participation=0.5", "training.precision=auto")
    fltac.run(small(*overrides), tmp_path / "whole")

    class Stop(Silent):
        def round_finished(self, record: Any) -> None:
            if record["round"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fltac.run(small(*overrides), tmp_path / "stopped", Stop())
    fltac.resume(tmp_path / "stopped")
    assert scores_of(tmp_path / "stopped") == scores_of(tmp_path / "whole")


def test_interrupt_leaves_a_run_that_resumes(finished: Path, tmp_path: Path) -> None:
    for attempt in range(5):
        out = tmp_path / f"interrupted-{attempt}"
        process = start_process(finished / "config.yaml", out)
        wait_for(lambda folder=out: (folder / "checkpoints" / "round-0001").exists(), process)
        # Held while it is looked at: a small run may be over before a signal reaches it.
        process.send_signal(signal.SIGSTOP)
        running = process.poll() is None and not (out / "summary.json").exists()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        code = process.wait(timeout=60)
        if running:
            break
    assert running, "five runs were over before they could be interrupted"
    assert code == 130
    fltac.resume(out)
    assert scores_of(out) == scores_of(finished)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = fltac.resume(finished)
    assert result.summary == json.loads((finished / "summary.json").read_text())
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_evaluate_gives_the_scores_of_the_summary(finished: Path) -> None:
    record = fltac.evaluate(finished)
    assert record["tasks"] == json.loads((finished / "summary.json").read_text())["tasks"]


def test_gradients_are_beside_the_first_round(tmp_path: Path) -> None:
    rounds = ("federation.rounds=2", "server.clustering.from_round=1")
    plain = fltac.run(small(*rounds, "server.clustering.features=a"), tmp_path / "plain").summary
    seen = fltac.run(small(*rounds, "server.clustering.gradient_batches=3"), tmp_path / "seen").summary
    (first, second), (with_gradients, later) = (scores_of(tmp_path / name)[0] for name in ("plain", "seen"))
    slots = first["updates"]
    assert slots == with_gradients["updates"]
    assert seen["slot_steps"] == plain["slot_steps"] + slots * 3
    assert with_gradients["loss"] == first["loss"], "trainings begin as they do without"
    assert with_gradients["bytes"]["up"] > 1.2 * first["bytes"]["up"]
    assert later["bytes"]["up"] == pytest.approx(second["bytes"]["up"], rel=0.01)
    assert with_gradients["agreement"].keys() == {"gradients", "changes"}


def test_evaluate_asks_the_round_whether_slots_were_grouped(finished: Path, tmp_path: Path) -> None:
    last = json.loads((finished / "summary.json").read_text())["clustering"]
    found = fltac.evaluate(finished)["clustering"]
    assert {key: found[key] for key in ("k", "ari", "accuracy")} == {key: last[key] for key in ("k", "ari", "accuracy")}

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    records = [json.loads(line) for line in (copy / "rounds.jsonl").read_text().splitlines()]
    records[-1]["clustering"] = None
    (copy / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert fltac.evaluate(copy)["clustering"] is None


def test_a_folder_that_is_not_empty_is_refused(finished: Path) -> None:
    with pytest.raises(InputError, match="resume"):
        fltac.run(small(), finished)


def test_a_damaged_checkpoint_is_refused_and_kept(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    file = sorted(copy.glob("checkpoints/*/state.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"state\.safetensors"):
        fltac.resume(copy)
    assert not (copy / "summary.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "lanes.json").write_text('{"lanes": 0, "tokens": 5}'), "lanes.json"),
        (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "records of rounds but no checkpoint"),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text().replace("lr: 0.005", "lr: 1")
            ),
            "config has changed",
        ),
    ],
)
def test_a_run_directory_that_does_not_fit_together_is_refused(
    finished: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    damage(copy)
    records = (copy / "rounds.jsonl").read_bytes()
    with pytest.raises(InputError, match=re.escape(message)):
        fltac.resume(copy)
    assert (copy / "rounds.jsonl").read_bytes() == records


def test_changed_data_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["fingerprints"]["digits-high.train"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"digits-high\.train has changed"):
        fltac.resume(copy)
