"""What is compared between slots: flattened factors (the paper), or a kernel of what was learned.

The kernel is a cosine of what was learned, averaged over the adapted matrices, plus that of the heads' changes, plus
that of the clients' profiles where they send some, less what all have in common. Each matrix is normalised before it is
added, so that no loud layer decides alone, and the common factor alpha / r cancels. All is compared through sketches
(``server.sketch``). Two ways:

Of A (``server.clustering.features``: ``a``, ``gradients``): of its changes, and half as much of the heads', or of its
gradients, without their sign, between slots as from round to round (``server.directions``). They say which inputs a
task reads. B's and the head's say where they push the output to, and a client whose labels are skewed pushes all its
tasks one way, another client the other way: the sign is loud and says nothing of the task.

``products``: of the change of the product ``B A``, with its sign. It does not change under ``A -> R A, B -> B R^-1``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fltac.records import Adapter, FloatArray, is_head
from fltac.server.changes import BLOCK, Changes, Vectors
from fltac.server.directions import squared_agreement, squared_lengths
from fltac.server.pairing import Matrix, Rows, paired
from fltac.server.sketch import VectorSketch

WHOLE = 512
"""Up to so many slots all pairs are compared and all adapters flattened; above, no matrix of either kind is formed."""
DISTANCE_WIDTH = 2048
"""Numbers kept of a flattened adapter where there are many."""
HEAD_OF_A = 0.5
"""The weight of the heads' cosine beside that of A's change; beside that of the products it is 1."""


def flattened(adapters: Sequence[Adapter], head: bool) -> FloatArray:
    """Each adapter's factors one after the other, in the order of their names: float32 ``[n, D]``.

    With ``head``, heads are part of it; a head that another adapter has and this one lacks counts as zeros.
    """
    return _rows(adapters, _shapes(adapters, head))


def _shapes(adapters: Sequence[Adapter], head: bool) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for adapter in adapters for name, tensor in adapter.items() if head or not is_head(name)}


def _rows(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> FloatArray:
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    out = np.zeros((len(adapters), sum(sizes.values())), dtype=np.float32)
    for row, adapter in zip(out, adapters, strict=True):
        end = 0
        for name, size in sizes.items():
            start, end = end, end + size
            if name in adapter:
                row[start:end] = adapter[name].ravel()
    return out


def distance_sketches(adapters: Sequence[Adapter], head: bool, seed: int) -> FloatArray:
    """Points as far from each other as the flattened adapters: these themselves, or sketches of many or long ones.

    Args:
        adapters: n of them.
        head: As for :func:`flattened`.
        seed: Of the sketches.

    Returns:
        float32 ``[n, d]``. Squared distances of sketches are right to about ``sqrt(2 / DISTANCE_WIDTH)``, 3 %.
    """
    if len(adapters) <= WHOLE:
        return flattened(adapters, head)
    shapes = _shapes(adapters, head)
    size = sum(math.prod(shape) for shape in shapes.values())
    sketch = VectorSketch.draw(seed, "adapter", size, DISTANCE_WIDTH)
    step = max(1, BLOCK * 4 // size)
    out = np.empty((len(adapters), sketch.width), dtype=np.float32)
    for start in range(0, len(adapters), step):
        out[start : start + step] = sketch(_rows(adapters[start : start + step], shapes))
    return out


class Features:
    """What the kernel compares, normalised: a matrix of similarities, or (products) rows made a few at a time.

    Heads of different keys have columns of their own, so that their cosine is 0.
    """

    def __init__(self, changes: Changes, head: bool, profile_weight: float = 1.0) -> None:
        """Args:
        changes: What each of n slots has learned.
        head: Add the cosine of the heads' change.
        profile_weight: With which the cosine of the profiles is added, if there are any.
        """
        n, modules = len(changes.keys), changes.modules
        self._changes = changes
        heads = list(changes.heads.values()) if head else []
        self._scales = np.empty((n, len(modules)), dtype=np.float32)
        for module, columns in enumerate(modules):
            own = Vectors(np.arange(n), changes.body[:, :, columns])
            self._scales[:, module] = _scale(_squares([own], n, changes.of_a), 1.0 / len(modules))
        self._widths = [columns.stop - columns.start for columns in modules]
        scale = _scale(_squares(heads, n, changes.of_a), HEAD_OF_A if changes.of_a else 1.0)
        # What is compared besides the body: vectors, and for each of their rows what makes it one of the kernel's.
        self._heads = [(own, scale[own.rows]) for own in heads]
        self._profiles: list[tuple[Vectors, FloatArray]] = []
        if changes.profiles is not None:
            centred = _centred(changes.profiles)
            squares = _squares([centred], n, unsigned=False)[centred.rows]
            self._profiles.append((centred, _scale(squares, profile_weight)))
        self.shape = (n, changes.body.shape[-1] + sum(own.values.shape[-1] for own, _ in self._others))

    @property
    def _others(self) -> list[tuple[Vectors, FloatArray]]:
        return [*self._heads, *self._profiles]

    def block(self, start: int, stop: int) -> FloatArray:
        """Rows of a range, of products: float32 ``[stop - start, width]``."""
        assert not self._changes.of_a, "a kernel without signs is no inner product of rows"
        out = np.zeros((stop - start, self.shape[1]), dtype=np.float32)
        end = self._changes.body.shape[-1]
        scales = np.repeat(self._scales[start:stop], self._widths, axis=1)
        np.multiply(self._changes.body[start:stop, 0], scales, out=out[:, :end])
        for own, scale in self._others:
            begin, end = end, end + own.values.shape[-1]
            part = slice(*np.searchsorted(own.rows, (start, stop)))
            out[own.rows[part] - start, begin:end] = own.values[part, 0] * scale[part, None]
        return out

    def learned(self, rows: Rows, columns: Rows) -> Matrix:
        """What some slots learned compared with what others did, both sorted: float64 ``[len(rows), len(columns)]``.

        Matrix by matrix, so that nothing of the size of all rows is made.
        """
        unsigned, every = self._changes.of_a, np.arange(self.shape[0])
        total = np.zeros((len(rows), len(columns)))
        for scale, part in zip(self._scales.T, self._changes.modules, strict=True):
            total += _inner([(Vectors(every, self._changes.body[:, :, part]), scale)], rows, columns, unsigned)
        return total + _inner(self._heads, rows, columns, unsigned)

    def profiled(self, rows: Rows, columns: Rows) -> Matrix:
        """What profiles add to it; zeros where there are none."""
        return _inner(self._profiles, rows, columns, unsigned=False)

    def gram(self) -> Matrix:
        """The kernel of all slots: float64 ``[n, n]``."""
        every = np.arange(self.shape[0])
        return self.learned(every, every) + self.profiled(every, every)

    def blocks(self) -> Iterator[tuple[slice, FloatArray]]:
        """All rows, some at a time."""
        step = max(1, 2 * BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield slice(start, stop), self.block(start, stop)


def _inner(parts: Sequence[tuple[Vectors, FloatArray]], rows: Rows, columns: Rows, unsigned: bool) -> Matrix:
    """Inner products of what some slots have, each row times its scale; without signs, of second moments, rooted."""
    total = np.zeros((len(rows), len(columns)))
    for own, scale in parts:
        (left, left_place), (right, right_place) = (_places(own.rows, wanted) for wanted in (rows, columns))
        first, second = (own.values[some] * scale[some, None, None] for some in (left, right))
        inner = squared_agreement(first, second) if unsigned else first[:, 0] @ second[:, 0].T
        if len(left_place) == len(rows) and len(right_place) == len(columns):
            total += inner
        else:
            total[np.ix_(left_place, right_place)] += inner
    return np.sqrt(total) if unsigned else total


def _places(held: Rows, wanted: Rows) -> tuple[Rows | slice, Rows]:
    """Where what is wanted of what is held stands in it, and where among what is wanted; both sorted."""
    some, place = np.intersect1d(held, wanted, assume_unique=True, return_indices=True)[1:]
    if len(some) and some[-1] - some[0] == len(some) - 1:
        return slice(int(some[0]), int(some[-1]) + 1), place  # a view, and no copy
    return some, place


def _centred(profiles: Vectors) -> Vectors:
    """Without their mean: what all texts, or all images, have in common is most of a feature."""
    return Vectors(profiles.rows, profiles.values - profiles.values.mean(axis=0))


def _squares(parts: Sequence[Vectors], n: int, unsigned: bool) -> Matrix:
    """What :func:`_inner` has for each of n slots with itself, without scales: float64 ``[n]``."""
    total = np.zeros(n)
    for own in parts:
        first = own.values[:, 0]
        total[own.rows] += (
            squared_lengths(own.values) if unsigned else np.einsum("nw,nw->n", first, first, dtype=np.float64)
        )
    return np.sqrt(total) if unsigned else total


def _scale(squares: Matrix, weight: float) -> FloatArray:
    """Root of the weight over the norm; 0 for a slot that learned nothing."""
    norms = np.sqrt(squares)
    scale = np.divide(weight**0.5, norms, out=np.zeros_like(norms), where=norms > 1e-12)
    return np.asarray(scale, dtype=np.float32)


def kernel(changes: Changes, head: bool, profile_weight: float = 1.0) -> Matrix:
    """The similarity of all pairs: float64 ``[n, n]``, symmetric; with products also positive semi-definite."""
    return Features(changes, head, profile_weight).gram()


def views(
    changes: Changes, head: bool, profile_weight: float = 1.0, sharpness: float = 0.0
) -> list[tuple[Matrix, Matrix]]:
    """Pairs of kernels of different parts of what the slots have learned: to group by, and to test the groups in.

    One half of the adapted matrices against the other, both ways, and all matrices against the heads; with profiles,
    these help to group. Where there is only one part, it is both. ``sharpness`` is that of the dual softmax
    (``server.pairing``), which helps to group as well.
    """
    owners = [client for client, _ in changes.keys]
    body = replace(changes, heads={}, profiles=None)
    halves = [kernel(replace(body, modules=changes.modules[start::2]), False, 0.0) for start in (0, 1)]
    bodies = [half for half in halves if half.any()]
    heads = kernel(replace(changes, modules=(), profiles=None), True, 0.0) if head and changes.heads else None
    if len(bodies) < 2:
        whole = kernel(replace(changes, profiles=None), head)
        pairs = [(bodies[0], heads) if bodies and heads is not None else (whole, whole)]
    elif heads is None:
        pairs = [(bodies[0], bodies[1]), (bodies[1], bodies[0])]
    else:
        first, second = bodies
        pairs = [(first + heads, second), (second + heads, first), ((first + second) / 2, heads)]
    said = kernel(replace(changes, modules=(), heads={}), False, profile_weight)
    return [(paired(by, owners, sharpness) + said, within) for by, within in pairs]
