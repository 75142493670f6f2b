"""Several LoRA adapters side by side in one pass of a frozen backbone.

A batch is G groups of rows, group g belonging to lane g. A frozen linear layer computes the base product once for all
rows. With padded rows, equally many for each lane, the low-rank products of all lanes are two batched matrix
products; with packed rows (``model.packing``) each lane has its own tokens. LoRA is that of arXiv 2106.09685:
``y = W x + scaling * B A x``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fltac.model.packing import PackedRows


@dataclass
class LanePass:
    """Which rows of the batch in flight belong to which lane; shared by all adapted layers of a model.

    Attributes:
        active: Number of lanes in the batch; 0 switches the adapters off. Rows are ordered by lane.
        dropout: Probability with which an input of an adapter is zeroed, set during training only.
        lengths: For each active lane, its own number of tokens before padding to the batch's length; empty where
            inputs are not sequences. A lane's dropout mask has this length, so that it does not depend on what
            other lanes are in the batch.
        generators: For each active lane, the source of its dropout masks.
        packed: Where the rows lie if they are packed; None if they are padded.
    """

    active: int = 0
    dropout: float = 0.0
    lengths: Sequence[int] = ()
    generators: Sequence[torch.Generator] = field(default_factory=list)
    packed: PackedRows | None = None


Base = tuple[Tensor, Tensor]
"""What is added to a frozen weight for one adapter: B ``[out, any rank]`` and A ``[the same, in]``."""


class LaneLinear(nn.Module):
    """A frozen linear layer with G low-rank adapters.

    ``lora_A`` ``[G, rank, in]`` and ``lora_B`` ``[G, out, rank]`` are set from outside (``model.lanes``), and so are
    ``bases``, one for each lane or none at all.
    """

    bases: Sequence[Base | None] = ()

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base: nn.Module, in_features: int, scaling: float, lanes: LanePass) -> None:
        super().__init__()
        self.base = base
        self.in_features = in_features
        self.scaling = scaling
        self.lanes = lanes

    def forward(self, x: Tensor) -> Tensor:
        """Adds each lane's low-rank product to the base product.

        Args:
            x: ``[rows, ..., in]``, rows ordered by lane, equally many for each; or ``[1, tokens, in]`` if packed.

        Returns:
            ``[rows, ..., out]`` in the dtype of ``x``.
        """
        out: Tensor = self.base(x)
        active = self.lanes.active
        if not active:
            return out
        if self.bases:
            out = self._with_bases(x, out)
        if self.lanes.packed is not None:
            h = x.reshape(-1, self.in_features)
            if self.lanes.dropout:
                h = self._dropped_packed(h, self.lanes.packed)
            base, sizes = out.reshape(len(h), -1), self.lanes.packed.lane_tokens
            added: Tensor = _LaneProducts.apply(base, h, self.lora_A, self.lora_B, sizes, self.scaling)  # type: ignore[no-untyped-call]
            return added.view(out.shape)
        h = x.reshape(active, -1, self.in_features)
        if self.lanes.dropout:
            h = self._dropped(x, active).reshape(active, -1, self.in_features)
        a, b = self.lora_A[:active].to(x.dtype), self.lora_B[:active].to(x.dtype)
        if active == 1:
            delta = F.linear(F.linear(h[0], a[0]) * self.scaling, b[0])
        else:
            low = torch.bmm(h, a.transpose(1, 2)) * self.scaling  # [G, tokens, rank]
            delta = torch.bmm(low, b.transpose(1, 2))  # [G, tokens, out]
        return out + delta.view(out.shape)

    def _with_bases(self, x: Tensor, out: Tensor) -> Tensor:
        """Adds each lane's own frozen product, which dropout does not touch since it stands for part of the weight."""
        h, flat = x.reshape(-1, self.in_features), out.reshape(-1, out.shape[-1])
        packed, active = self.lanes.packed, self.lanes.active
        sizes = [len(h) // active] * active if packed is None else list(packed.lane_tokens)
        parts = []
        for part, base in zip(torch.split(h, sizes), self.bases, strict=False):
            if base is None:
                parts.append(flat.new_zeros(len(part), flat.shape[1]))
            else:
                b, a = base
                parts.append(F.linear(F.linear(part, a.to(part.dtype)), b.to(part.dtype)) * self.scaling)
        return out + torch.cat(parts).view(out.shape)

    def _dropped(self, x: Tensor, active: int) -> Tensor:
        """``x`` with each lane's own mask, drawn at the lane's own length and scaled to keep the mean."""
        keep = 1.0 - self.lanes.dropout
        rows = x.shape[0] // active
        sequences = x.dim() == 3 and len(self.lanes.lengths) == active
        mask = torch.ones_like(x)
        for lane, source in enumerate(self.lanes.generators[:active]):
            part = mask[lane * rows : (lane + 1) * rows]
            if sequences:
                part = part[:, : self.lanes.lengths[lane]]
            draw = torch.rand(part.shape, generator=source, dtype=torch.float32)
            part.copy_((draw < keep) / keep)
        return x * mask

    def _dropped_packed(self, x: Tensor, rows: PackedRows) -> Tensor:
        """As ``_dropped``, with the masks that the same rows have when they are padded to their lane's longest."""
        keep = 1.0 - self.lanes.dropout
        parts = []
        for lengths, source in zip(rows.lane_lengths, self.lanes.generators, strict=False):
            longest = int(lengths.max())
            draw = torch.rand((len(lengths), longest, x.shape[1]), generator=source, dtype=torch.float32)
            real = torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None])
            parts.append((draw[real] < keep) / keep)
        return x * torch.cat(parts).to(x)


class _LaneProducts(torch.autograd.Function):
    """``base + scaling * B_g A_g x`` for the tokens of each lane g; nothing of one lane enters another's numbers.

    Each lane's own products, since numbers that are not finite would spread through a common one.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, base: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], scaling: float
    ) -> Tensor:
        lanes = len(sizes)
        low_a, low_b = a[:lanes].to(x.dtype), b[:lanes].to(x.dtype)
        out, lows, start = torch.empty_like(base), [], 0
        for lane, size in enumerate(sizes):
            part = slice(start, start + size)
            low = x[part] @ low_a[lane].t()
            torch.addmm(base[part], low, low_b[lane].t(), alpha=scaling, out=out[part])
            lows.append(low)
            start += size
        ctx.save_for_backward(x, low_a, low_b, *lows)
        ctx.sizes, ctx.scaling, ctx.shapes = sizes, scaling, (a, b)  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low_a, low_b, *lows = ctx.saved_tensors
        of_a, of_b = (torch.zeros_like(like) for like in ctx.shapes)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        start = 0
        for lane, size in enumerate(ctx.sizes):
            part = slice(start, start + size)
            of_low = (grad[part] @ low_b[lane]) * ctx.scaling
            of_a[lane] = of_low.t() @ x[part]
            of_b[lane] = (grad[part].t() @ lows[lane]) * ctx.scaling
            if of_x is not None:
                torch.mm(of_low, low_a[lane], out=of_x[part])
            start += size
        return grad if ctx.needs_input_grad[0] else None, of_x, of_a, of_b, None, None


def attach(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], scaling: float, lanes: LanePass
) -> dict[str, LaneLinear]:
    """Wraps the named linear layers of a model in place.

    Args:
        model: The frozen backbone.
        shapes: Module path to (in_features, out_features).
        scaling: The factor in front of B A.
        lanes: The pass that all wrapped layers share.

    Returns:
        Module path to wrapped layer, in the order of ``shapes``. A layer that the model reaches under one path
        and runs several times (ALBERT) is adapted once.
    """
    layers = {}
    for path, (in_features, _) in shapes.items():
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        layer = LaneLinear(getattr(holder, name), in_features, scaling, lanes)
        setattr(holder, name, layer)
        layers[path] = layer
    return layers


@contextmanager
def detached(model: nn.Module, layers: Mapping[str, LaneLinear]) -> Iterator[None]:
    """Inside, the wrapped layers' bases are in their places; afterwards the wrapped layers are again."""
    try:
        for path, layer in layers.items():
            _put(model, path, layer.base)
        yield
    finally:
        for path, layer in layers.items():
            _put(model, path, layer)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
