"""The run directory: what create writes and refuses, cutting back to a checkpoint, comparing configs."""

import json
import os
import platform
import resource
import socket
import subprocess
from pathlib import Path

import pytest

from fltac.config import Config, load_config
from fltac.errors import InputError
from fltac.runtime import atomic, provenance
from fltac.runtime.run_directory import create, open_existing, peak_rss_bytes, refuse_occupied


def config(*overrides: str) -> Config:
    return load_config({"backbone": {"name": "x"}, "tasks": ["sst2", "rte"]}, overrides)


def test_create_writes_config_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/venv/bin/fltac", "run", "configs/a.yaml", "data_root=/opt/data/glue"])
    out = tmp_path / "runs" / "a"
    run = create(out, config("federation.seed=7"), {"backbone": "abc", "data": {"sst2": "def"}})
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "manifest.json"]
    assert load_config(out / "config.yaml") == run.config == config("federation.seed=7")
    manifest = run.manifest()
    assert manifest is not None
    assert manifest["seed"] == 7
    assert manifest["command"] == ["fltac", "run", "configs/a.yaml", "data_root=glue"]
    assert manifest["fingerprints"] == {"backbone": "abc", "data": {"sst2": "def"}}
    assert manifest["versions"]["python"] == platform.python_version()
    assert manifest["versions"]["numpy"] == __import__("numpy").__version__
    assert set(manifest["versions"]) >= {"fltac", "torch", "transformers", "peft", "datasets", "scikit-learn"}
    assert manifest["started"].endswith("+00:00")
    assert manifest["hardware"]["gpu"] is None
    assert manifest["hardware"]["cores"] >= 1
    text = (out / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(Path.cwd()) not in text
    assert "/opt" not in text
    assert socket.gethostname() not in {value for value in manifest["hardware"].values() if isinstance(value, str)}


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "run", config())
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    out = tmp_path / "run"
    message = f"{out} is not empty; continue it with `fltac resume {out}`, or choose another folder"
    with pytest.raises(InputError, match=message):
        create(tmp_path / "run", config("federation.rounds=9"))
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no run \(there is notes.txt\); choose another"):
        create(foreign, config())
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"notes.txt is a file; expected a folder"):
        refuse_occupied(foreign / "notes.txt")
    with pytest.raises(InputError, match=r"below cannot be written: Not a directory"):
        create(foreign / "notes.txt" / "below", config())


def test_an_empty_folder_and_a_killed_creation_may_be_used(tmp_path: Path) -> None:
    (tmp_path / ".tmp-x").write_bytes(b"")
    (tmp_path / "manifest.json").write_text("{}")
    run = create(tmp_path, config())
    assert run.manifest() != {}


def test_rounds_are_appended_and_cut_back(tmp_path: Path) -> None:
    run = create(tmp_path / "run", config())
    records = [{"round": n, "mean_score": 1 / 3 + n, "tasks": None} for n in (1, 2, 3)]
    lines = []
    for record in records:
        run.append_round(record)
        lines.append((run.path / "rounds.jsonl").read_bytes())
    assert run.rounds() == records
    run.cut_rounds(2)
    assert (run.path / "rounds.jsonl").read_bytes() == lines[1]
    run.append_round(records[2])
    assert (run.path / "rounds.jsonl").read_bytes() == lines[2]
    run.cut_rounds(0)
    assert run.rounds() == []


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    run = create(tmp_path / "run", config())
    run.append_round({"round": 1})
    whole = (run.path / "rounds.jsonl").read_bytes()
    for torn in (b'{"round": 2, "cli', b"3", b"\xff", b'{"round": "2"}'):
        (run.path / "rounds.jsonl").write_bytes(whole + torn)
        assert run.rounds() == [{"round": 1}]
        run.cut_rounds(1)
        assert (run.path / "rounds.jsonl").read_bytes() == whole


def test_missing_and_damaged_records_are_named(tmp_path: Path) -> None:
    run = create(tmp_path / "run", config())
    run.cut_rounds(0)
    run.append_round({"round": 1})
    with pytest.raises(InputError, match=r"rounds.jsonl: the record of round 2 is missing, .* of round 3"):
        run.cut_rounds(3)
    (run.path / "rounds.jsonl").write_text('{"round": 1}\noops\n{"round": 3}\n')
    with pytest.raises(InputError, match=r"rounds.jsonl: line 2 is not the record of a round"):
        run.cut_rounds(3)


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    run = create(tmp_path / "run", config())
    run.append_round({"round": np.int64(1), "score": np.float32(0.5), "silhouette": float("nan"), "k": (1, 2)})
    assert (run.path / "rounds.jsonl").read_text() == '{"round": 1, "score": 0.5, "silhouette": null, "k": [1, 2]}\n'
    with pytest.raises(TypeError, match=r"of type set cannot be written"):
        run.append_round({"round": {1}})


def test_summary_and_lanes(tmp_path: Path) -> None:
    run = create(tmp_path / "run", config())
    assert run.summary() is None
    assert run.lanes() is None
    summary = {"method": "fltac", "rounds": 1, "tasks": {}, "mean_score": 0.1}
    run.write_summary(summary)
    run.write_summary({**summary, "mean_score": 0.1 + 0.2})
    run.write_lanes({"lanes": 3, "tokens": 99})
    assert run.summary() == {**summary, "mean_score": 0.1 + 0.2}
    assert run.lanes() == {"lanes": 3, "tokens": 99, "workers": 1}
    for damaged in ({}, {"lanes": 0, "tokens": 1}, {"lanes": "many", "tokens": 1}, {"lanes": True, "tokens": 1}):
        run.write_lanes(damaged)
        with pytest.raises(InputError, match=r"lanes.json: got .* expected whole numbers from 1"):
            run.lanes()
    run.write_evaluation({"round": 1})
    assert json.loads((run.path / "evaluation.json").read_text()) == {"round": 1}
    (run.path / "lanes.json").write_text("{")
    with pytest.raises(InputError, match=r"lanes.json: not JSON"):
        run.lanes()
    (run.path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary.json: expected a JSON object, got list"):
        run.summary()
    (run.path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"summary.json: damaged"):
        run.summary()


def test_open_existing_compares_the_config(tmp_path: Path) -> None:
    create(tmp_path / "run", config("federation.rounds=5"))
    same = config("federation.rounds=5", "output.dir=elsewhere")
    assert open_existing(tmp_path / "run", same).config == config("federation.rounds=5")
    with pytest.raises(InputError, match=r"another config: federation.rounds is 5 there, but 6 in the given"):
        open_existing(tmp_path / "run", config("federation.rounds=6"))
    fewer = load_config({"backbone": {"name": "x"}, "tasks": ["sst2"]})
    with pytest.raises(InputError, match=r"tasks.rte.preset is 'rte' there, but 'absent' in the given"):
        open_existing(tmp_path / "run", fewer)


def test_open_existing_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing: no such folder"):
        open_existing(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"it has no config.yaml, so it is not the folder of a run"):
        open_existing(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config.yaml: not YAML"):
        open_existing(tmp_path)


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        atomic.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.git_state(tmp_path) is None
    (tmp_path / "code.py").write_text("1")
    subprocess.run([*git, "add", "code.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert provenance.git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert provenance.git_state(tmp_path) == {"commit": head, "dirty": True}
    installed = tmp_path / "venv"
    installed.mkdir()
    (installed / "untracked.py").write_text("")
    assert provenance.git_state(installed) is None


def test_command_line_without_folders() -> None:
    given = [
        "/usr/bin/fltac",
        "run",
        "a/b.yaml",
        "--out=/tmp/x/y",
        "--out",
        "/tmp/z",
        "data_root=${D}/glue",
        "../c",
    ]
    assert provenance.command_line(given) == [
        *["fltac", "run", "a/b.yaml", "--out=y", "--out", "z", "data_root=${D}/glue", "../c"]
    ]


def test_credentials_are_kept_out_of_the_command_line() -> None:
    given = ["flwr-serverapp", "--token", "0a" * 128, "--api-key=s3", "access_token=t", "--run-id", "7", "--insecure"]
    assert provenance.command_line(given) == [
        *["flwr-serverapp", "--token", "(hidden)", "--api-key=(hidden)", "access_token=(hidden)"],
        *["--run-id", "7", "--insecure"],
    ]


def test_peak_rss_is_in_bytes() -> None:
    before = peak_rss_bytes()
    block = bytearray(64 << 20)
    for page in range(0, len(block), 4096):
        block[page] = 1
    peak = peak_rss_bytes()
    assert peak >= max(before, 64 << 20)
    assert peak < 1 << 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    assert json.loads(atomic.to_json({"peak_rss_bytes": peak})) == {"peak_rss_bytes": peak}
