"""Label spaces made from the same rows."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from fltac.config import TaskConfig, load_config
from fltac.data.derived import TURNS, quarter_turns
from fltac.data.encoded import EncodedTask, load_tasks, majority_score
from fltac.data.image import image_files
from fltac.data.loading import load_rows
from fltac.data.task_presets import CIFAR10_GROUPS
from fltac.data.tasks import resolve_task
from fltac.errors import InputError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def draw(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write(folder: Path, labels: list[Any], test_labels: list[Any], images: np.ndarray | None = None) -> Path:
    """A folder with ``train`` and ``test``; the same images in both."""
    images = draw(max(len(labels), len(test_labels))) if images is None else images
    for name, own in (("train", labels), ("test", test_labels)):
        files = [png(image) for image in images[: len(own)]]
        pq.write_table(pa.table({"img": files, "label": own}), folder / f"{name}.parquet")
    return folder


def load(folder: Path, backbone: Path, training: dict[str, Any] | None = None, **task: Any) -> EncodedTask:
    settings = {"kind": "image", "path": str(folder), "columns": ["img"], "validation_split": "test", **task}
    tree = {"backbone": {"name": str(backbone)}, "tasks": {"t": settings}, "training": training or {}}
    return load_tasks(load_config(tree), str(backbone))["t"]


def refused(folder: Path, backbone: Path, **task: Any) -> str:
    with pytest.raises(InputError) as error:
        load(folder, backbone, **task)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_groups_become_classes_in_the_order_of_the_config(tmp_path: Path, tiny_vit: Path) -> None:
    folder = write(tmp_path, ["cat", "ship", "dog", "truck"], ["truck", "dog"])
    task = load(folder, tiny_vit, classes={"vehicle": ["ship", "truck"], "animal": ["dog", "cat"]})
    assert (task.train.labels.tolist(), task.validation.labels.tolist()) == ([1, 0, 1, 0], [0, 1])
    assert (task.label_names, task.outputs) == (("vehicle", "animal"), 2)


def test_classes_without_names_are_grouped_by_number(tmp_path: Path, tiny_vit: Path) -> None:
    folder = write(tmp_path, [0, 1, 2, 3], [3, 0])
    task = load(folder, tiny_vit, classes={"low": [0, 1], "two": [2], "three": ["3"]})
    assert (task.train.labels.tolist(), task.validation.labels.tolist()) == ([0, 0, 1, 2], [2, 0])
    assert task.label_names == ("low", "two", "three")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"a": ["cat", "dog"]}, "tasks.t.classes: got 1 groups; allowed are two or more"),
        ({"a": ["cat", "dog"], "b": []}, "tasks.t.classes.b: the group is empty"),
        ({"a": ["cat", "dog"], "b": ["cat"]}, "'cat' stands in a and in b; each class may stand once"),
        ({"a": ["cat"], "b": ["dgo"]}, "classes: got 'dgo', which is no class of the label column; did you mean dog?"),
        ({"a": ["cat"], "b": ["zzz"]}, "got 'zzz', which is no class of the label column; allowed are cat, dog"),
    ],
)  # fmt: skip
def test_wrong_groups(tmp_path: Path, tiny_vit: Path, classes: Any, expected: str) -> None:
    assert expected in refused(write(tmp_path, ["cat", "dog"], ["cat"]), tiny_vit, classes=classes)


def test_a_class_in_no_group_is_named(tmp_path: Path, tiny_vit: Path) -> None:
    folder = write(tmp_path, ["cat", "dog", "ship"], ["cat"])
    assert refused(folder, tiny_vit, classes={"a": ["cat"], "b": ["dog"]}) == (
        "tasks.t.classes: the class 'ship' stands in no group; every class has to stand in one"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"metric": "pearson", "classes": {"a": [1], "b": [2]}}, "tasks.t.classes: metric pearson makes a regression"),
        ({"metric": "pearson", "transform": "rotate4"}, "tasks.t.transform: metric pearson makes a regression"),
        ({"labels": ["a", "b"], "transform": "rotate4"}, "tasks.t.labels: transform 'rotate4' makes the labels"),
        ({"kind": "text", "transform": "rotate4"}, "tasks.t.transform: got 'rotate4'; allowed with image tasks only"),
        ({"kind": "text", "mirror": True}, "tasks.t.mirror: got True; allowed with image tasks only"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], expected: str) -> None:
    task = {"kind": "image", "path": "a", "columns": ["x"], "label": "y", **settings}
    with pytest.raises(InputError, match=expected):
        resolve_task("t", TaskConfig(**task), None)


def test_turned_images_and_their_labels(tmp_path: Path, tiny_vit: Path) -> None:
    images = draw(40)
    task = load(write(tmp_path, [0] * 40, [0] * 30, images), tiny_vit, transform="rotate4")
    assert (task.outputs, task.label_names, task.mirror) == (4, ("0", "90", "180", "270"), False)
    for split, name, count in ((task.train, "train", 40), (task.validation, "test", 30)):
        turns = quarter_turns(name, count)
        assert set(turns.tolist()) == {0, 1, 2, 3}
        np.testing.assert_array_equal(split.labels, turns)
        expected = np.stack([np.rot90(image, turn) for image, turn in zip(images, turns, strict=False)])
        seen = split.batch(np.arange(count))["pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(seen, expected / 127.5 - 1, atol=1e-6)
    assert quarter_turns("train", 30).tolist() != quarter_turns("test", 30).tolist()


def test_a_rows_turn_depends_on_split_and_row_alone(tmp_path: Path, tiny_vit: Path) -> None:
    assert quarter_turns("train", 200)[:60].tolist() == quarter_turns("train", 60).tolist()
    folder = write(tmp_path, [0] * 40, [0])
    whole = {"kind": "image", "path": str(folder), "columns": ["img"], "transform": "rotate4"}
    for seed in (0, 1):
        raw = load_rows(resolve_task("t", TaskConfig(**whole, max_rows=9, validation=0.3), None), seed)
        for split in (raw.train, raw.validation):
            np.testing.assert_array_equal(split.labels, quarter_turns("train", 40)[split.rows])


def test_turned_images_need_no_label_column(tmp_path: Path, tiny_vit: Path) -> None:
    for name in ("train", "test"):
        pq.write_table(pa.table({"img": [png(image) for image in draw(5)]}), tmp_path / f"{name}.parquet")
    assert load(tmp_path, tiny_vit, transform="rotate4").outputs == 4
    assert "has no column 'label'" in refused(tmp_path, tiny_vit)


def test_turned_images_are_measured_as_they_are_seen(tmp_path: Path) -> None:
    """Of 4 x 8 pixels, some lying and some standing: each is resized once, from its own shape."""
    from transformers import ViTConfig

    folder = tmp_path / "b"
    ViTConfig(image_size=8, patch_size=4).save_pretrained(folder)
    images = draw(6, 4, 8)
    task = load(write(tmp_path, [0] * 6, [0], images), folder, transform="rotate4")
    turned = [np.rot90(image, turn) for image, turn in zip(images, quarter_turns("train", 6), strict=True)]
    expected = np.stack([Image.fromarray(np.ascontiguousarray(image)).resize((8, 8), 2) for image in turned])
    seen = task.train.batch(np.arange(6))["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(seen, expected / 127.5 - 1, atol=1e-6)


def test_turned_images_leave_as_files_that_show_them_turned(tmp_path: Path) -> None:
    images = draw(6)
    folder = write(tmp_path, [0] * 6, [0], images)
    task = resolve_task("t", TaskConfig(kind="image", path=str(folder), columns=["img"], transform="rotate4"), None)
    raw = load_rows(task, 0).train
    for row, data in zip(raw.rows, image_files(raw), strict=True):
        turn = quarter_turns("train", 6)[row]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.rot90(images[row], turn))


def test_turns_can_be_grouped(tmp_path: Path, tiny_vit: Path) -> None:
    folder = write(tmp_path, [0, 1] * 20, [0])
    classes = {"upright": [0, 180], "lying": [90, 270]}
    task = load(folder, tiny_vit, transform="rotate4", classes=classes)
    np.testing.assert_array_equal(task.train.labels, quarter_turns("train", 40) % 2)
    whole = load(folder, tiny_vit, transform="rotate4")
    plain = load(folder, tiny_vit)
    assert len({other.train.fingerprint for other in (task, whole, plain)}) == 3


def test_a_class_that_training_never_saw_is_scored_if_it_has_a_name(tmp_path: Path, tiny_vit: Path) -> None:
    """Listed in ``labels``, in the data's own class names or in ``classes`` it has an output; else it is refused."""
    folder = write(tmp_path, ["cat", "cat", "dog"], ["cat", "ship", "ship", "dog"])
    assert "test row 1 has label 'ship'; allowed are cat, dog" in refused(folder, tiny_vit)
    task = load(folder, tiny_vit, labels=["cat", "dog", "ship"])
    assert (task.outputs, task.validation.labels.tolist()) == (3, [0, 2, 2, 1])
    assert majority_score(task) == 0.25, "its rows count, and count as wrong"
    grouped = load(
        folder, tiny_vit, labels=["cat", "dog", "ship"], classes={"animal": ["cat", "dog"], "ship": ["ship"]}
    )
    assert (grouped.outputs, grouped.validation.labels.tolist()) == (2, [0, 1, 1, 0])


def test_an_image_that_cannot_be_decoded_is_named_in_a_turned_task_too(tmp_path: Path, tiny_vit: Path) -> None:
    for name in ("train", "test"):
        files = [png(draw(1)[0]), b"no image"]
        pq.write_table(pa.table({"img": files, "label": [0, 1]}), tmp_path / f"{name}.parquet")
    expected = "task t: train row 1 is not an image that Pillow can decode"
    assert refused(tmp_path, tiny_vit, transform="rotate4") == expected


def test_the_presets_from_the_hubs_rows(tmp_path: Path, tiny_vit: Path) -> None:
    """With the hub's features: an image column and class labels with names."""
    from datasets import ClassLabel

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = Features({"img": ImageFeature(decode=False), "label": ClassLabel(names=names), "n": Value("int64")})
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        rows = {
            "img": [{"bytes": png(image), "path": None} for image in draw(10)],
            "label": [*range(10)],
            "n": [0] * 10,
        }
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "cifar10" / f"{split}.parquet"))
    presets = ["cifar10", "cifar10-animal", "cifar10-rotation"]
    tree = {"backbone": {"name": str(tiny_vit)}, "tasks": presets, "data_root": str(tmp_path)}
    tasks = load_tasks(load_config(tree), str(tiny_vit))
    assert [tasks[name].outputs for name in presets] == [10, 2, 4]
    assert [tasks[name].mirror for name in presets] == [True, True, False]
    animal = [name in CIFAR10_GROUPS["animal"] for name in names]
    assert tasks["cifar10-animal"].validation.labels.tolist() == [0 if own else 1 for own in animal]
    assert tasks["cifar10-rotation"].label_names == TURNS
