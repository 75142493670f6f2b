"""Several LoRA adapters side by side in one pass of a frozen backbone.

A batch is G groups of equally many rows, group g belonging to lane g. A frozen linear layer computes the base
product once for all rows; the low-rank products of all lanes are two batched matrix products. LoRA is that of
arXiv 2106.09685: ``y = W x + scaling * B A x``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """

    active: int = 0
    dropout: float = 0.0
    lengths: Sequence[int] = ()
    generators: Sequence[torch.Generator] = field(default_factory=list)


class LaneLinear(nn.Module):
    """A frozen linear layer with G low-rank adapters.

    ``lora_A`` ``[G, rank, in]`` and ``lora_B`` ``[G, out, rank]`` are set from outside (``model.lanes``).
    """

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
            x: ``[rows, ..., in]``, rows ordered by lane, equally many for each.

        Returns:
            ``[rows, ..., out]`` in the dtype of ``x``.
        """
        out: Tensor = self.base(x)
        active = self.lanes.active
        if not active:
            return out
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
