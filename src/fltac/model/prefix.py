"""The frozen layers below the first adapted one, run once for each row.

With ``lora.layers`` the lowest layers have no adapter, so what they make of a row never changes. It is kept; the
model then starts at the first adapted layer. Each row is run alone, so that what is kept does not depend on which
batch came first, and a resumed run gives the same numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fltac.model.packing import PackedBatch

RowKey = tuple[str, int]
"""(fingerprint of a split, row)."""


class _Reached(Exception):
    pass


class _Skipped(nn.Module):
    """In the place of a layer whose result is known already."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.replaced = (layer,)  # in a tuple, so that it does not become a part of this module

    def __getattr__(self, name: str) -> Any:
        """What a model reads of its layers, such as what kind of attention they have."""
        if name == "replaced":
            raise AttributeError(name)
        return getattr(self.replaced[0], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if self.as_tuple else hidden_states


@dataclass
class Prefix:
    """The hidden states that enter the first adapted layer.

    Attributes:
        model: The backbone.
        path: Of the list of layers.
        first: Index of the first adapted layer, at least 1.
        admitted: Fingerprints of the splits whose rows are kept; fixed before a run's first pass.
        kept: For each row ``[length, hidden]``, without padding.
    """

    model: nn.Module
    path: str
    first: int
    admitted: set[str] = field(default_factory=set)
    kept: dict[RowKey, Tensor] = field(default_factory=dict)
    _as_tuple: bool = False

    @property
    def layers(self) -> nn.ModuleList:
        """All layers of the backbone."""
        layers = self.model.get_submodule(self.path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def admits(self, keys: Sequence[RowKey]) -> bool:
        """Whether all of these rows are kept."""
        return bool(keys) and all(split in self.admitted for split, _ in keys)

    @contextmanager
    def supplied(self, batch: Mapping[str, Tensor] | PackedBatch, keys: Sequence[RowKey]) -> Iterator[None]:
        """Inside, the model starts at the first adapted layer with what is known of these rows.

        Args:
            batch: The rows.
            keys: One for each row of the batch.
        """
        states = self._states(batch, keys)
        layers = self.layers
        replaced = [layers[index] for index in range(self.first)]

        def supply(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return ((states, *args[1:]), options) if args else (args, {**options, "hidden_states": states})

        handle = layers[self.first].register_forward_pre_hook(supply, with_kwargs=True)
        try:
            for index in range(self.first):
                layers[index] = _Skipped(replaced[index], self._as_tuple)
            yield
        finally:
            handle.remove()
            for index, layer in enumerate(replaced):
                layers[index] = layer

    def _states(self, batch: Mapping[str, Tensor] | PackedBatch, keys: Sequence[RowKey]) -> Tensor:
        rows = _rows_of(batch)
        threads = torch.get_num_threads()
        for key, row in zip(keys, rows, strict=True):
            if key not in self.kept:
                torch.set_num_threads(1)  # the same bits, whoever needs the row first
                self.kept[key] = self._run(row)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        known = [self.kept[key] for key in keys]
        if isinstance(batch, PackedBatch):
            return torch.cat(known).unsqueeze(0)
        if len({len(states) for states in known}) == 1 and "attention_mask" not in batch:
            return torch.stack(known)
        length = batch["attention_mask"].shape[1]
        padded = known[0].new_zeros(len(known), length, known[0].shape[1])
        for index, states in enumerate(known):
            padded[index, : len(states)] = states
        return padded

    @torch.no_grad()
    def _run(self, row: Mapping[str, Tensor]) -> Tensor:
        """One row through the layers below the first adapted one: ``[length, hidden]``."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append(args[0] if args else options["hidden_states"])
            raise _Reached

        def look(_: nn.Module, __: Any, out: Any) -> None:
            self._as_tuple = isinstance(out, tuple)

        layers = self.layers
        handles = [
            layers[self.first].register_forward_pre_hook(stop, with_kwargs=True),
            layers[self.first - 1].register_forward_hook(look),
        ]
        try:
            dtype = next(self.model.parameters()).dtype
            self.model(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in row.items()})
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found[0][0].clone()


def find_prefix(model: nn.Module, adapted: Iterable[str]) -> Prefix | None:
    """The frozen layers below the adapted modules; None where there are none, or no single list of layers."""
    places = set()
    for path in adapted:
        parts = path.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            return None
        places.add((".".join(parts[:number]), int(parts[number])))
    if len({path for path, _ in places}) != 1:
        return None
    path, first = min(places)
    if first == 0 or not isinstance(model.get_submodule(path), nn.ModuleList):
        return None
    return Prefix(model, path, first)


def _rows_of(batch: Mapping[str, Tensor] | PackedBatch) -> Iterator[dict[str, Tensor]]:
    """Each row's inputs alone, without padding."""
    if isinstance(batch, PackedBatch):
        for start, length in zip(batch.rows.starts.tolist(), batch.rows.lengths.tolist(), strict=True):
            row = {name: value[:, start : start + length] for name, value in batch.inputs.items()}
            yield row | {"attention_mask": torch.ones_like(row["input_ids"])}
        return
    for index in range(len(next(iter(batch.values())))):
        row = {name: value[index : index + 1] for name, value in batch.items()}
        if "attention_mask" in row:
            length = int(row["attention_mask"].sum())
            row = {name: value[:, :length] for name, value in row.items()}
        yield row
