"""Instruction rows as token numbers for a causal language model: a prompt, then the response that the loss is on.

A response is never cut silently. A row that is too long first loses tokens of its instruction and context, never of
the template around them; where the response does not fit even so, the row is dropped or its response cut, as the task
says, and counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fltac.config import BackboneConfig
from fltac.data.loading import RawSplit
from fltac.data.prompts import Prompt, prompt_of
from fltac.data.store import Stored
from fltac.data.tasks import Prompting, ResolvedTask
from fltac.data.text import ROWS_AT_A_TIME, TokenRows, longest_row, open_tokenizer, tokenizer_state
from fltac.errors import InputError

IGNORED = -100
"""The label of a token that the loss is not on, as in transformers."""

Outcome = Literal["whole", "prompt_cut", "response_cut", "dropped_empty", "dropped_long"]
DROPPED = frozenset({"dropped_empty", "dropped_long"})


@dataclass(frozen=True)
class InstructRows:
    """Reads batches of the rows that were not dropped.

    Attributes:
        stored: All rows, dropped ones without tokens.
        kept: ``[n]`` int64 numbers of the others.
    """

    stored: TokenRows
    kept: NDArray[np.int64]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self.stored.lengths[self.kept]
        return lengths

    def batch(self, rows: NDArray[np.int64], pad_to: int | None) -> dict[str, NDArray[Any]]:
        """``input_ids``, ``attention_mask`` and ``labels``: the response's tokens, ``IGNORED`` elsewhere."""
        return self.stored.batch(self.kept[rows], pad_to)


@dataclass(frozen=True)
class _Parts:
    """The tokens of a row: the template's, the row's own text in it, the template's again, and the response's."""

    before: Sequence[int]
    body: Sequence[int]
    after: Sequence[int]
    response: Sequence[int]


@dataclass(frozen=True)
class InstructEncoder:
    """Numbers prompts and responses with a pretrained tokenizer.

    Attributes:
        tokenizer: A fast one, which says which letters a token stands for.
        max_length: Tokens of a row at most.
        end: The token that ends a response; None where the tokenizer has none.
        pad: What rows are padded with; it is masked, so any token will do.
        fingerprint: SHA-256 over the tokenizer and the settings that all tasks share.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    end: int | None
    pad: int
    fingerprint: str

    def content(self, split: RawSplit) -> Iterator[bytes]:
        """The rows' prompts and responses and how they are cut, for a fingerprint."""
        setting = split.task.prompting
        for prompts, responses in self._texts(split):
            for prompt, response in zip(prompts, responses, strict=True):
                row = [prompt.text, prompt.start, prompt.stop, response, setting.prompt_cut, setting.long_response]
                yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def encode(self, split: RawSplit) -> Iterator[pa.RecordBatch]:
        """One record batch: lists of int32 for tokens and labels, and which rows are kept."""
        tokens: list[list[int]] = []
        labels: list[list[int]] = []
        outcomes: list[Outcome] = []
        for prompts, responses in self._texts(split):
            texts = [prompt.text + response for prompt, response in zip(prompts, responses, strict=True)]
            for response, parts in zip(responses, self._parts(texts, prompts, split), strict=True):
                if response:
                    row, begin, outcome = self._row(parts, split.task)
                else:
                    row, begin, outcome = [], 0, "dropped_empty"
                tokens.append(row)
                labels.append([IGNORED] * begin + row[begin:])
                outcomes.append(outcome)
        counts = {name: count for name, count in sorted(Counter(outcomes).items()) if name != "whole"}
        kept = np.array([outcome not in DROPPED for outcome in outcomes])
        if not kept.any():
            raise InputError(
                f"tasks.{split.task.name}: no row of the {split.name} split is left of {len(outcomes)}: "
                f"{counts.get('dropped_empty', 0)} have no response, {counts.get('dropped_long', 0)} responses do not "
                f"fit into backbone.max_length={self.max_length}"
            )
        offsets = np.concatenate([np.zeros(1, np.int64), np.array([len(row) for row in tokens])]).cumsum()
        lists = [
            pa.LargeListArray.from_arrays(offsets, np.array([token for row in rows for token in row], dtype=np.int32))
            for rows in (tokens, labels)
        ]
        facts = {"truncated": str(counts.get("prompt_cut", 0) + counts.get("response_cut", 0))}
        facts["counts"] = json.dumps(counts)
        batch = pa.RecordBatch.from_arrays(
            [*lists, pa.array(kept), pa.array(split.labels)], names=["input_ids", "labels", "kept", "label"]
        )
        yield batch.replace_schema_metadata(facts)

    def reader(self, stored: Stored) -> InstructRows:
        """Reads batches from the mapped file without copying its tokens."""
        (batch,) = stored.batches
        columns = {name: batch.column(name).values.to_numpy() for name in ("input_ids", "labels")}
        offsets = batch.column("input_ids").offsets.to_numpy()
        kept = np.flatnonzero(batch.column("kept").to_numpy(zero_copy_only=False))
        return InstructRows(TokenRows(columns, offsets, {"input_ids": self.pad, "labels": IGNORED}), kept)

    def prompts(self, split: RawSplit, answer: int) -> list[tuple[list[int], int]]:
        """The prompts of all rows of a split, cut so that an answer of so many tokens fits behind each.

        Returns:
            For each row the tokens, and how many were cut.

        Raises:
            InputError: there is no such room.
        """
        out = []
        for prompts, _ in self._texts(split):
            for parts in self._parts([prompt.text for prompt in prompts], prompts, split):
                room = self.max_length - answer - len(parts.before) - len(parts.after)
                if room < 1:
                    raise InputError(
                        f"evaluation.generation.max_new_tokens: {answer} tokens leave no room for a prompt of the task "
                        f"{split.task.name} in a context of {self.max_length}"
                    )
                body = _cut(parts.body, len(parts.body) - room, split.task.prompting)
                out.append(([*parts.before, *body, *parts.after], len(parts.body) - len(body)))
        return out

    def _parts(self, texts: Sequence[str], prompts: Sequence[Prompt], split: RawSplit) -> Iterator[_Parts]:
        """The tokens of each text, which begins with its prompt."""
        found = self.tokenizer(
            list(texts),
            add_special_tokens=split.task.prompting.template != "chat",  # which writes them out
            return_offsets_mapping=True,
            padding=False,
            verbose=False,
        )
        for prompt, ids, places in zip(prompts, found["input_ids"], found["offset_mapping"], strict=True):
            # Special tokens stand for no letters; those behind the text are put there again where they belong.
            count = next(index for index in range(len(ids), 0, -1) if places[index - 1][1] > 0)
            begin = next((index for index in range(count) if places[index][1] > len(prompt.text)), count)
            first = next((index for index in range(begin) if places[index][1] > prompt.start), begin)
            last = next((index for index in range(first, begin) if places[index][0] >= prompt.stop), begin)
            yield _Parts(ids[:first], ids[first:last], ids[last:begin], ids[begin:count])

    def _row(self, parts: _Parts, task: ResolvedTask) -> tuple[list[int], int, Outcome]:
        """A row's tokens, where its response begins among them, and what had to be cut."""
        before, body, after = parts.before, parts.body, parts.after
        response = [*parts.response, *([] if self.end is None else [self.end])]
        room = self.max_length - len(before) - len(after)
        if room < 2:
            raise InputError(
                f"backbone.max_length: {self.max_length} tokens leave no room for text beside the "
                f"{len(before) + len(after)} of the prompt's template of the task {task.name}"
            )
        outcome: Outcome = "whole"
        if len(response) > room:
            if task.prompting.long_response == "drop":
                return [], 0, "dropped_long"
            outcome = "response_cut"
            # The end token goes with the rest: the response does not end there.
            response = response[: room - min(len(body), room // 2)]
        excess = len(body) + len(response) - room
        if excess > 0:
            body = _cut(body, excess, task.prompting)
            outcome = outcome if outcome == "response_cut" else "prompt_cut"
        row = [*before, *body, *after, *response]
        return row, len(row) - len(response), outcome

    def _texts(self, split: RawSplit) -> Iterator[tuple[list[Prompt], list[str]]]:
        """Prompts and responses, so many rows at a time."""
        for rows in raw_rows(split):
            prompts = [prompt_of(row, split.task, self.tokenizer) for row in rows]
            yield prompts, [row["response"] for row in rows]


def _cut(body: Sequence[int], excess: int, prompting: Prompting) -> Sequence[int]:
    """Takes so many tokens, if any, from the end that the task says."""
    if excess <= 0:
        return body
    return body[excess:] if prompting.prompt_cut == "left" else body[: max(0, len(body) - excess)]


def raw_rows(split: RawSplit) -> Iterator[list[Mapping[str, str]]]:
    """The rows' texts as they stand in the data, without white space around: instruction, context, response."""
    names = split.task.columns
    parts = ("instruction", "response") if len(names) == 2 else ("instruction", "context", "response")
    for table in split.data.with_format("arrow").iter(ROWS_AT_A_TIME):
        columns = [[(text or "").strip() for text in table.column(name).to_pylist()] for name in names]
        yield [{"context": "", **dict(zip(parts, row, strict=True))} for row in zip(*columns, strict=True)]


def instruct_encoder(config: BackboneConfig, folder: str, task: ResolvedTask) -> InstructEncoder:
    """Loads the backbone's tokenizer.

    Args:
        config: The ``backbone`` section.
        folder: Local folder or hub id of the pretrained model.
        task: The task that needs it, for errors.

    Raises:
        InputError: there is no tokenizer, or one that cannot say which letters a token stands for.
    """
    tokenizer, architecture = open_tokenizer(config, folder, task)
    if not tokenizer.is_fast:
        raise InputError(
            f"backbone.name: the tokenizer of {config.name!r} ({type(tokenizer).__name__}) does not say which letters "
            f"a token stands for, which the causal-lm task {task.name} needs; allowed are fast tokenizers"
        )
    end = tokenizer.eos_token_id
    pad = next((int(token) for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    max_length = longest_row(config, tokenizer, architecture, pad)
    settings = json.dumps([tokenizer_state(tokenizer), max_length, end], sort_keys=True)
    fingerprint = hashlib.sha256(b"causal-lm " + settings.encode()).hexdigest()
    return InstructEncoder(tokenizer, max_length, end, pad, fingerprint)
