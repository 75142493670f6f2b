"""Image tasks: decoding, sizes, normalisation, and bad images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import BertConfig, ViTConfig

from fltac.config import BackboneConfig, load_config
from fltac.data.encoded import EncodedTask, load_tasks
from fltac.data.image import PixelRows
from fltac.data.image_settings import Geometry, Normalisation, read_image_settings
from fltac.data.store import BATCH
from fltac.errors import InputError

SETTINGS = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
    "resample": 2,
}


def backbone(folder: Path, settings: dict[str, Any] | None = None, **architecture: Any) -> str:
    ViTConfig(**{"image_size": 32, "patch_size": 4, **architecture}).save_pretrained(folder)
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def draw(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def write(path: Path, images: list[Any]) -> Path:
    pq.write_table(pa.table({"image": images, "label": [row % 2 for row in range(len(images))]}), path)
    return path


def load(path: Path, folder: str, **task: Any) -> EncodedTask:
    settings = {"kind": "image", "path": str(path), **task}
    if "validation_path" not in settings:
        settings["validation_path"] = str(path)
    return load_tasks(load_config({"backbone": {"name": folder}, "tasks": {"t": settings}}), folder)["t"]


def pixels(task: EncodedTask) -> np.ndarray:
    """All training images as the backbone gets them."""
    batch = task.train.batch(np.arange(len(task.train)))
    assert batch.keys() == {"pixel_values"}
    assert batch["pixel_values"].dtype == np.float32
    return batch["pixel_values"]


def normalised(images: np.ndarray) -> np.ndarray:
    """float64 ``[b, 3, H, W]`` by the formula, with the numbers of SETTINGS."""
    values = (images / 255 - np.array(SETTINGS["image_mean"])) / np.array(SETTINGS["image_std"])
    return values.transpose(0, 3, 1, 2)


def test_images_of_the_backbones_size(tmp_path: Path) -> None:
    images = draw(5, 32, 32)
    task = load(write(tmp_path / "r.parquet", [png(image) for image in images]), backbone(tmp_path / "b", SETTINGS))
    np.testing.assert_allclose(pixels(task), normalised(images), atol=1e-5)
    assert (task.kind, task.outputs, len(task.train), task.train.truncated) == ("image", 2, 5, 0)
    assert task.train.lengths.tolist() == [1] * 5
    some = task.train.batch(np.array([3, 1, 3]), pad_to=1)["pixel_values"]
    np.testing.assert_array_equal(some, pixels(task)[[3, 1, 3]])


def stored_size(task: EncodedTask) -> tuple[int, ...]:
    reader = task.train.reader
    assert isinstance(reader, PixelRows)
    assert not reader.chunks[0].flags.owndata, "copied instead of mapped"
    return reader.chunks[0].shape[1:]


@pytest.mark.parametrize("resample", [2, 3])
def test_small_images_are_stored_small_and_enlarged_in_the_batch(tmp_path: Path, resample: int) -> None:
    images = draw(4, 8, 12)
    folder = backbone(tmp_path / "b", {**SETTINGS, "resample": resample})
    task = load(write(tmp_path / "r.parquet", [png(image) for image in images]), folder)
    assert stored_size(task) == (8, 12, 3)
    with_pillow = np.stack([Image.fromarray(image).resize((32, 32), resample) for image in images])
    # Within two of 255 levels; the smallest deviation is 0.2.
    np.testing.assert_allclose(pixels(task), normalised(with_pillow), atol=2.01 / 255 / 0.2)


@pytest.mark.parametrize("case", ["larger", "several sizes", "another filter"])
def test_other_images_are_resized_once_with_pillow(tmp_path: Path, case: str) -> None:
    images = [*draw(3, 40, 20), *draw(2, 16, 16)] if case == "several sizes" else [*draw(5, 8, 8)]
    if case == "larger":
        images = [*draw(5, 48, 40)]
    resample = 1 if case == "another filter" else 2
    folder = backbone(tmp_path / "b", {**SETTINGS, "resample": resample})
    task = load(write(tmp_path / "r.parquet", [png(image) for image in images]), folder)
    assert stored_size(task) == (32, 32, 3)
    expected = np.stack([Image.fromarray(image).resize((32, 32), resample) for image in images])
    np.testing.assert_allclose(pixels(task), normalised(expected), atol=1e-5)


def test_the_shorter_edge_then_the_middle(tmp_path: Path) -> None:
    settings = {**SETTINGS, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    folder = backbone(tmp_path / "b", settings)
    image = draw(1, 80, 160)[0]
    task = load(write(tmp_path / "r.parquet", [png(image), png(image)]), folder)
    resized = np.asarray(Image.fromarray(image).resize((80, 40), 2))
    np.testing.assert_allclose(pixels(task)[:1], normalised(resized[None, 4:36, 24:56]), atol=1e-5)
    small = draw(1, 10, 20)[0]
    task = load(write(tmp_path / "s.parquet", [png(small), png(small)]), folder)
    assert stored_size(task) == (10, 20, 3)
    resized = np.asarray(Image.fromarray(small).resize((80, 40), 2))
    np.testing.assert_allclose(pixels(task)[:1], normalised(resized[None, 4:36, 24:56]), atol=2.01 / 255 / 0.2)


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "grey", "palette", "alpha", "turned"])
def test_every_way_to_hold_an_image(tmp_path: Path, kind: str) -> None:
    images = draw(2, 32, 32)
    expected = images
    stored: list[Any] = [png(image) for image in images]
    if kind == "struct":
        stored = [{"bytes": value, "path": "x.png"} for value in stored]
    elif kind == "path":
        for number, value in enumerate(stored):
            (tmp_path / f"{number}.png").write_bytes(value)
        stored = ["0.png", str(tmp_path / "1.png")]
    elif kind == "grey":
        stored = [png(image[:, :, 0]) for image in images]
        expected = np.repeat(images[:, :, :, :1], 3, axis=3)
    elif kind == "palette":
        stored = [png(image, "P") for image in images]
        expected = np.stack([np.asarray(Image.fromarray(image).convert("P").convert("RGB")) for image in images])
    elif kind == "alpha":
        stored = [png(image, "RGBA") for image in images]
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = [png(image, exif=exif) for image in images]
        expected = np.rot90(images, -1, axes=(1, 2))
    task = load(write(tmp_path / "r.parquet", stored), backbone(tmp_path / "b", SETTINGS))
    np.testing.assert_allclose(pixels(task), normalised(expected), atol=1e-5)


def test_turned_images_are_measured_as_they_are_seen(tmp_path: Path) -> None:
    images = draw(2, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = [png(image, exif=exif) for image in images]
    task = load(write(tmp_path / "r.parquet", stored), backbone(tmp_path / "b", SETTINGS))
    assert stored_size(task) == (12, 8, 3)


def test_an_image_folder(tmp_path: Path) -> None:
    images = draw(2, 32, 32)
    for name, image in zip(("cat", "dog"), images, strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.png").write_bytes(png(image))
    task = load(tmp_path / "train", backbone(tmp_path / "b", SETTINGS))
    np.testing.assert_allclose(pixels(task), normalised(images), atol=1e-5)
    assert (task.train.labels.tolist(), task.label_names) == ([0, 1], ("cat", "dog"))
    (tmp_path / "train" / "dog" / "a.png").write_bytes(png(images[0]))
    assert load(tmp_path / "train", str(tmp_path / "b")).train.fingerprint != task.train.fingerprint


def test_an_image_folder_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw(2, 32, 32)
    for name, image in zip(("cat", "dog"), images, strict=True):
        (tmp_path / "animals" / name).mkdir(parents=True)
        (tmp_path / "animals" / name / "a.png").write_bytes(png(image))
    monkeypatch.chdir(tmp_path)
    task = load(Path("animals"), backbone(tmp_path / "b", SETTINGS))
    np.testing.assert_allclose(pixels(task), normalised(images), atol=1e-5)


def test_more_rows_than_one_record_batch(tmp_path: Path) -> None:
    count = BATCH + 88
    images = draw(count, 2, 2)
    folder = backbone(tmp_path / "b", {**SETTINGS, "size": 2}, image_size=2, patch_size=1)
    task = load(write(tmp_path / "r.parquet", [png(image) for image in images]), folder)
    assert task.train.labels.tolist() == [row % 2 for row in range(count)]
    chosen = np.array([count - 1, 0, BATCH, BATCH - 1])
    values = task.train.batch(chosen)["pixel_values"]
    np.testing.assert_allclose(values, normalised(images[chosen]), atol=1e-5)


def settings_of(folder: str) -> tuple[Geometry, Normalisation]:
    return read_image_settings(BackboneConfig(name=folder), folder, "t")


@pytest.mark.parametrize(
    ("settings", "geometry"),
    [
        (None, Geometry(32, 32, (32, 32), 2)),
        ({}, Geometry(32, 32, (32, 32), 2)),
        ({"size": 224, "resample": 3}, Geometry(224, 224, (224, 224), 3)),
        ({"size": {"height": 10, "width": 20}}, Geometry(10, 20, (10, 20), 2)),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, Geometry(224, 224, (256, 256), 2)),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, Geometry(256, 256, (256, 256), 2)),
        (
            {
                "size": 224,
                "crop_size": 224,
                "do_center_crop": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
            },
            Geometry(224, 224, 224, 2),
        ),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            Geometry(224, 224, 256, 2),
        ),
        ({"size": {"shortest_edge": 64}}, Geometry(64, 64, 64, 2)),
    ],
)
def test_sizes(tmp_path: Path, settings: dict[str, Any] | None, geometry: Geometry) -> None:
    assert settings_of(backbone(tmp_path, settings))[0] == geometry


def test_normalisation(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    assert settings_of(backbone(tmp_path / "a"))[1] == Normalisation(1 / 255, half, half)
    assert settings_of(backbone(tmp_path / "b", {"do_normalize": False}))[1] == Normalisation(
        1 / 255, (0.0,) * 3, (1.0,) * 3
    )
    assert settings_of(backbone(tmp_path / "c", {"do_rescale": False}))[1] == Normalisation(1.0, half, half)
    assert settings_of(backbone(tmp_path / "d", {"rescale_factor": 0.01}))[1].scale == 0.01


def refused(path: Path, folder: str, **task: Any) -> str:
    with pytest.raises(InputError) as error:
        load(path, folder, **task)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_images_name_task_split_and_row(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "b", SETTINGS)
    good = png(draw(1, 32, 32)[0])
    cut = png(draw(1, 32, 32)[0])[:-200]
    deep = io.BytesIO()
    Image.fromarray(np.full((32, 32), 300, dtype=np.uint16)).save(deep, "PNG")
    for bad, expected in (
        (b"no image", "task t: train row 1 is not an image that Pillow can decode"),
        (cut, "task t: train row 1 is not an image that Pillow can decode"),
        (None, "task t: train row 1 has no image: its column holds nothing; allowed are image files"),
        (deep.getvalue(), "task t: train row 1 has pixels of mode I;16; allowed are 8 bits per channel"),
    ):
        assert refused(write(tmp_path / "r.parquet", [good, bad]), folder) == expected
    paths = write(tmp_path / "p.parquet", ["none.png", "none.png"])
    assert refused(paths, folder) == "task t: train row 0: 'none.png' cannot be read: No such file or directory"
    numbers = write(tmp_path / "n.parquet", [1, 2])
    assert "train row 0 has no image: its column holds int" in refused(numbers, folder)


def test_the_row_that_is_named_is_the_files(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "b", SETTINGS)
    images: list[Any] = [png(image) for image in draw(30, 32, 32)]
    images[17] = b"no image"
    path = write(tmp_path / "r.parquet", images)
    settings = {"kind": "image", "path": str(path), "validation": 0.5}
    with pytest.raises(InputError, match="task t: train row 17 is not an image"):
        load_tasks(load_config({"backbone": {"name": folder}, "tasks": {"t": settings}}), folder)


def test_wrong_backbones(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [png(image) for image in draw(2, 8, 8)])
    BertConfig().save_pretrained(tmp_path / "text")
    assert "has neither preprocessor_config.json nor an image_size, needed by the image task t" in refused(
        path, str(tmp_path / "text")
    )
    assert "could not be loaded: " in refused(path, "nobody/none")
    assert "reads images of 1 channels; allowed are 3" in refused(path, backbone(tmp_path / "g", num_channels=1))
    wrong = backbone(tmp_path / "w", {"size": {"longest_edge": 5}})
    assert "wants images of size {'longest_edge': 5}; allowed are height and width" in refused(path, wrong)
    wrong = backbone(tmp_path / "m", {"image_mean": [0.5]})
    assert "image_mean and image_std must have three numbers" in refused(path, wrong)


@pytest.mark.data
def test_real_cifar10(data_root: Path, tmp_path: Path) -> None:
    folder = backbone(tmp_path, SETTINGS)
    root = str(data_root / "data")
    settings = {"backbone": {"name": folder}, "tasks": {"cifar10": {"preset": "cifar10", "max_rows": 50}}}
    task = load_tasks(load_config({**settings, "data_root": root}), folder)["cifar10"]
    assert (len(task.train), len(task.validation), task.outputs) == (50, 10000, 10)
    assert task.label_names is not None
    assert task.label_names[:3] == ("airplane", "automobile", "bird")
    source = pq.read_table(data_root / "data" / "cifar10" / "test.parquet").slice(600, 1).to_pylist()[0]
    image = np.asarray(Image.open(io.BytesIO(source["img"]["bytes"])).convert("RGB"))
    values = task.validation.batch(np.array([600]))["pixel_values"]
    np.testing.assert_allclose(values, normalised(image[None]), atol=1e-5)
    assert task.validation.labels[600] == source["label"]
