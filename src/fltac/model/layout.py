"""Where the tensors of an adapter lie in a row of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Where one tensor lies in a row."""

    start: int
    shape: Shape

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


def layout(shapes: Mapping[str, Shape]) -> dict[str, Slice]:
    """Lays tensors out one after the other, in the order given."""
    out, start = {}, 0
    for name, shape in shapes.items():
        out[name] = Slice(start, shape)
        start = out[name].stop
    return out
