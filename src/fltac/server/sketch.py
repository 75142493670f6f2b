"""Fixed-size, seeded, linear summaries of vectors and of low-rank products that keep their inner products.

A fold (CountSketch) adds each number, with a random sign, into a random one of ``width`` places. The sketch of a
product ``B A`` is the fold of its ``out * in`` numbers when the place of entry (i, j) is ``place_b(i) + place_a(j)``
modulo the width: the circular convolution of a fold of B's column with one of A's row, taken by FFT, so that the
product is never formed (TensorSketch: Pham and Pagh, KDD 2013). Both are linear: the sketch of a sum is the sum of the
sketches. Inner products are unbiased; a cosine has an error of about sqrt(2 / width), and the mean over M
matrices, each with its own sketch, of about sqrt(2 / (M * width)).
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from fltac.records import LORA_A, LORA_B, FloatArray
from fltac.seeding import generator


@dataclass(frozen=True)
class Fold:
    """A random signed sum of ``size`` numbers into ``width`` places, filled evenly.

    Attributes:
        order: int ``[layers, width]``: which number comes where; layer upon layer is added.
        signs: float32 ``[layers, width]``: 1 or -1, and 0 where nothing is left.
    """

    order: NDArray[np.int64]
    signs: FloatArray

    @classmethod
    def draw(cls, seed: int, name: str, size: int, width: int) -> "Fold":
        """The fold that belongs to a tensor's name."""
        draw = generator(seed, f"sketch {name}")
        full = size // width * width
        places = np.concatenate([np.arange(full), full + draw.permutation(width)[: size - full]])
        order, signs = np.zeros(full + width, dtype=np.int64), np.zeros(full + width, dtype=np.float32)
        order[places], signs[places] = draw.permutation(size), 2 * draw.integers(0, 2, size) - 1
        if full == size:
            order, signs = order[:full], signs[:full]
        return cls(order.reshape(-1, width), signs.reshape(-1, width))

    def __call__(self, rows: FloatArray) -> FloatArray:
        """Folds the last axis: float32 ``[..., size]`` to ``[..., width]``."""
        return np.asarray(np.einsum("...lw,lw->...w", np.take(rows, self.order, axis=-1), self.signs))


@dataclass(frozen=True)
class VectorSketch:
    """Of vectors of ``size`` numbers; kept whole where they are no longer than the sketch."""

    fold: Fold | None
    width: int

    @classmethod
    def draw(cls, seed: int, name: str, size: int, width: int) -> "VectorSketch":
        return cls(None, size) if size <= width else cls(Fold.draw(seed, name, size, width), width)

    def __call__(self, rows: FloatArray) -> FloatArray:
        """float32 ``[n, size]`` to ``[n, width]``."""
        return rows if self.fold is None else self.fold(rows)


@dataclass(frozen=True)
class ProductSketch:
    """Of changes of an adapted matrix; kept whole where the matrix has no more numbers than the sketch."""

    folds: tuple[Fold, Fold] | None
    width: int

    @classmethod
    def draw(cls, seed: int, module: str, outputs: int, inputs: int, width: int) -> "ProductSketch":
        if outputs * inputs <= width:
            return cls(None, outputs * inputs)
        b = Fold.draw(seed, module + LORA_B, outputs, width)
        return cls((b, Fold.draw(seed, module + LORA_A, inputs, width)), width)

    def change(self, b: FloatArray, a: FloatArray, db: FloatArray, da: FloatArray) -> FloatArray:
        """The sketches of ``(B + dB)^T (A + dA) - B^T A`` for n changes of the same factors.

        The difference is written ``dB^T (A + dA) + B^T dA``, so that it is never a small difference of large numbers.

        Args:
            b: float32 ``[rank, out]``, B transposed.
            a: float32 ``[rank, in]``.
            db: float32 ``[n, rank, out]``.
            da: float32 ``[n, rank, in]``.

        Returns:
            float32 ``[n, width]``.
        """
        if self.folds is None:
            product = np.einsum("nro,nri->noi", db, a + da) + np.einsum("ro,nri->noi", b, da)
            return np.asarray(product.reshape(len(da), self.width))
        fold_b, fold_a = self.folds
        fb, fa, fdb, fda = (scipy.fft.rfft(f(x)) for f, x in ((fold_b, b), (fold_a, a), (fold_b, db), (fold_a, da)))
        spectrum = (fdb * (fa + fda) + fb * fda).sum(axis=1)
        return np.asarray(scipy.fft.irfft(spectrum, self.width), dtype=np.float32)
