"""Rows from local files, image folders, the hub and the package."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fltac.config import TaskConfig
from fltac.data.loading import RawTask, choose_rows, load_rows
from fltac.data.tasks import ResolvedTask, resolve_task
from fltac.errors import InputError

TEXTS = ["a first text", "NA", "null", "12", "with, a comma", "two\nlines", 'a "quote"', "ünïcödé"]
LABELS = [0, 1, 0, 1, 1, 0, 0, 1]


def resolved(path: Path | str, name: str = "t", **settings: Any) -> ResolvedTask:
    defaults = {"kind": "text", "columns": ["text"], "label": "label"}
    return resolve_task(name, TaskConfig(**{**defaults, "path": str(path), **settings}), None)


def load(path: Path | str, seed: int = 0, **settings: Any) -> RawTask:
    return load_rows(resolved(path, **settings), seed)


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, columns: dict[str, list[Any]] | None = None) -> Path:
    """Writes rows in the format that the file's ending says."""
    columns = columns or {"text": TEXTS, "label": LABELS}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix in (".csv", ".tsv"):
        table.to_pandas().to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path.write_text(json.dumps(table.to_pylist()))
    return path


def numbered(count: int) -> dict[str, list[Any]]:
    return {"text": [f"text {row}" for row in range(count)], "label": [row % 2 for row in range(count)]}


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    raw = load(write(tmp_path / f"rows.{ending}"), validation=0.25)
    rows = {
        split.data["text"][index]: (int(split.labels[index]), int(split.rows[index]))
        for split in (raw.train, raw.validation)
        for index in range(len(split.rows))
    }
    assert rows == {text: (label, row) for row, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True))}
    assert (len(raw.train.rows), len(raw.validation.rows)) == (6, 2)
    assert (raw.outputs, raw.label_names) == (2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rows.{ending}"], "wrote beside the data"


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet")
    assert len(load(file).train.rows) == 7
    write(file, numbered(50))
    assert len(load(file).train.rows) == 45


@pytest.mark.parametrize("name", ["train.parquet", "train-00000-of-00001.parquet", "train.csv"])
def test_a_folder_with_a_file_for_each_split(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, numbered(6))
    write(tmp_path / "validation.jsonl", {"text": ["v"], "label": [1]})
    write(tmp_path / "test.parquet", {"text": ["t"], "label": [0]})
    raw = load(tmp_path)
    assert (raw.train.data["text"][:2], raw.train.rows.tolist()) == (["text 0", "text 1"], list(range(6)))
    assert (raw.validation.name, raw.validation.data["text"][:]) == ("validation", ["v"])
    assert load(tmp_path, validation_split="test").validation.data["text"][:] == ["t"]
    assert len(load(tmp_path, validation=0.5).train.rows) == 3, "an explicit share holds out nevertheless"


def test_a_split_in_several_files(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", {"text": ["a", "b"], "label": [0, 1]})
    write(tmp_path / "train-00001-of-00002.parquet", {"text": ["c"], "label": [1]})
    write(tmp_path / "dev.parquet", {"text": ["v"], "label": [1]})
    raw = load(tmp_path)
    assert (raw.train.data["text"][:], raw.train.labels.tolist()) == (["a", "b", "c"], [0, 1, 1])
    assert raw.validation.name == "dev"


def test_validation_rows_in_a_file_apart(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", {"text": ["x", "y"], "label": ["no", "yes"]})
    apart = write(tmp_path / "b.jsonl", {"text": ["v"], "label": ["yes"]})
    raw = load(train, validation_path=str(apart))
    assert (raw.validation.data["text"][:], raw.validation.labels.tolist()) == (["v"], [1])
    assert raw.label_names == ("no", "yes")
    assert len(raw.train.rows) == 2


@given(count=st.integers(2, 200), share=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_held_out_rows_and_training_rows_are_all_rows(count: int, share: float, seed: int) -> None:
    task = resolved("a.csv", validation=share)
    if max(1, round(share * count)) >= count:
        with pytest.raises(InputError, match="leaves none for training"):
            choose_rows(task, count, True, seed)
        return
    train, held = choose_rows(task, count, True, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert len(held) == max(1, round(share * count))
    assert list(train) == sorted(train)


def test_max_rows_takes_the_first_of_the_seeded_order_and_leaves_validation_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", numbered(40))
    few, more, whole = (load(file, max_rows=count) for count in (5, 12, 1000))
    assert (len(few.train.rows), len(more.train.rows), len(whole.train.rows)) == (5, 12, 36)
    assert set(few.train.rows) < set(more.train.rows) < set(whole.train.rows)
    assert few.validation.rows.tolist() == whole.validation.rows.tolist()
    assert few.train.data["text"][:] == [f"text {row}" for row in few.train.rows]
    assert few.train.labels.tolist() == [row % 2 for row in few.train.rows]
    assert few.train.rows.tolist() != list(range(5))


def test_what_is_held_out_depends_on_seed_and_task(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", numbered(60))
    first = load(file).validation.rows.tolist()
    assert load(file).validation.rows.tolist() == first
    assert load(file, seed=1).validation.rows.tolist() != first
    assert load_rows(resolved(file, name="other"), 0).validation.rows.tolist() != first


def test_class_names_come_from_all_training_rows_not_from_those_used(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", {"text": ["x"] * 26, "label": [chr(97 + row) for row in range(26)]})
    raw = load(file, max_rows=2)
    assert (raw.outputs, len(raw.train.rows)) == (26, 2)


def test_hub_features_in_a_parquet_file_are_kept(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    Dataset.from_dict({"text": ["x", "y", "w"], "label": [1, 0, 1]}, features=features).to_parquet(
        tmp_path / "r.parquet"
    )
    raw = load(tmp_path / "r.parquet")
    assert raw.label_names == ("z", "a")


def picture(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def test_an_image_folder_of_classes(tmp_path: Path) -> None:
    for name, colour in (("dog", (1, 2, 3)), ("cat", (4, 5, 6))):
        for number in range(3):
            picture(tmp_path / name / f"{number}.png", colour)
    raw = load(tmp_path, kind="image", columns=None, label=None, validation=0.3)
    assert (raw.label_names, raw.outputs) == (("cat", "dog"), 2)
    assert (len(raw.train.rows), len(raw.validation.rows)) == (4, 2)
    folders = [Path(value["path"]).parent.name for value in raw.train.data["image"]]
    assert [("cat", "dog")[label] for label in raw.train.labels] == folders


def test_an_image_folder_of_splits(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "a.png", (1, 1, 1))
    picture(tmp_path / "train" / "dog" / "a.jpg", (1, 1, 1))
    picture(tmp_path / "test" / "dog" / "a.png", (1, 1, 1))
    picture(tmp_path / "val" / "dog" / "a.png", (1, 1, 1))
    raw = load(tmp_path, kind="image", columns=None, label=None)
    assert (raw.train.labels.tolist(), raw.validation.name) == ([0, 1], "val")
    assert raw.validation.labels.tolist() == [1], "dog is class 1 although the folder val has no cat"
    apart = load(tmp_path / "train", kind="image", columns=None, label=None, validation_path=str(tmp_path / "test"))
    assert apart.validation.labels.tolist() == [1]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(name: str, subset: str | None) -> DatasetDict:
        asked.append((name, subset))
        split = Dataset.from_dict(numbered(4))
        return DatasetDict({"train": split, "validation": split.select([1]), "test": split})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = resolve_task(
        "t", TaskConfig(hub="who/what", subset="part", kind="text", columns=["text"], label="label"), None
    )
    raw = load_rows(task, 0)
    assert asked == [("who/what", "part")]
    assert (len(raw.train.rows), raw.validation.labels.tolist()) == (4, [1])


def test_a_hub_that_cannot_be_reached() -> None:
    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(InputError) as error:
        load_rows(resolve_task("sst2", TaskConfig(preset="sst2"), None), 0)
    message = str(error.value)
    assert message.startswith("tasks.sst2.hub: 'nyu-mll/glue/sst2' could not be loaded (")
    assert "data_root=" in message
    assert "tasks.sst2.path=" in message
    assert "\n" not in message


def test_built_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(8 * 64, dtype=np.uint8).reshape(8, 8, 8)
    module = SimpleNamespace(task_rows=lambda name: (images, np.arange(8) % 2 if name == "digits-parity" else None))
    monkeypatch.setitem(sys.modules, "fltac.data.digits", module)  # type: ignore[arg-type]
    raw = load_rows(resolve_task("t", TaskConfig(preset="digits-parity"), None), 0)
    assert (len(raw.train.rows), len(raw.validation.rows), raw.outputs) == (6, 2, 2)
    assert raw.train.labels.tolist() == (raw.train.rows % 2).tolist()


def test_wrong_paths(tmp_path: Path) -> None:
    assert "tasks.t.path: " in refused(tmp_path / "none")
    assert "no such file or folder" in refused(tmp_path / "none")
    (tmp_path / "a.xlsx").write_text("x")
    assert "ends in '.xlsx'; allowed are .parquet, .csv, .tsv, .jsonl, .json" in refused(tmp_path / "a.xlsx")
    (tmp_path / "empty").mkdir()
    assert "holds neither <split>.parquet" in refused(tmp_path / "empty")
    (tmp_path / "folders" / "a").mkdir(parents=True)
    assert "holds no images in folders named after their classes" in refused(tmp_path / "folders")
    write(tmp_path / "mixed" / "train-0.csv")
    write(tmp_path / "mixed" / "train-1.jsonl")
    assert "holds one split as .csv and .jsonl; keep one kind" in refused(tmp_path / "mixed")
    write(tmp_path / "uneven" / "train-0.csv", {"text": ["a"], "label": [0]})
    write(tmp_path / "uneven" / "train-1.csv", {"text": ["a"], "target": [0]})
    assert "have different columns" in refused(tmp_path / "uneven")


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "json"])
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, ending: str) -> None:
    other = write(tmp_path / ("other.csv" if ending == "parquet" else "other.parquet"))
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(other.read_bytes())
    message = refused(file)
    assert message.startswith(f"tasks.t.path: {str(file)!r} is not a readable {ending} file: ")
    file.write_bytes(b"")
    assert refused(file) == f"tasks.t.path: {str(file)!r} is empty"


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    assert "is not a readable parquet file" in refused(file)


def test_missing_splits(tmp_path: Path) -> None:
    write(tmp_path / "training.csv")
    write(tmp_path / "dev.csv")
    assert refused(tmp_path).startswith("tasks.t.train_split: ")
    assert "has no split 'train'; it has dev, training" in refused(tmp_path)
    message = refused(tmp_path, train_split="training", validation_split="validation")
    assert message.startswith("tasks.t.validation_split: ")
    assert "has no split 'validation'; it has dev, training" in message
    assert "is the training split as well" in refused(tmp_path, train_split="dev", validation_split="dev")
    both = tmp_path / "both"
    write(both / "dev.csv")
    message = refused(tmp_path, train_split="dev", validation_path=str(both))
    assert message.startswith("tasks.t.validation_path: ")
    assert "but no validation" in message


def test_empty_splits(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert "the split 'train' of" in refused(tmp_path / "rows.csv")
    assert "has no rows" in refused(tmp_path / "rows.csv")
    file = write(tmp_path / "one.csv", {"text": ["a"], "label": [0]})
    assert "holding out 0.1 of 1 training rows leaves none" in refused(file, labels=["a", "b"])


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}),
        tmp_path / "r.parquet",
    )
    assert "has no rows" in refused(tmp_path / "r.parquet")


def test_missing_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv")
    message = refused(file, columns=["text", "other"])
    assert message.startswith("tasks.t.columns: the train split of ")
    assert "has no column 'other'; it has text, label" in message
    message = refused(file, label="target")
    assert message.startswith("tasks.t.label: the train split of ")
    assert "has no column 'target'; it has text, label" in message


def test_columns_without_text(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", {"text": ["a", None, "b"], "n": [1, 2, 3], "label": [0, 1, 0]})
    assert refused(file) == "tasks.t.columns: train row 1 has no text in column 'text'"
    assert refused(file, columns=["n"]) == "tasks.t.columns: column 'n' of the train split holds int64, not text"
    (tmp_path / "rows.csv").write_text("text,label\na,1\n,0\n")
    assert refused(tmp_path / "rows.csv") == "tasks.t.columns: train row 1 has no text in column 'text'"


def test_wrong_labels_name_the_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "validation.csv", {"text": ["a", "b"], "label": [0, 5]})
    assert refused(tmp_path) == "tasks.t.label: validation row 1 has label 5; allowed are 0 to 1"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "validation", "names"),
    [
        ("sst2", 67349, 872, ("negative", "positive")),
        ("mrpc", 3668, 408, ("not_equivalent", "equivalent")),
        ("rte", 2490, 277, ("entailment", "not_entailment")),
        ("qnli", 9833, 5463, ("entailment", "not_entailment")),
        ("qqp", 23496, 7600, ("not_duplicate", "duplicate")),
    ],
)
def test_glue(data_root: Path, name: str, train: int, validation: int, names: tuple[str, str]) -> None:
    raw = load_rows(resolve_task(name, TaskConfig(preset=name), str(data_root / "data")), 0)
    assert (len(raw.train.rows), len(raw.validation.rows), raw.label_names) == (train, validation, names)
    file = data_root / "data" / "glue" / name / "validation.parquet"
    expected = pq.read_table(file)
    assert raw.validation.labels.tolist() == expected.column("label").to_pylist()
    for column in raw.task.columns:
        assert raw.validation.data[column][:] == expected.column(column).to_pylist()
    with_datasets = load_dataset("parquet", data_files=str(file), split="train")
    assert with_datasets.features["label"].names == list(names)


def test_some_validation_rows_of_a_seeded_order(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", numbered(40))
    write(tmp_path / "validation.csv", numbered(30))
    every = load(tmp_path)
    few, fewer = (load(tmp_path, max_validation_rows=count).validation for count in (12, 5))
    assert (len(every.validation.rows), len(few.rows), len(fewer.rows)) == (30, 12, 5)
    assert set(fewer.rows) < set(few.rows)
    assert few.data["text"][:] == [f"text {row}" for row in few.rows]
    assert few.labels.tolist() == [row % 2 for row in few.rows]
    assert few.rows.tolist() != load(tmp_path, seed=1, max_validation_rows=12).validation.rows.tolist()
    held = load(tmp_path / "train.csv", validation=0.5, max_validation_rows=3)
    assert (len(held.train.rows), len(held.validation.rows)) == (20, 3)
    assert not set(held.train.rows) & set(held.validation.rows)
