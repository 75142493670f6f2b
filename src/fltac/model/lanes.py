"""The trainable numbers of several adapters: one matrix, a row for each, and the few rows that are in a pass.

The layers look into a second, smaller matrix with a row for each lane of the pass. An optimizer works on whole rows
(norms, steps and moments are each lane's own by construction), and an adapter is loaded or read by copying one row.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fltac.model.backbone import Backbone
from fltac.model.causal import Predicted, predict
from fltac.model.first_token import Cut
from fltac.model.layout import Shape, Slice, layout
from fltac.model.lora import Base, LanePass, attach, detached
from fltac.model.packed_pass import pooled_packed, pooled_padded
from fltac.model.packing import PackedBatch, pack
from fltac.model.prefix import Prefix, RowKey
from fltac.records import BASE_A, BASE_B, HEAD, LORA_A, LORA_B, Adapter

Batch = Mapping[str, Tensor] | PackedBatch
"""Rows on the model's device: padded, or packed."""
DELTA = ".delta"
"""Suffix of a tensor that holds the change of one of the backbone's own parameters (full fine-tuning)."""


class LaneModel:
    """A backbone with room for the adapters of several lanes.

    Attributes:
        backbone: The frozen model; its target layers are wrapped for as long as this object is in use.
        body_shapes: Name and shape of every adapter tensor that is not a head: ``<path>.lora_A`` ``[rank, in]`` and
            ``<path>.lora_B`` ``[out, rank]``, or ``<parameter>.delta`` for full fine-tuning.
        values: ``[lanes, width]``, the adapters in the pass, one a row: the body, then the adapter's heads.
        gradients: The same shape; filled by ``backward``.
        scaling: The factor in front of B A.
        in_pass: Number of the adapter in each of the first lanes.
        first_position: Position id of a row's first token, if rows are packed; None if they are padded.
        prefix: The frozen layers below the first adapted one, if their results are kept.
        cut: Where the last layer leaves all but first tokens behind, if a head reads nothing else.
    """

    first_position: int | None = None
    prefix: Prefix | None = None
    cut: Cut | None = None

    def __init__(
        self,
        backbone: Backbone,
        modules: Mapping[str, tuple[int, int]],
        rank: int,
        scaling: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wraps the modules; pass no modules for full fine-tuning of all of the backbone's parameters.

        Args:
            backbone: In any precision; this object does not change it.
            modules: Module path to (in_features, out_features).
            rank: Rank of the adapters.
            scaling: Factor in front of B A.
            dtype: Of adapters, heads and their gradients.
        """
        self.backbone = backbone
        self.dtype = dtype
        self._modules, self._rank, self.scaling = modules, rank, scaling
        self.lanes = LanePass()
        self.layers = attach(backbone.model, modules, scaling, self.lanes)
        self.full = {} if modules else dict(backbone.model.named_parameters())
        self._frozen = {name: tensor.detach().clone() for name, tensor in self.full.items()}
        self.body_shapes: dict[str, Shape] = {}
        for path, (in_features, out_features) in modules.items():
            self.body_shapes[path + LORA_A] = (rank, in_features)
            self.body_shapes[path + LORA_B] = (out_features, rank)
        for name, tensor in self.full.items():
            self.body_shapes[name + DELTA] = tuple(tensor.shape)
        self._body = layout(self.body_shapes)
        self._body_width = max((part.stop for part in self._body.values()), default=0)
        self._heads: list[dict[str, Slice]] = []
        self._bases: list[dict[str, Base]] = []
        self._all = torch.empty(0, 0, dtype=dtype)
        self.values = self._all
        self.gradients = self._all
        self.in_pass: tuple[int, ...] = ()

    def twin(self, rank: int | None = None) -> "LaneModel":
        """Another one around the same frozen weights, for another thread or rank; not for full fine-tuning."""
        assert self.layers, "full fine-tuning changes the weights"
        model = self.backbone.model
        weights = [*model.parameters(), *model.buffers()]
        with detached(model, self.layers):
            copied = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
        backbone = replace(self.backbone, model=copied)
        other = LaneModel(backbone, self._modules, rank or self._rank, self.scaling, self.dtype)
        other.first_position, other.cut = self.first_position, self.cut
        other.prefix = None if self.prefix is None else replace(self.prefix, model=copied)
        return other

    def load(self, adapters: Sequence[Adapter], lanes: int | None = None) -> None:
        """Takes adapters in, replacing all there were, and puts the first ones into the pass.

        Args:
            adapters: Each with the whole body, perhaps of smaller rank (filled up with zeros, which training leaves at
                zero); they may hold different heads, and bases.
            lanes: The most that are in a pass together; default: all.
        """
        self._heads = []
        self._bases = self._read_bases(adapters)
        width = self._body_width
        for adapter in adapters:
            shapes = {name: tensor.shape for name, tensor in adapter.items() if name.startswith(HEAD)}
            head = {name: Slice(part.start + self._body_width, part.shape) for name, part in layout(shapes).items()}
            self._heads.append(head)
            width = max([width, *(part.stop for part in head.values())])
        device = self.backbone.device
        self._all = torch.zeros(len(adapters), width, dtype=self.dtype, device=device)
        for number, adapter in enumerate(adapters):
            for name, part in self.parts(number).items():
                value = torch.from_numpy(np.asarray(adapter[name])).to(self._all)
                if name.endswith(DELTA):
                    value = value + self._frozen[name.removesuffix(DELTA)].to(self._all)
                place = self._all[number, part.start : part.stop].view(part.shape)
                place[tuple(map(slice, value.shape))] = value
        count = min(lanes or len(adapters), len(adapters))
        self.values = torch.zeros(count, width, dtype=self.dtype, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.in_pass = ()
        self._bind_body()
        self.activate(range(count))

    @torch.no_grad()
    def activate(self, numbers: Sequence[int]) -> None:
        """Puts these adapters into the first lanes, in this order, after storing those that were there."""
        chosen = tuple(numbers)
        if chosen == self.in_pass:
            return
        self._store()
        self.in_pass = chosen
        self.values[: len(chosen)] = self._all[list(chosen)]
        for path, layer in self.layers.items():
            own = [self._bases[number].get(path) for number in chosen]
            layer.bases = own if any(base is not None for base in own) else ()

    def columns(self, chosen: Callable[[str], bool]) -> Tensor | None:
        """The columns of the body's tensors with such names, int64; None where there are none."""
        parts = [part for name, part in self._body.items() if chosen(name)]
        if not parts:
            return None
        return torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(self.backbone.device)

    @torch.no_grad()
    def rows(self) -> Tensor:
        """All adapters' numbers ``[adapters, width]``, in this object's precision; not a copy."""
        self._store()
        return self._all

    def read(self, number: int) -> dict[str, np.ndarray[Shape, np.dtype[np.float32]]]:
        """Copies one adapter out, in float32 on the CPU."""
        out, row = {}, self.rows()[number]
        for name, part in self.parts(number).items():
            value = row[part.start : part.stop].view(part.shape)
            if name.endswith(DELTA):
                value = value - self._frozen[name.removesuffix(DELTA)].to(value)
            out[name] = value.detach().to("cpu", torch.float32, copy=True).numpy()
        return out

    @property
    def packs(self) -> bool:
        """Whether ``stack`` packs rows."""
        return self.first_position is not None

    def stack(self, batches: Sequence[Mapping[str, NDArray[Any]]]) -> Batch:
        """Puts the lanes' batches one after the other on the model's device.

        Args:
            batches: For each lane its rows, padded: to its own longest, or to the longest of all lanes where
                ``first_position`` is None.
        """
        if self.packs:
            return pack(batches, self.backbone.device)
        names, device = batches[0], self.backbone.device
        return {name: torch.from_numpy(np.concatenate([own[name] for own in batches])).to(device) for name in names}

    def features(self, batch: Batch, active: int = 1, keys: Sequence[RowKey] = ()) -> Tensor:
        """Pools the adapted backbone's output.

        Args:
            batch: From ``stack``; padded rows are ordered by lane, equally many for each.
            active: Number of lanes in the batch, the first so many of the pass; 0 for the bare backbone.
            keys: Which rows of which splits they are, where what is known of them may be used.

        Returns:
            ``[rows, hidden]``; of a causal language model ``[rows, vocabulary]``, each row's mean logits.
        """
        with self._running(batch, active, keys):
            if isinstance(batch, PackedBatch):
                return pooled_packed(self.backbone, batch, self.first_position or 0)
            return pooled_padded(self.backbone, batch)

    def predictions(self, batch: Batch, active: int = 1, keys: Sequence[RowKey] = ()) -> Predicted:
        """A causal language model's predictions of the tokens that have labels; arguments as for ``features``."""
        with self._running(batch, active, keys):
            return predict(self.backbone, batch, self.first_position or 0)

    @contextmanager
    def _running(self, batch: Batch, active: int, keys: Sequence[RowKey]) -> Iterator[None]:
        """Inside, the backbone is run on this batch."""
        self.lanes.active = active
        with ExitStack() as shortcuts:
            if self.prefix is not None and self.prefix.admits(keys):
                shortcuts.enter_context(self.prefix.supplied(batch, keys))
            if self.cut is not None:
                shortcuts.enter_context(self.cut.made(self.backbone.model))
            if isinstance(batch, PackedBatch):
                assert self.first_position is not None, "packed rows for a backbone that is not known to take them"
            self.lanes.packed = batch.rows if isinstance(batch, PackedBatch) else None
            yield

    def head_parts(self, lane: int, head_key: str) -> tuple[Slice, Slice]:
        """Where weight and bias of one of a lane's heads lie in its row."""
        heads = self._heads[self.in_pass[lane]]
        return heads[f"{HEAD}{head_key}.weight"], heads[f"{HEAD}{head_key}.bias"]

    def logits(self, features: Tensor, lane: int, head_key: str) -> Tensor:
        """Applies one of a lane's heads to pooled features ``[b, hidden]``; returns ``[b, outputs]``."""
        weight, bias = (self._leaf(lane, part) for part in self.head_parts(lane, head_key))
        return F.linear(features.to(weight.dtype), weight, bias)

    def lane_logits(self, features: Tensor, first: int, parts: tuple[Slice, Slice]) -> Tensor:
        """Applies heads of neighbouring lanes that lie in the same place: ``[lanes, b, outputs]``.

        Args:
            features: ``[lanes, b, hidden]``.
            first: Which lane is the first of these.
            parts: From :meth:`head_parts`, the same for all.
        """
        weight, bias = (self._leaf(slice(first, first + len(features)), part) for part in parts)
        return torch.baddbmm(bias.unsqueeze(1), features.to(weight.dtype), weight.transpose(1, 2))

    def restore(self) -> None:
        """Puts the backbone's own weights back after full fine-tuning, and switches the adapters off."""
        self.lanes.active = 0
        with torch.no_grad():
            for name, parameter in self.full.items():
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = self._frozen[name].clone()

    def parts(self, number: int) -> dict[str, Slice]:
        """Where an adapter's tensors lie in its row."""
        return {**self._body, **self._heads[number]}

    def _read_bases(self, adapters: Sequence[Adapter]) -> list[dict[str, Base]]:
        """Each adapter's bases by module path; tensors that adapters share are held once."""
        held: dict[int, Tensor] = {}

        def tensor(array: NDArray[np.float32]) -> Tensor:
            if id(array) not in held:
                held[id(array)] = torch.tensor(array, dtype=self.backbone.model.dtype, device=self.backbone.device)
            return held[id(array)]

        return [
            {
                path: (tensor(adapter[path + BASE_B]), tensor(adapter[path + BASE_A]))
                for path in self.layers
                if path + BASE_A in adapter
            }
            for adapter in adapters
        ]

    def _store(self) -> None:
        if self.in_pass:
            self._all[list(self.in_pass)] = self.values[: len(self.in_pass)]

    def _bind_body(self) -> None:
        """Points the layers at their columns; autograd adds each gradient in place into ``gradients``."""
        for path, layer in self.layers.items():
            layer.lora_A = self._leaf(slice(None), self._body[path + LORA_A])
            layer.lora_B = self._leaf(slice(None), self._body[path + LORA_B])
        for name, parameter in self.full.items():
            part = self._body[name + DELTA]
            parameter.data = self.values[0, part.start : part.stop].view(part.shape)
            parameter.requires_grad_(True)
            parameter.grad = self.gradients[0, part.start : part.stop].view(part.shape)

    def _leaf(self, lanes: int | slice, part: Slice) -> Tensor:
        """One lane's tensor, or some lanes' ``[lanes, *shape]``; its gradient goes into ``gradients``."""
        values, gradients = self.values[lanes, part.start : part.stop], self.gradients[lanes, part.start : part.stop]
        shape = (*values.shape[:-1], *part.shape)
        leaf = values.view(shape).requires_grad_()
        leaf.grad = gradients.view(shape)
        return leaf
