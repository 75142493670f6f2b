"""``fltac client check`` on a small text client: what it says, and one line with exit code 2 for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fltac.cli import main
from fltac.config import to_yaml
from fltac.runtime.partition_files import coordinator_config
from runtime.owners import federation, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coordinator")
    path = folder / "coordinator.yaml"
    path.write_text(to_yaml(coordinator_config(federation(folder))))
    return path


@pytest.fixture
def client(tmp_path: Path) -> Callable[..., Path]:
    """A client file with one good task; ``changes`` are made in it, None takes a setting out."""
    write_rows(tmp_path)

    def make(**changes: Any) -> Path:
        task = {"kind": "text", "path": "mood.jsonl", "columns": ["words"], "label": "feeling", **changes}
        task = {key: value for key, value in task.items() if value is not None}
        path = tmp_path / "client.yaml"
        path.write_text(yaml.safe_dump({"client": "clinic-7", "tasks": {"mood": task}}))
        return path

    return make


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_what_a_good_client_is_told(
    config: Path, client: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("client", "check", client(), "--config", config) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "mood" in line]
    assert [cell.strip() for cell in row.split("│")[1:6]] == ["mood", "0", "81 + 9", "2", row.split("│")[5].strip()]
    assert lines[-1].startswith("client clinic-7: a round takes about ")
    assert "on cpu with 1 thread, " in lines[-1]


def test_as_json(config: Path, client: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = client(label="feeling", metric="f1")
    tree = yaml.safe_load(path.read_text())
    hues = {"kind": "text", "path": "hues.jsonl", "columns": ["words", "other"], "label": "feeling", "slot": 8}
    tasks = {**tree["tasks"], "hues": {**hues, "validation": 0.5}}
    path.write_text(yaml.safe_dump({**tree, "tasks": tasks}, sort_keys=False))
    assert call("client", "check", path, "--config", config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(task["task"], task["slot"], task["rows"], task["outputs"], task["steps"]) for task in found["tasks"]] == [
        ("mood", 0, 81, 2, 4),
        ("hues", 8, 45, 3, 4),
    ]
    assert found["seconds"] == pytest.approx(sum(task["seconds"] for task in found["tasks"]))
    assert all(0 < task["loss"] < 3 for task in found["tasks"])
    assert found["threads"] == 1
    # A rank-1 query and value adapter of 2 layers x 16, three directions of their inputs, and a head of 2 and of 3
    # outputs, in float32.
    numbers = 2 * (2 * 2 * (32 + 3 * 16)) + (2 * 16 + 2) + (3 * 16 + 3)
    assert 4 * numbers < found["upload_bytes"] < 4 * numbers + 3500


def test_gradients_are_told_of(
    config: Path, client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for features in ("a", "gradients"):
        tree = yaml.safe_load(config.read_text())
        tree.setdefault("server", {}).setdefault("clustering", {})["features"] = features
        asked = tmp_path / f"{features}.yaml"
        asked.write_text(yaml.safe_dump(tree))
        assert call("client", "check", client(), "--config", asked, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tasks"][0]["steps"] == found[1]["tasks"][0]["steps"]
    # Three directions of the inputs of query and value of 2 layers, in float32.
    more = found[1]["upload_bytes"] - found[0]["upload_bytes"]
    assert 4 * (3 * 2 * 2 * 16) < more < 4 * (3 * 2 * 2 * 16) + 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "none.jsonl"}, "tasks.mood.path: '"),
        ({"path": "none.jsonl"}, "none.jsonl': no such file or folder"),
        ({"columns": ["text"]}, "tasks.mood.columns: the train split of"),
        ({"columns": ["text"]}, "has no column 'text'; it has words, feeling"),
        ({"label": "stars"}, "tasks.mood.label: the train split of"),
        ({"label": None}, "tasks.mood.label: not given; a text task needs its label column"),
        ({"kind": None}, "tasks.mood.kind: not given; allowed are text, image"),
        ({"path": "empty.jsonl"}, "empty.jsonl' is empty"),
        ({"path": "one.jsonl"}, "tasks.mood.label: column 'feeling' holds one class only"),
        ({"labels": ["sunny", "rainy"]}, "has label 'cloudy'; allowed are sunny, rainy"),
        ({"validation_path": "none.csv"}, "tasks.mood.validation_path: '"),
        ({"kind": "image", "columns": ["words"]}, "backbone.name"),
    ],
)
def test_what_is_wrong_is_one_line(
    config: Path,
    client: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    path = client(**changes)
    (path.parent / "empty.jsonl").write_text("")
    (path.parent / "one.jsonl").write_text('{"words": "good", "feeling": "sunny"}\n' * 20)
    assert call("client", "check", path, "--config", config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_files_that_are_not_there_and_a_wrong_backbone(
    config: Path, client: Callable[..., Path], capsys: pytest.CaptureFixture[str], tiny_vit: Path, tmp_path: Path
) -> None:
    assert call("client", "check", tmp_path / "no.yaml", "--config", config) == 2
    assert "no.yaml: no such file" in capsys.readouterr().err
    assert call("client", "check", client(), "--config", tmp_path / "no.yaml") == 2
    assert "no.yaml: no such file" in capsys.readouterr().err
    assert call("client", "check", client()) == 2
    assert "Missing option '--config'" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    tree = yaml.safe_load(config.read_text())
    other.write_text(yaml.safe_dump({**tree, "backbone": {"name": str(tiny_vit)}}))
    assert call("client", "check", client(), "--config", other) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "backbone.name" in line
    assert str(tiny_vit) in line


def test_a_client_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("client") == 2
    assert capsys.readouterr().err == "error: Missing command. (see `fltac client --help`)\n"
