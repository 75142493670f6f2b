"""Text rows as token numbers: encoded once without padding, padded on the right batch by batch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fltac.config import BackboneConfig
from fltac.data.loading import RawSplit
from fltac.data.store import Stored
from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError

ROWS_AT_A_TIME = 1000
POSITIONS_AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Architectures that count positions from the padding token's number on, so that fewer tokens fit."""


@dataclass(frozen=True)
class TokenRows:
    """Reads batches from one split's token numbers.

    Attributes:
        columns: Column name (``input_ids`` and perhaps ``token_type_ids``) to ``[tokens]`` int32, all rows
            one after the other.
        offsets: ``[n + 1]`` where each row begins.
        padding: What each column is padded with.
    """

    columns: dict[str, NDArray[np.int32]]
    offsets: NDArray[np.int64]
    padding: dict[str, int]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def batch(self, rows: NDArray[np.int64], pad_to: int | None) -> dict[str, NDArray[Any]]:
        """int64 ``[b, length]`` for each column and ``attention_mask``."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        width = longest if pad_to is None else pad_to
        if width < longest:
            raise ValueError(f"pad_to is {width}, but a row has {longest} tokens")
        mask = np.arange(width) < lengths[:, None]
        places = (self.offsets[rows][:, None] + np.arange(width))[mask]
        out: dict[str, NDArray[Any]] = {}
        for name, values in self.columns.items():
            padded = np.full(mask.shape, self.padding[name], dtype=np.int64)
            padded[mask] = values[places]
            out[name] = padded
        out["attention_mask"] = mask.astype(np.int64)
        return out


@dataclass(frozen=True)
class TextEncoder:
    """Cuts and numbers texts with a pretrained tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        max_length: Tokens that a row is cut after, special ones included.
        padding: What each column is padded with.
        fingerprint: SHA-256 over the tokenizer and the settings.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: dict[str, int]
    fingerprint: str

    def content(self, split: RawSplit) -> Iterator[bytes]:
        """The rows' texts, for a fingerprint."""
        for texts in _texts(split):
            for row in zip(*texts, strict=True):
                yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def encode(self, split: RawSplit) -> Iterator[pa.RecordBatch]:
        """One record batch: a list of int32 for each column, and the labels."""
        needed = self.tokenizer.num_special_tokens_to_add(pair=len(split.task.columns) == 2)
        if self.max_length <= needed:
            raise InputError(
                f"backbone.max_length: {self.max_length} tokens leave no room for text beside the {needed} "
                f"special tokens of the task {split.task.name}; allowed are {needed + 1} and more"
            )
        lengths: list[NDArray[np.int64]] = []
        parts: dict[str, list[NDArray[np.int32]]] = {}
        truncated = 0
        for texts in _texts(split):
            tokens = self._tokens(texts, cut=True)
            lengths.append(np.array([len(row) for row in tokens["input_ids"]], dtype=np.int64))
            for name in self.padding.keys() & tokens.keys():
                flat = np.fromiter(chain.from_iterable(tokens[name]), np.int32, lengths[-1].sum())
                parts.setdefault(name, []).append(flat)
            truncated += self._count_truncated(texts, lengths[-1])
        offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        names = sorted(parts)
        arrays = [pa.LargeListArray.from_arrays(offsets, np.concatenate(parts[name])) for name in names]
        facts = {
            "truncated": str(truncated),
            "padding": json.dumps({name: self.padding[name] for name in names}),
        }
        batch = pa.RecordBatch.from_arrays([*arrays, pa.array(split.labels)], names=[*names, "label"])
        yield batch.replace_schema_metadata(facts)

    def reader(self, stored: Stored) -> TokenRows:
        """Reads batches from the mapped file without copying it."""
        (batch,) = stored.batches
        padding = {name: int(number) for name, number in json.loads(stored.facts["padding"]).items()}
        columns = {name: batch.column(name).values.to_numpy() for name in padding}
        return TokenRows(columns, batch.column("input_ids").offsets.to_numpy(), padding)

    def _tokens(self, texts: Sequence[Sequence[str]], cut: bool) -> dict[str, list[list[int]]]:
        options: dict[str, Any] = {"truncation": "longest_first", "max_length": self.max_length} if cut else {}
        tokens = self.tokenizer(
            *[list(column) for column in texts],
            padding=False,
            return_attention_mask=False,
            verbose=False,
            **options,
        )
        return dict(tokens)

    def _count_truncated(self, texts: Sequence[Sequence[str]], lengths: NDArray[np.int64]) -> int:
        """A row of just ``max_length`` tokens may be whole: only those are tokenized again, uncut."""
        full = np.flatnonzero(lengths >= self.max_length).tolist()
        if not full:
            return 0
        again = self._tokens([[column[row] for row in full] for column in texts], cut=False)
        return sum(len(row) > self.max_length for row in again["input_ids"])


def text_encoder(config: BackboneConfig, folder: str, task: ResolvedTask) -> TextEncoder:
    """Loads the backbone's tokenizer.

    Args:
        config: The ``backbone`` section.
        folder: Local folder or hub id of the pretrained model.
        task: The task that needs it, for errors.

    Raises:
        InputError: there is no tokenizer, or it has neither a padding token nor an end token.
    """
    tokenizer, architecture = open_tokenizer(config, folder, task)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise InputError(
            f"backbone.name: the tokenizer of {config.name!r} has neither a padding token nor an end token, "
            f"needed by the text task {task.name}"
        )
    padding = {"input_ids": int(pad), "token_type_ids": int(tokenizer.pad_token_type_id)}
    max_length = longest_row(config, tokenizer, architecture, int(pad))
    settings = json.dumps([tokenizer_state(tokenizer), max_length, padding], sort_keys=True)
    return TextEncoder(tokenizer, max_length, padding, hashlib.sha256(settings.encode()).hexdigest())


def open_tokenizer(config: BackboneConfig, folder: str, task: ResolvedTask) -> tuple[PreTrainedTokenizerBase, Any]:
    """The backbone's tokenizer and its architecture's configuration.

    Raises:
        InputError: there is no tokenizer.
    """
    missing = f"backbone.name: {config.name!r} has no tokenizer, needed by the {task.kind} task {task.name}"
    options = {"revision": config.revision} if config.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a missing or damaged tokenizer surfaces in many ways
        raise InputError(
            f"{missing} ({str(error).strip().split(chr(10))[0][:160]}); allowed are a local Hugging Face folder with a "
            "tokenizer, package:<import name>/<folder>, or a hub id that can be reached"
        ) from error
    # Where the files are missing, transformers makes a tokenizer that knows the special tokens only.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(missing)
    return tokenizer, architecture


def longest_row(config: BackboneConfig, tokenizer: PreTrainedTokenizerBase, architecture: Any, pad: int) -> int:
    """Tokens of a row at most: as configured, but no more than the tokenizer allows and the backbone has places for."""
    return min(config.max_length, int(tokenizer.model_max_length), _positions(architecture, pad))


def _positions(architecture: Any, pad: int) -> int:
    """Tokens that the backbone has positions for."""
    positions = getattr(architecture, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return 2**31 - 1
    return positions - (pad + 1 if architecture.model_type in POSITIONS_AFTER_PADDING else 0)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides on the tokens, without the folder that the tokenizer was read from."""
    if not tokenizer.is_fast:
        return f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by each call.
    state.pop("truncation", None)
    state.pop("padding", None)
    sides = [tokenizer.truncation_side, sorted(tokenizer.model_input_names)]
    return json.dumps([state, sides], sort_keys=True)


def _texts(split: RawSplit) -> Iterator[list[list[str]]]:
    """For so many rows at a time, one list of texts for each column."""
    for table in split.data.with_format("arrow").iter(ROWS_AT_A_TIME):
        yield [table.column(name).to_pylist() for name in split.task.columns]
