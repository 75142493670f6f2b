"""Sketches against the vectors and the formed products that they stand for."""

import numpy as np
import pytest

from fltac.server.sketch import Fold, ProductSketch, VectorSketch


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [4, 5, 10, 16])
def test_a_fold_is_a_signed_sum_that_fills_its_places_evenly(width: int) -> None:
    """As a matrix: one entry of size 1 for each number, and no place gets two more than another."""
    matrix = Fold.draw(0, "x", 10, width)(np.eye(10, dtype=np.float32))
    assert matrix.shape == (10, width)
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), np.ones(10))
    filled = np.abs(matrix).sum(axis=0)
    assert filled.max() - filled.min() <= 1
    rows = drawn(0, 2, 3, 10)
    np.testing.assert_allclose(Fold.draw(0, "x", 10, width)(rows), rows @ matrix, atol=1e-5)


def test_folds_belong_to_the_seed_and_the_name() -> None:
    rows = drawn(0, 1, 64)
    found = [Fold.draw(seed, name, 64, 8)(rows) for seed, name in ((0, "x"), (0, "x"), (1, "x"), (0, "y"))]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])
    assert not np.allclose(found[0], found[3])


def test_what_is_no_longer_than_its_sketch_is_kept_whole() -> None:
    rows = drawn(0, 3, 7)
    np.testing.assert_array_equal(VectorSketch.draw(0, "x", 7, 8)(rows), rows)
    assert VectorSketch.draw(0, "x", 7, 6)(rows).shape == (3, 6)


def change_of(sketch: ProductSketch, rank: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Sketched changes of the same factors, and the changes formed in float64."""
    b, a = drawn(1, rank, outputs), drawn(2, rank, inputs)
    db, da = drawn(3, 6, rank, outputs) * np.float32(1e-3), drawn(4, 6, rank, inputs) * np.float32(1e-3)
    after = np.einsum("nro,nri->noi", (b + db.astype(float)), (a + da.astype(float)))
    return sketch.change(b, a, db, da), after - b.T.astype(float) @ a.astype(float)


def test_a_small_change_of_a_small_matrix_is_exact() -> None:
    sketched, formed = change_of(ProductSketch.draw(0, "m", 4, 5, 20), 2, 4, 5)
    np.testing.assert_allclose(sketched, formed.reshape(6, 20), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width", [7, 16, 64])
def test_a_product_is_folded_at_the_sum_of_the_places(width: int) -> None:
    """By hand: entry (i, j) goes, with both signs, to the place of i plus the place of j."""
    outputs, inputs = 9, 11
    sketched, formed = change_of(ProductSketch.draw(0, "m", outputs, inputs, width), 2, outputs, inputs)
    rows = Fold.draw(0, "m.lora_B", outputs, width)(np.eye(outputs, dtype=np.float32))
    columns = Fold.draw(0, "m.lora_A", inputs, width)(np.eye(inputs, dtype=np.float32))
    expected = np.zeros((6, width))
    for i in range(outputs):
        for j in range(inputs):
            place = (np.abs(rows[i]).argmax() + np.abs(columns[j]).argmax()) % width
            expected[:, place] += rows[i].sum() * columns[j].sum() * formed[:, i, j]
    np.testing.assert_allclose(sketched, expected, rtol=1e-4, atol=1e-6)


def test_inner_products_are_unbiased_with_the_error_that_is_promised() -> None:
    """Over 400 seeds: the mean error is within four of its standard errors, the error below sqrt(3 / width)."""
    width, outputs, inputs = 64, 20, 30
    b, a = np.zeros((1, outputs), np.float32), drawn(9, 1, inputs)
    db, da = drawn(5, 2, 1, outputs), np.float32(0.3) * drawn(6, 2, 1, inputs)  # A is nearly common, as in training
    formed = np.einsum("nro,nri->noi", db, a + da).reshape(2, -1)
    lengths = np.prod(np.linalg.norm(formed, axis=1))
    errors = []
    for seed in range(400):
        x, y = ProductSketch.draw(seed, "m", outputs, inputs, width).change(b, a, db, da)
        errors.append((x @ y - formed[0] @ formed[1]) / lengths)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 20
    assert 0.5 * width**-0.5 < np.std(errors) < 3**0.5 * width**-0.5
