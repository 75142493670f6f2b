"""The partition as client folders: the same rows as the simulation's, all or nothing, and what it refuses."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from fltac.cli import main
from fltac.config import Config, load_config, to_yaml
from fltac.config.client_file import load_client_file
from fltac.data.loading import load_rows
from fltac.data.partition import make_partition
from fltac.data.tasks import resolve_task
from fltac.errors import InputError
from fltac.runtime import partition_files
from fltac.runtime.partition_files import write_partition
from language import language_tree
from runtime.owners import federation


def rows(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return found


def test_every_row_is_at_one_client_in_the_order_of_the_source(tmp_path: Path) -> None:
    config = federation(tmp_path)
    folders = write_partition(config, tmp_path / "out")
    assert [folder.name for folder in folders] == ["client-0", "client-1", "client-2"]
    raw = {name: load_rows(resolve_task(name, task, None), 0) for name, task in config.tasks.items()}
    split = make_partition(config, {name: task.train.labels for name, task in raw.items()})
    held: dict[str, list[int]] = {name: [] for name in raw}
    for folder in folders:
        client = load_client_file(folder / "client.yaml")
        assert client.id == folder.name
        assert list(client.tasks) == split.client_tasks(client.id)
        assert list(client.slots.values()) == list(range(len(client.tasks)))
        for slot, name in enumerate(client.tasks):
            source = raw[name].train
            texts = source.data["words"]
            names = raw[name].label_names or [str(number) for number in range(raw[name].outputs)]
            expected = split.rows[client.id, name]
            found = rows(folder / f"slot-{slot}-train.parquet")
            assert [row["words"] for row in found] == [texts[number] for number in expected]
            if name == "letters":
                np.testing.assert_array_equal([row["feeling"] for row in found], source.labels[expected])
            else:
                assert [row["feeling"] for row in found] == [names[label] for label in source.labels[expected]]
            validation = rows(folder / f"slot-{slot}-validation.parquet")
            assert [row["words"] for row in validation] == list(raw[name].validation.data["words"])
            held[name] += expected.tolist()
    assert {name: sorted(numbers) for name, numbers in held.items()} == {
        name: list(range(len(task.train.labels))) for name, task in raw.items()
    }


def test_class_numbers_are_the_same_at_a_client_that_holds_one_class_alone(tmp_path: Path) -> None:
    config = federation(tmp_path, "federation.partition={rule: label-skew, alpha: 0.01}")
    for folder in write_partition(config, tmp_path / "out"):
        client = load_client_file(folder / "client.yaml")
        for name, count in (("mood", 2), ("hues", 3)):
            if name in client.tasks:
                raw = load_rows(resolve_task(name, client.tasks[name], None), 0)
                assert raw.outputs == count
                assert raw.label_names == (("cloudy", "sunny") if name == "mood" else ("0", "1", "2"))


def test_the_coordinators_config_names_no_task(tmp_path: Path) -> None:
    table = {"a": {"mood": 0.5, "hues": 0.5}, "b": {"mood": 0.5, "hues": 0.5, "letters": 1.0}}
    config = federation(tmp_path, f"federation.partition={{rule: table, table: {table}}}")
    assert [folder.name for folder in write_partition(config, tmp_path / "out")] == ["a", "b"]
    text = (tmp_path / "out" / "coordinator.yaml").read_text()
    for secret in ("mood", "hues", "letters", "jsonl", "words"):
        assert secret not in text
    found = load_config(tmp_path / "out" / "coordinator.yaml")
    assert found.tasks == {}
    assert (found.clusters, found.training, found.lora) == (3, config.training, config.lora)


def test_images_come_as_they_are_stored(tmp_path: Path) -> None:
    """A JPEG is not encoded again; the class of a folder becomes a name."""
    draw = np.random.default_rng(0)
    files = {}
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            buffer = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, "JPEG")
            (tmp_path / "images" / label / f"{number}.jpg").write_bytes(buffer.getvalue())
            files[buffer.getvalue()] = label
    config = load_config(
        {
            "backbone": {"name": "builtin:digits-vit"},
            "tasks": {"pets": {"kind": "image", "path": str(tmp_path / "images"), "validation": 0.25}},
            "federation": {"clients": 2, "partition": {"rule": "iid"}},
        }
    )
    found = [
        row for folder in write_partition(config, tmp_path / "out") for row in rows(folder / "slot-0-train.parquet")
    ]
    assert len(found) == 6
    assert all(files[row["image"]] == row["label"] for row in found)


def test_a_data_owner_mirrors_what_the_simulation_mirrors(tmp_path: Path) -> None:
    """A mirrored digit is another one, and a mirrored quarter turn another turn."""
    rotation = {"preset": "digits-loop", "transform": "rotate4"}
    tasks = {"parity": {"preset": "digits-parity"}, "turn": rotation, "free": {"preset": "digits-high", "mirror": True}}
    config = load_config(
        {
            "backbone": {"name": "builtin:digits-vit"},
            "tasks": tasks,
            "federation": {"clients": 1, "partition": {"rule": "iid"}},
            "training": {"augment": "crop-flip"},
        }
    )
    (folder,) = write_partition(config, tmp_path / "out")
    own = load_client_file(folder / "client.yaml").tasks
    mirrored = {name: resolve_task(name, task, None).mirror for name, task in own.items()}
    assert mirrored == {name: resolve_task(name, task, None).mirror for name, task in config.tasks.items()}
    assert mirrored == {"parity": False, "turn": False, "free": True}


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    config = federation(tmp_path)
    (tmp_path / "out").mkdir()
    write_partition(config, tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(InputError, match="is not empty"):
        write_partition(config, tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before
    with pytest.raises(InputError, match="is a file"):
        write_partition(config, tmp_path / "mood.jsonl")


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = federation(tmp_path)
    monkeypatch.setattr(partition_files, "write_new", full)
    with pytest.raises(InputError, match=r"out cannot be written: No space left on device"):
        write_partition(config, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=central", r"federation\.pool: got 'sum'"),
        ("method=fedit-heads", r"training\.heads: got 'per-task'"),
        (
            "federation.partition={rule: table, table: {../up: {mood: 1.0, hues: 1.0, letters: 1.0}}}",
            r"federation\.partition\.table: client '\.\./up'",
        ),
    ],
)
def test_what_cannot_be_federated(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_partition(federation(tmp_path, override), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["client_skew=labels", "rule=label-skew"])
def test_rows_without_classes_are_not_split_by_class(tmp_path: Path, setting: str) -> None:
    """As a simulation of the same config is refused."""
    config = load_config(language_tree(tmp_path), [f"federation.partition.{setting}"])
    with pytest.raises(InputError, match=r"but the task colour has no classes"):
        write_partition(config, tmp_path / "out")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: Config = federation(tmp_path)
    (tmp_path / "own.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as exit_:
        main(["partition", str(tmp_path / "own.yaml"), "--write", str(tmp_path / "out")])
    assert exit_.value.code == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().err
    tree = yaml.safe_load((tmp_path / "out" / "client-0" / "client.yaml").read_text())
    assert tree["client"] == "client-0"
    (tmp_path / "none.yaml").write_text((tmp_path / "out" / "coordinator.yaml").read_text())
    for command in ("run", "partition"):
        with pytest.raises(SystemExit) as exit_:
            main([command, str(tmp_path / "none.yaml")])
        assert exit_.value.code == 2
        assert "error: tasks: there are none; only the coordinator" in capsys.readouterr().err
