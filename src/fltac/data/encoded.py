"""Tasks ready for training: every row encoded once, cached by a fingerprint, memory-mapped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fltac.config import BackboneConfig, Config
from fltac.data.image import image_encoder
from fltac.data.instruct import instruct_encoder
from fltac.data.labels import LabelArray
from fltac.data.loading import RawSplit, load_rows
from fltac.data.metrics import score
from fltac.data.store import Stored, open_or_encode
from fltac.data.tasks import Kind, ResolvedTask, resolve_task
from fltac.data.text import text_encoder
from fltac.errors import InputError

FORMAT_VERSION = 1
"""To be raised when the encoded rows change for the same input."""


class Reader(Protocol):
    """Makes batches of a split's encoded rows."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row; 1 for an image."""
        ...

    def batch(self, rows: NDArray[np.int64], pad_to: int | None) -> dict[str, NDArray[Any]]:
        """The backbone's inputs for some rows."""
        ...


class Encoder(Protocol):
    """Turns a kind's rows into arrays for one backbone."""

    @property
    def fingerprint(self) -> str:
        """Of everything but the rows that the encoded rows depend on."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens that a row is cut after; None for images."""
        ...

    def content(self, split: RawSplit) -> Iterator[bytes]:
        """What a row's fingerprint is taken of, row by row."""
        ...

    def encode(self, split: RawSplit) -> Iterator[pa.RecordBatch]:
        """Record batches with a column ``label``, and ``truncated`` in their metadata.

        Where rows are left out, a column ``kept`` says which are not, and ``counts`` in the metadata why.
        """
        ...

    def reader(self, stored: Stored) -> Reader:
        """Reads what ``encode`` made."""
        ...


ENCODERS: dict[Kind, Callable[[BackboneConfig, str, ResolvedTask], Encoder]] = {
    "text": text_encoder,
    "image": image_encoder,
    "causal-lm": instruct_encoder,
}
"""The one place where a kind of task meets its code; another kind joins here."""


@dataclass(frozen=True)
class Split:
    """One of a task's splits, encoded, memory-mapped.

    Attributes:
        lengths: ``[n]`` tokens of each row; 1 for images.
        labels: ``[n]`` int64 class numbers, or float32 for a regression; zeros where rows have no class.
        truncated: Rows that were cut at the greatest length.
        fingerprint: SHA-256 of the rows, their labels and how they were encoded.
        reader: Makes batches.
        raw_rows: ``[n]`` which of the task's chosen rows they are; None where none was left out.
        counts: Rows that were cut or left out, by the reason; empty where ``truncated`` says all.
    """

    lengths: NDArray[np.int64]
    labels: LabelArray
    truncated: int
    fingerprint: str
    reader: Reader
    raw_rows: NDArray[np.int64] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: NDArray[np.int64], pad_to: int | None = None) -> dict[str, NDArray[Any]]:
        """The backbone's inputs for some rows, in their order.

        Args:
            rows: ``[b]`` row numbers, b >= 1.
            pad_to: Tokens to pad to; by default the longest row's.

        Returns:
            Text: ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``,
            int64 ``[b, length]``, padded on the right; for a causal-lm task also ``labels``. Images:
            ``pixel_values`` float32 ``[b, 3, height, width]``.

        Raises:
            ValueError: ``pad_to`` is less than the longest row.
        """
        return self.reader.batch(rows, pad_to)


@dataclass(frozen=True)
class EncodedTask:
    """A task ready for training.

    Attributes:
        name: As in the config.
        kind: What a row holds.
        outputs: Outputs of its head: the number of classes, or 1 for a regression; 0 where it has no head.
        metric: What it is scored by.
        train: Training rows, of all clients together.
        validation: Rows that it is scored on.
        label_names: Names of the classes where there are any.
        encoder: Fingerprint of the tokenizer, or of the image settings, that the rows were encoded with.
        max_length: Tokens that a row is cut after; None for images.
        mirror: Whether a mirrored image has the same label.
    """

    name: str
    kind: Kind
    outputs: int
    metric: str
    train: Split
    validation: Split
    label_names: tuple[str, ...] | None
    encoder: str
    max_length: int | None = None
    mirror: bool = True

    @property
    def head_key(self) -> str:
        """What its head is known by where nobody is told the tasks: the number of outputs; empty without a head."""
        return str(self.outputs) if self.outputs else ""


def load_tasks(config: Config, backbone_folder: str) -> dict[str, EncodedTask]:
    """Loads and encodes the tasks of a config, in its order.

    Args:
        config: Gives the tasks, ``data_root``, the longest text, and the seed for held-out rows.
        backbone_folder: Local folder or hub id of the pretrained model.

    Raises:
        InputError: a task, its data or the backbone's tokenizer or image settings are wrong.
    """
    resolved = [resolve_task(name, task, config.data_root) for name, task in config.tasks.items()]
    encoders: dict[Kind, Encoder] = {}
    out = {}
    for task in resolved:
        if task.kind != "image" and config.training.augment != "none":
            raise InputError(
                f"training.augment: got {config.training.augment!r}, but the task {task.name} is a {task.kind} task; "
                "allowed is none"
            )
        raw = load_rows(task, config.federation.seed)
        if task.kind not in encoders:
            encoders[task.kind] = ENCODERS[task.kind](config.backbone, backbone_folder, task)
        encoder = encoders[task.kind]
        out[task.name] = EncodedTask(
            name=task.name,
            kind=task.kind,
            outputs=raw.outputs,
            metric=task.metric,
            train=encode_split(raw.train, encoder),
            validation=encode_split(raw.validation, encoder),
            label_names=raw.label_names,
            encoder=encoder.fingerprint,
            max_length=encoder.max_length,
            mirror=task.mirror,
        )
    return out


def encoder_fingerprint(config: BackboneConfig, backbone_folder: str, kind: Kind) -> str:
    """``EncodedTask.encoder`` of any task of a kind, for those who have no task at hand.

    Raises:
        InputError: the backbone has no tokenizer or image settings.
    """
    columns = {"text": ("text",), "image": ("image",), "causal-lm": ("instruction", "response")}[kind]
    anybody = ResolvedTask(
        name="of a data owner",
        kind=kind,
        hub=None,
        subset=None,
        path=None,
        path_key="",
        builtin=None,
        train_split="train",
        validation_split=None,
        validation_path=None,
        validation=None,
        columns=columns,
        label="label",
        labels=None,
        metric="accuracy",
        max_rows=None,
    )
    return ENCODERS[kind](config, backbone_folder, anybody).fingerprint


def encode_split(split: RawSplit, encoder: Encoder) -> Split:
    """Encodes a split, or finds it encoded already."""
    name = fingerprint(split, encoder)
    stored = open_or_encode(name, len(split.rows), lambda: encoder.encode(split))
    reader = encoder.reader(stored)
    labels = np.concatenate([batch.column("label").to_numpy() for batch in stored.batches])
    kept = None
    if "kept" in stored.batches[0].schema.names:
        kept = np.flatnonzero(
            np.concatenate([batch.column("kept").to_numpy(zero_copy_only=False) for batch in stored.batches])
        )
        labels = labels[kept]
    counts = json.loads(stored.facts.get("counts", "{}"))
    return Split(reader.lengths, labels, int(stored.facts["truncated"]), name, reader, kept, counts)


def fingerprint(split: RawSplit, encoder: Encoder) -> str:
    """SHA-256 of a split's rows and labels and of how they are encoded; not of names or places of files."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {split.task.kind} {encoder.fingerprint}".encode())
    digest.update(f" {split.labels.dtype} {len(split.labels)} ".encode())
    digest.update(np.ascontiguousarray(split.labels).tobytes())
    for row in encoder.content(split):
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row)
    return digest.hexdigest()


def majority_score(task: EncodedTask) -> float | None:
    """The validation score of always answering the training rows' most frequent class, or their mean.

    None where rows have no classes.
    """
    if task.outputs == 0:
        return None
    if task.metric == "pearson":
        answer: NDArray[Any] = np.full(len(task.validation), np.mean(task.train.labels))
    else:
        counts = np.bincount(task.train.labels.astype(np.int64), minlength=task.outputs)
        answer = np.full(len(task.validation), int(counts.argmax()))
    return score(task.metric, answer, task.validation.labels)
