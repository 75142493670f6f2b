"""What a config's task comes to."""

from pathlib import Path

import pytest

from fltac.config import TaskConfig
from fltac.data.task_presets import TASK_PRESETS
from fltac.data.tasks import resolve_task
from fltac.errors import InputError


def refused(task: TaskConfig, name: str = "t", data_root: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        resolve_task(name, task, data_root)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_preset_fills_everything() -> None:
    task = resolve_task("mine", TaskConfig(preset="mrpc"), None)
    assert (task.name, task.kind, task.hub, task.subset) == ("mine", "text", "nyu-mll/glue", "mrpc")
    assert (task.columns, task.label, task.metric) == (("sentence1", "sentence2"), "label", "accuracy")
    assert (task.train_split, task.validation_split, task.path) == ("train", "validation", None)
    assert task.source == "nyu-mll/glue/mrpc"
    assert not task.regression


@pytest.mark.parametrize(
    ("name", "metric", "validation_split"),
    [
        *[(name, "accuracy", "validation") for name in ("sst2", "mrpc", "qqp", "qnli", "rte")],
        ("cola", "matthews", "validation"),
        ("mnli", "accuracy", "validation_matched"),
        ("stsb", "pearson", "validation"),
        ("cifar10", "accuracy", "test"),
        ("cifar100", "accuracy", "test"),
    ],
)
def test_metrics_and_validation_splits(name: str, metric: str, validation_split: str) -> None:
    task = resolve_task(name, TaskConfig(preset=name), None)
    assert (task.metric, task.validation_split, task.validation) == (metric, validation_split, None)
    assert task.regression == (metric == "pearson")


def test_every_preset_resolves() -> None:
    for name in TASK_PRESETS:
        task = resolve_task(name, TaskConfig(preset=name), None)
        assert (task.hub is None) == name.startswith("digits-")
        assert (task.builtin == name) == name.startswith("digits-")
        assert task.validation == {"digits": 0.25, "dolly": 0.1}.get(name.partition("-")[0])


def test_what_the_config_says_is_stronger_than_the_preset() -> None:
    task = resolve_task("t", TaskConfig(preset="sst2", metric="f1", label="y", hub="mirror/glue"), None)
    assert (task.metric, task.label, task.hub, task.subset) == ("f1", "y", "mirror/glue", "sst2")
    assert task.validation_split == "validation"


def test_a_share_for_validation_replaces_the_presets_split() -> None:
    task = resolve_task("t", TaskConfig(preset="sst2", validation=0.2), None)
    assert (task.validation, task.validation_split) == (0.2, None)


def test_one_file_instead_of_a_presets_hub_has_no_validation_split(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("sentence,label\na,0\n")
    task = resolve_task("t", TaskConfig(preset="sst2", path=str(file)), None)
    assert (task.hub, task.path, task.validation_split) == (None, str(file), None)
    folder = resolve_task("t", TaskConfig(preset="cifar10", path=str(tmp_path)), None)
    assert (folder.path, folder.validation_split) == (str(tmp_path), "test")


def test_data_root_replaces_the_hub_for_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    (tmp_path / "d" / "glue" / "rte").mkdir(parents=True)
    (tmp_path / "d" / "cifar10").mkdir()
    for name, folder in (("rte", "glue/rte"), ("cifar10", "cifar10")):
        task = resolve_task(name, TaskConfig(preset=name), "${SOMEWHERE}/d")
        assert (task.hub, task.path, task.path_key) == (None, str(tmp_path / "d" / folder), "data_root")
    own = resolve_task("t", TaskConfig(preset="rte", hub="mirror/glue"), "${SOMEWHERE}/d")
    assert (own.hub, own.path) == ("mirror/glue", None)
    digits = resolve_task("t", TaskConfig(preset="digits-high"), "${SOMEWHERE}/d")
    assert digits.builtin == "digits-high"
    assert refused(TaskConfig(preset="cola"), "cola", "${SOMEWHERE}/d") == (
        "data_root: '${SOMEWHERE}/d' has no folder glue/cola, which the task cola needs"
    )
    assert "NOT_SET_ANYWHERE, which is not set" in refused(TaskConfig(preset="cola"), "t", "${NOT_SET_ANYWHERE}")


def test_an_image_task_has_the_usual_columns() -> None:
    task = resolve_task("t", TaskConfig(kind="image", path="pictures"), None)
    assert (task.columns, task.label, task.metric) == (("image",), "label", "accuracy")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (TaskConfig(preset="sst-2"), "tasks.t.preset: got 'sst-2'; did you mean sst2?"),
        (TaskConfig(preset="zzz"), "tasks.t.preset: got 'zzz'; allowed are sst2, mrpc"),
        (TaskConfig(kind="text"), "tasks.t: names no data; give preset, hub or path"),
        (TaskConfig(path="a", hub="b"), "tasks.t: hub and path exclude each other"),
        (
            TaskConfig(preset="sst2", validation=0.1, validation_split="x"),
            "tasks.t: validation and validation_split exclude each other",
        ),
        (TaskConfig(path="a.csv"), "tasks.t.kind: not given; allowed are text, image"),
        (TaskConfig(path="a.csv", kind="text"), "tasks.t.columns: got nothing; a text task has one or two"),
        (
            TaskConfig(path="a.csv", kind="text", columns=["a", "b", "c"]),
            "tasks.t.columns: got ['a', 'b', 'c']; a text task has one or two",
        ),
        (TaskConfig(path="a.csv", kind="text", columns=["a"]), "tasks.t.label: not given"),
        (TaskConfig(path="a", kind="image", columns=["a", "b"]), "an image task has one image column"),
        (
            TaskConfig(preset="stsb", labels=["a", "b"]),
            "tasks.t.labels: metric pearson makes a regression, which has no class names",
        ),
        (TaskConfig(preset="sst2", labels=["a", "a"]), "tasks.t.labels: got ['a', 'a']; each name may stand"),
        (TaskConfig(path="builtin:digits", kind="image"), "built-in rows come by preset: digits-parity"),
        (TaskConfig(path="${NOT_SET_ANYWHERE}/a", kind="image"), "NOT_SET_ANYWHERE, which is not set"),
        (TaskConfig(path="package:no_such_package_here/a", kind="image"), "is not installed"),
    ],
)
def test_wrong_tasks(task: TaskConfig, expected: str) -> None:
    assert expected in refused(task)


def test_a_forgotten_preset_is_named() -> None:
    assert "'sst2' is a preset, so `preset: sst2` would do" in refused(TaskConfig(max_rows=5), "sst2")
