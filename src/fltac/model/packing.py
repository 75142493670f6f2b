"""Rows of different lengths one after the other in a single sequence, so that nothing is padded.

Everything in a transformer but attention works token by token. Attention works on buckets: rows of nearly the same
length, gathered and padded to a common one (``model.attention``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]

SHORTEST, STRIDE = 32, 16
"""Buckets are so many tokens long, and so many longer each: vector instructions take 16 or 32 numbers at a time."""


@dataclass(frozen=True)
class Bucket:
    """Rows that attention handles together.

    Attributes:
        rows: Number of rows.
        length: That they are padded to.
        gather: ``[rows * length]`` token numbers; past a row's end, its last token again.
        tokens: ``[real]`` numbers of the real tokens, in the order of ``places``.
        places: ``[real]`` where they stand in ``gather``; None where all places are real.
        past: float32 ``[rows, 1, length]``, minus infinity past a row's end, else 0; None where all places are real.
    """

    rows: int
    length: int
    gather: Tensor
    tokens: Tensor
    places: Tensor | None
    past: Tensor | None

    @cached_property
    def _biases(self) -> dict[tuple[int, torch.dtype], Tensor]:
        return {}

    def bias(self, heads: int, dtype: torch.dtype) -> Tensor | None:
        """``past`` for each head, the heads first: ``[heads * rows, 1, length]``."""
        if self.past is None:
            return None
        if (heads, dtype) not in self._biases:
            self._biases[heads, dtype] = self.past.to(dtype).repeat(heads, 1, 1)
        return self._biases[heads, dtype]


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed sequence lie.

    Attributes:
        lengths: ``[rows]`` tokens of each row, in order.
        lane_rows: Rows of each lane, in order; together all rows.
        device: Where the index tensors are made.
    """

    lengths: Numbers
    lane_rows: tuple[int, ...]
    device: torch.device

    @cached_property
    def starts(self) -> Numbers:
        """``[rows]`` number of each row's first token."""
        ends: Numbers = np.cumsum(self.lengths)
        return ends - self.lengths

    @cached_property
    def lane_lengths(self) -> list[Numbers]:
        """For each lane its rows' lengths."""
        return np.split(self.lengths, np.cumsum(self.lane_rows)[:-1])

    @cached_property
    def lane_tokens(self) -> list[int]:
        """Tokens of each lane."""
        return [int(lengths.sum()) for lengths in self.lane_lengths]

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[tokens]``: each token's place in its row, from 0."""
        return self._tensor(np.arange(self.lengths.sum()) - np.repeat(self.starts, self.lengths))

    @cached_property
    def row_of_token(self) -> Tensor:
        """int64 ``[tokens]``."""
        return self._tensor(np.repeat(np.arange(len(self.lengths)), self.lengths))

    @cached_property
    def first_tokens(self) -> Tensor:
        """int64 ``[rows]``: what a head reads with ``cls`` pooling."""
        return self._tensor(self.starts)

    @cached_property
    def counts(self) -> Tensor:
        """float32 ``[rows, 1]``: the lengths."""
        return self._tensor(self.lengths).float().unsqueeze(1)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Rows of nearly the same length together, the shortest first."""
        sizes = np.maximum(SHORTEST, -(-self.lengths // STRIDE) * STRIDE)
        return [self._bucket(np.flatnonzero(sizes == size), int(size)) for size in np.unique(sizes)]

    def _bucket(self, rows: Numbers, length: int) -> Bucket:
        own = self.lengths[rows][:, None]
        place = np.arange(length)[None, :]
        gather = (self.starts[rows][:, None] + np.minimum(place, own - 1)).ravel()
        real = place < own
        if real.all():
            tokens = self._tensor(gather)
            return Bucket(len(rows), length, tokens, tokens, None, None)
        places = np.flatnonzero(real.ravel())
        past = torch.from_numpy(np.where(real, 0.0, -np.inf).astype(np.float32)).unsqueeze(1).to(self.device)
        return Bucket(len(rows), length, self._tensor(gather), self._tensor(gather[places]), self._tensor(places), past)

    def _tensor(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device)


@dataclass(frozen=True)
class PackedBatch:
    """A batch without padding.

    Attributes:
        inputs: The model's inputs of one value a token (``input_ids``, ``token_type_ids``), int64 ``[1, tokens]``.
        rows: Where its rows lie.
    """

    inputs: dict[str, Tensor]
    rows: PackedRows


def pack(batches: Sequence[Mapping[str, NDArray[Any]]], device: torch.device) -> PackedBatch:
    """Packs the lanes' batches, the lanes one after the other.

    Args:
        batches: For each lane its padded batch, arrays ``[b, length]`` with an ``attention_mask`` of leading ones.
        device: Where to put the result.
    """
    masks = [np.asarray(batch["attention_mask"], dtype=bool) for batch in batches]
    lengths = np.concatenate([mask.sum(axis=1) for mask in masks]).astype(np.int64)
    inputs = {
        name: torch.from_numpy(
            np.concatenate([batch[name][mask] for batch, mask in zip(batches, masks, strict=True)])[None]
        ).to(device)
        for name in batches[0]
        if name != "attention_mask"
    }
    return PackedBatch(inputs, PackedRows(lengths, tuple(len(mask) for mask in masks), device))
