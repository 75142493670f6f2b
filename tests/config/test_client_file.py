"""``client.yaml``: what it says, where its paths lie, and what is refused by name."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fltac.config import load_config
from fltac.config.client_file import load_client_file
from fltac.errors import InputError

TASK = {"kind": "text", "path": "rows.csv", "columns": ["text"], "label": "stars"}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def own(folder: Path, **changes: Any) -> Path:
    return write(folder, {"client": "hospital-a", "tasks": {"mood": TASK}, **changes})


def test_paths_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", str(tmp_path / "else"))
    tasks = {
        "beside": TASK,
        "above": {**TASK, "path": "../rows.csv", "validation_path": "sub/rows.csv"},
        "absolute": {**TASK, "path": "/data/rows.csv"},
        "variable": {**TASK, "path": "${ROWS}/rows.csv"},
        "builtin": {"preset": "digits-parity", "path": "builtin:digits"},
        "package": {**TASK, "path": "package:fltac/data"},
    }
    path = own(tmp_path, tasks=tasks)
    monkeypatch.chdir(tmp_path.parent)
    found = load_client_file(Path(os.path.relpath(path)))
    assert {name: task.path for name, task in found.tasks.items()} == {
        "beside": str(tmp_path / "rows.csv"),
        "above": str(tmp_path / ".." / "rows.csv"),
        "absolute": "/data/rows.csv",
        "variable": str(tmp_path / "else" / "rows.csv"),
        "builtin": "builtin:digits",
        "package": "package:fltac/data",
    }
    assert found.tasks["above"].validation_path == str(tmp_path / "sub" / "rows.csv")


def test_slots_are_places_unless_given_and_tasks_come_in_their_order(tmp_path: Path) -> None:
    found = load_client_file(own(tmp_path, tasks={"a": TASK, "b": TASK, "c": TASK}))
    assert dict(found.slots) == {"a": 0, "b": 1, "c": 2}
    found = load_client_file(own(tmp_path, tasks={"a": {**TASK, "slot": 9}, "b": TASK, "c": {**TASK, "slot": 0}}))
    assert list(found.slots.items()) == [("c", 0), ("b", 1), ("a", 9)]
    assert list(found.tasks) == ["c", "b", "a"]


def test_the_coordinators_config_with_what_is_this_clients(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = load_config({"backbone": {"name": "hub/id", "device": "cuda"}, "tasks": ["sst2"], "data_root": "x"})
    found = load_client_file(own(tmp_path)).applied(config)
    assert (found.backbone.name, found.backbone.device) == ("hub/id", "cuda")
    assert list(found.tasks) == ["mood"]
    assert found.data_root is None
    assert found.training == config.training
    placed = load_client_file(own(tmp_path, backbone={"name": "weights", "device": "cpu"})).applied(config)
    assert (placed.backbone.name, placed.backbone.device) == (str(tmp_path / "weights"), "cpu")
    hub = load_client_file(own(tmp_path, backbone={"name": "other/hub-id"})).applied(config)
    assert hub.backbone.name == "other/hub-id"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client": "a/b"}, "client: got 'a/b'; allowed are up to 64 letters"),
        ({"client": ".hidden"}, "client: got '.hidden'"),
        ({"client": "a" * 65}, "client: got 'aaaa"),
        ({"client": 7}, "client: got 7; input should be a valid string"),
        ({"clients": "a"}, "clients: unknown key; did you mean client?"),
        ({"tasks": {}}, "tasks: dictionary should have at least 1 item"),
        ({"tasks": {"mood": {**TASK, "lable": "x"}}}, "tasks.mood.lable: unknown key; did you mean tasks.mood.label?"),
        ({"tasks": {"my-task": {**TASK, "max_rows": 0}}}, "tasks.my-task.max_rows: got 0"),
        ({"tasks": {"mood": {**TASK, "slot": -1}}}, "tasks.mood.slot: got -1"),
        ({"tasks": {"mood": {**TASK, "slot": 10_000}}}, "tasks.mood.slot: got 10000; input should be less than 10000"),
        (
            {"tasks": {"a": {**TASK, "slot": 1}, "b": TASK}},
            "tasks.b.slot: got 1, which is the slot of a as well; give each its own",
        ),
        ({"tasks": {"mood": {**TASK, "path": "${NOT_SET_ANYWHERE}/x"}}}, "tasks.mood.path: '${NOT_SET_ANYWHERE}/x'"),
        ({"limits": {"threads": 0}}, "limits.threads: got 0"),
        ({"limits": {"thread": 1}}, "limits.thread: unknown key; did you mean limits.threads?"),
        ({"backbone": {"name": "./nowhere"}}, "backbone.name: got './nowhere'; there is no folder"),
        ({"backbone": {"device": "tpu"}}, "backbone.device: got 'tpu'"),
        ({"tasks": ["sst2"]}, "tasks: got ['sst2']"),
    ],
)
def test_one_line_that_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_client_file(own(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_client_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"client file .*none\.yaml: no such file"):
        load_client_file(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="client: field required"):
        load_client_file(write(tmp_path, {"tasks": {"mood": TASK}}))
    with pytest.raises(InputError, match=r"client file .*: expected a mapping of sections, got list"):
        load_client_file(write(tmp_path, [1]))


def test_the_stamp_follows_the_file_and_its_data(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,stars\n")
    path = own(tmp_path)
    found = load_client_file(path)
    first = found.stamp()
    assert load_client_file(path).stamp() == first
    (tmp_path / "other.csv").write_text("x")
    assert found.stamp() == first
    (tmp_path / "rows.csv").write_text("text,stars\na,1\n")
    second = found.stamp()
    path.write_text(path.read_text() + "limits: {threads: 1}\n")
    third = found.stamp()
    path.unlink()
    assert len({first, second, third, found.stamp()}) == 4
