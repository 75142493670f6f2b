"""Instruction rows with a tokenizer in which every letter is a token, so that all can be counted by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fltac.config import BackboneConfig, load_config
from fltac.data.encoded import EncodedTask, encoder_fingerprint, load_tasks
from fltac.data.instruct import IGNORED
from fltac.data.prompts import INTRODUCTION, INTRODUCTION_WITH_INPUT, alpaca
from fltac.errors import InputError
from language import BEGIN, END, make_language_model, tokenizer, write_instructions

CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
FRAME = len(alpaca("", "").text)
"""Letters of the template around an instruction without context."""


def write(file: Path, *rows: tuple[str, str | None, str | None]) -> Path:
    lines = [json.dumps({"q": question, "c": context, "a": answer}) for question, context, answer in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def load(folder: Path, file: Path, max_length: int = 250, **task: Any) -> EncodedTask:
    settings = {"kind": "causal-lm", "path": str(file), "validation_path": str(file), "columns": ["q", "c", "a"]}
    backbone = {"name": str(folder), "max_length": max_length}
    return load_tasks(load_config({"backbone": backbone, "tasks": {"own": settings | task}}), str(folder))["own"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("model"))


def text_of(task: EncodedTask, row: int, labelled: bool = False) -> str:
    """A row's text; of its labelled tokens alone, or of all real ones."""
    batch = task.train.batch(np.array([row]))
    values = batch["labels"][0] if labelled else batch["input_ids"][0][batch["attention_mask"][0] == 1]
    return str(tokenizer().decode([token for token in values.tolist() if token >= 0]))


def test_the_loss_is_on_the_response_and_its_end_alone(model: Path, tmp_path: Path) -> None:
    task = load(model, write(tmp_path / "rows.jsonl", ("Why?", "", "So."), ("Why so?", "It is.", " Because. ")))
    assert (task.outputs, task.metric, task.head_key) == (0, "loss", "")
    assert text_of(task, 0) == f"{INTRODUCTION}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.</s>"
    with_input = (
        f"{INTRODUCTION_WITH_INPUT}\n\n### Instruction:\nWhy so?\n\n### Input:\nIt is.\n\n### Response:\nBecause."
    )
    assert text_of(task, 1) == with_input + "</s>"
    assert [text_of(task, row, labelled=True) for row in (0, 1)] == ["So.</s>", "Because.</s>"]
    assert task.train.lengths.tolist() == [FRAME + len("Why?So.") + 1, len(with_input) + 1]
    assert task.train.counts == {}


def test_padding_is_masked_and_has_no_label_though_it_is_the_end_token(model: Path, tmp_path: Path) -> None:
    """The tokenizer has no padding token."""
    task = load(model, write(tmp_path / "rows.jsonl", ("a", "", "b"), ("a", "", "bcd")))
    batch = task.train.batch(np.arange(2))
    assert batch["input_ids"][0, -2:].tolist() == [END, END]
    assert batch["attention_mask"][0, -2:].tolist() == [0, 0]
    assert batch["labels"][0, -3:].tolist() == [END, IGNORED, IGNORED]
    assert batch["labels"][1, -1] == END


@pytest.mark.parametrize(("side", "left"), [("right", "0123"), ("left", "6789")])
def test_a_long_prompt_loses_its_own_text_on_one_side(model: Path, tmp_path: Path, side: str, left: str) -> None:
    """Room for 4 of the instruction's 10 letters; the template and the response stay whole."""
    file = write(tmp_path / "rows.jsonl", ("0123456789", None, "yes"))
    task = load(model, file, FRAME + 4 + 4, prompt_cut=side)
    assert text_of(task, 0) == alpaca(left, "").text + "yes</s>"
    assert task.train.counts == {"prompt_cut": 1}
    assert task.train.truncated == 1


def test_rows_whose_response_does_not_fit_are_dropped_and_counted(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ("a", "", "x" * 8), ("b", "", ""), ("c", "", "x" * 7), ("d", "", None))
    task = load(model, file, FRAME + 8)
    assert text_of(task, 0) == alpaca("", "").text + "x" * 7 + "</s>"
    assert len(task.train) == len(task.train.labels) == 1
    assert task.train.raw_rows is not None
    assert task.train.raw_rows.tolist() == [2]
    assert task.train.counts == {"dropped_empty": 2, "dropped_long": 1, "prompt_cut": 1}


def test_or_their_response_is_cut_and_does_not_end(model: Path, tmp_path: Path) -> None:
    """Of the 8 places beside the template at most half go to the instruction."""
    file = write(tmp_path / "rows.jsonl", ("0123456789", "", "abcdefgh"), ("0", "", "abcdefgh"))
    task = load(model, file, FRAME + 8, long_response="cut")
    assert [text_of(task, row, labelled=True) for row in (0, 1)] == ["abcd", "abcdefg"]
    assert text_of(task, 0) == alpaca("0123", "").text + "abcd"
    assert task.train.counts == {"response_cut": 2}


def test_the_tokenizers_own_chat_template(tmp_path: Path) -> None:
    folder = make_language_model(tmp_path / "chat", chat_template=CHAT)
    file = write(tmp_path / "rows.jsonl", ("Why?", "It is.", "So."))
    task = load(folder, file, template="chat")
    assert text_of(task, 0) == "<s>user: Why?\n\nIt is.\nassistant: So.</s>"
    assert task.train.batch(np.array([0]))["input_ids"][0, 0] == BEGIN, "written by the template, once"
    assert text_of(task, 0, labelled=True) == "So.</s>"


def test_a_filter_takes_one_kind_of_rows_and_its_rows_are_the_files(model: Path, tmp_path: Path) -> None:
    file = write_instructions(tmp_path / "rows.jsonl")
    task = load(model, file, filter={"kind": "number"})
    assert len(task.train) == 20
    assert "Which number?" in text_of(task, 3)
    with pytest.raises(InputError, match=r"tasks.own.filter: no row of the train split .* has 'verb' in column 'kind'"):
        load(model, file, filter={"kind": "verb"})
    with pytest.raises(InputError, match=r"tasks.own.filter: .* has no column 'sort'; it has q, c, a, kind"):
        load(model, file, filter={"sort": "number"})


def test_settings_change_the_fingerprint_and_the_tokenizers_stays(model: Path, tmp_path: Path) -> None:
    """Encoded rows are found again by what they hold, nodes are compared by their tokenizer."""
    file = write(tmp_path / "rows.jsonl", ("Why?", "", "So."))
    one, other = load(model, file), load(model, file, prompt_cut="left")
    assert one.train.fingerprint != other.train.fingerprint
    assert one.encoder == other.encoder
    assert one.encoder == encoder_fingerprint(BackboneConfig(name=str(model), max_length=250), str(model), "causal-lm")


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    """Nothing ends a response then, and any token will do where it is masked."""
    folder = make_language_model(tmp_path / "endless")
    tokenizer(end=False).save_pretrained(folder)
    task = load(folder, write(tmp_path / "rows.jsonl", ("Why?", "", "So."), ("Why?", "", "So it is.")))
    batch = task.train.batch(np.arange(2))
    assert text_of(task, 0, labelled=True) == "So."
    assert batch["attention_mask"][0].sum() == FRAME + len("Why?So.")
    assert (batch["labels"][0, FRAME + 7 :] == IGNORED).all()


BAD = [
    ({"template": "chat"}, r"tasks.own.template: 'chat', but the backbone's tokenizer has no chat template; .* alpaca"),
    ({"columns": ["q"]}, r"tasks.own.columns: got \['q'\]; a causal-lm task has different columns for"),
    ({"columns": ["q", "c", "z"]}, r"tasks.own.columns: the train split of .* has no column 'z'"),
    ({"label": "a"}, r"tasks.own.label: got 'a'; a causal-lm task has no classes"),
    ({"metric": "accuracy"}, r"tasks.own.metric: got 'accuracy'; allowed for a causal-lm task is loss"),
    (
        {"kind": "text", "columns": ["q"], "label": "a", "template": "chat"},
        r"tasks.own.template: got 'chat'; .*causal-lm tasks only",
    ),
    ({"kind": "text", "label": "a", "metric": "loss"}, r"tasks.own.metric: got 'loss'; allowed for a text task is"),
    ({"max_length": FRAME}, rf"backbone.max_length: {FRAME} tokens leave no room .* beside the {FRAME} .* own"),
    ({"max_length": FRAME + 3}, r"tasks.own: no row of the train split is left of 1: 0 have no .*, 1 responses do not"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_what_is_wrong_is_said_in_one_line(model: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "rows.jsonl", ("Why?", "", "So."))
    with pytest.raises(InputError, match=message) as caught:
        load(model, file, **settings)
    assert "\n" not in str(caught.value)


def test_dolly_by_category(data_root: Path) -> None:
    """The counts of the data set; the same tokens as a plain call of the tokenizer gives."""
    backbone = {"name": str(data_root / "models" / "stories260K"), "max_length": 512}
    config = load_config(
        {"backbone": backbone, "tasks": ["dolly-creative-writing"], "data_root": str(data_root / "data")}
    )
    task = load_tasks(config, backbone["name"])["dolly-creative-writing"]
    sizes = [len(split) + split.counts.get("dropped_long", 0) for split in (task.train, task.validation)]
    assert sizes == [709 - 71, 71]
    assert task.train.lengths.max() <= 512
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(backbone["name"])
    row = int(task.train.lengths.argmin())
    batch = task.train.batch(np.array([row]))
    tokens = batch["input_ids"][0].tolist()
    assert plain(plain.decode(tokens[:-1], skip_special_tokens=True).strip())["input_ids"] == tokens[:-1]
    assert tokens[-1] == plain.eos_token_id
