"""Kernels of products against the products formed in full, by NumPy alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fltac.records import Adapter
from fltac.server.similarity import (
    RANK_LIMIT,
    accumulated,
    cosine,
    embedding,
    flattened,
    kernel,
    learned,
    product_gram,
    truncated,
)
from server.builders import adapter


def random_adapter(draw: np.random.Generator, rank: int = 2, key: str = "2") -> Adapter:
    shapes = {
        "m.lora_A": (rank, 5),
        "m.lora_B": (4, rank),
        "n.lora_A": (rank, 3),
        "n.lora_B": (6, rank),
        f"head.{key}.weight": (int(key), 4),
        f"head.{key}.bias": (int(key),),
    }
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def product(tensors: Adapter, module: str) -> np.ndarray:
    return tensors[module + ".lora_B"].astype(np.float64) @ tensors[module + ".lora_A"].astype(np.float64)


def plain_cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_product_gram_is_that_of_the_formed_products(ranks: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    held = [random_adapter(draw, rank) for rank in ranks]
    gram = product_gram([(item["m.lora_A"], item["m.lora_B"]) for item in held])
    flat = np.array([product(item, "m").ravel() for item in held])
    np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-4, atol=1e-4)


def test_a_small_change_of_large_factors_keeps_its_direction() -> None:
    """The change is three parts in ten thousand of the factors; its cosine must not drown in rounding."""
    draw = np.random.default_rng(0)
    base = random_adapter(draw)
    changes = [
        learned(
            base,
            {name: t + np.float32(3e-4) * draw.normal(size=t.shape).astype(np.float32) for name, t in base.items()},
        )
        for _ in range(4)
    ]
    found = cosine(product_gram([(item["m.lora_A"], item["m.lora_B"]) for item in changes]))
    flat = [product(item, "m").ravel() for item in changes]
    expected = [[plain_cosine(x, y) for y in flat] for x in flat]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_product_gram_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    factors = [(item["m.lora_A"], item["m.lora_B"]) for item in (random_adapter(draw) for _ in range(7))]
    whole = product_gram(factors)
    monkeypatch.setattr("fltac.server.similarity.BLOCK", 3)
    np.testing.assert_allclose(product_gram(factors), whole, rtol=1e-6)


def test_the_kernel_does_not_see_the_choice_of_factors() -> None:
    """A -> R A, B -> B R^-1 leaves every product as it is."""
    draw = np.random.default_rng(1)
    held = {("a", slot): random_adapter(draw) for slot in range(4)}
    turned = {}
    for key, tensors in held.items():
        turn = draw.normal(size=(2, 2)) + 2 * np.eye(2)
        turned[key] = dict(tensors)
        for module in "mn":
            turned[key][f"{module}.lora_A"] = (turn @ tensors[f"{module}.lora_A"]).astype(np.float32)
            turned[key][f"{module}.lora_B"] = (tensors[f"{module}.lora_B"] @ np.linalg.inv(turn)).astype(np.float32)
    np.testing.assert_allclose(kernel(held, list(held), True), kernel(turned, list(held), True), atol=1e-4)
    before, after = flattened(list(held.values()), False), flattened(list(turned.values()), False)
    assert np.abs(before - after).max() > 0.1


def test_kernel_is_the_mean_cosine_of_the_matrices_plus_that_of_the_heads() -> None:
    draw = np.random.default_rng(2)
    held = {("a", 0): random_adapter(draw), ("b", 0): random_adapter(draw, rank=3)}
    x, y = held.values()
    matrices = [plain_cosine(product(x, module), product(y, module)) for module in "mn"]
    heads = [np.concatenate([item["head.2.bias"], item["head.2.weight"].ravel()]) for item in (x, y)]
    assert kernel(held, list(held), False)[0, 1] == pytest.approx(np.mean(matrices), abs=1e-5)
    assert kernel(held, list(held), True)[0, 1] == pytest.approx(np.mean(matrices) + plain_cosine(*heads), abs=1e-5)
    np.testing.assert_allclose(np.diag(kernel(held, list(held), True)), 2.0, atol=1e-5)


def test_a_loud_matrix_does_not_decide() -> None:
    draw = np.random.default_rng(3)
    held = {("a", slot): random_adapter(draw) for slot in range(3)}
    loud = {key: {**item, "m.lora_B": item["m.lora_B"] * np.float32(1000)} for key, item in held.items()}
    np.testing.assert_allclose(kernel(held, list(held), True), kernel(loud, list(held), True), atol=1e-5)


def test_heads_of_other_shapes_are_at_right_angles() -> None:
    draw = np.random.default_rng(4)
    held = {("a", 0): random_adapter(draw), ("b", 0): random_adapter(draw, key="3")}
    with_heads, without = (kernel(held, list(held), head)[0, 1] for head in (True, False))
    assert with_heads == pytest.approx(without)


def test_a_slot_that_learned_nothing_is_similar_to_nobody() -> None:
    draw = np.random.default_rng(5)
    silent = {name: np.zeros_like(tensor) for name, tensor in random_adapter(draw).items()}
    found = kernel({("a", 0): random_adapter(draw), ("b", 0): silent}, [("a", 0), ("b", 0)], True)
    assert np.isfinite(found).all()
    assert list(found[1]) == [0.0, 0.0]


def test_learned_is_the_difference_of_the_products() -> None:
    draw = np.random.default_rng(6)
    before, after = random_adapter(draw), random_adapter(draw)
    change = learned(before, after)
    for module in "mn":
        expected = product(after, module) - product(before, module)
        np.testing.assert_allclose(product(change, module), expected, atol=1e-5)
    np.testing.assert_allclose(change["head.2.bias"], after["head.2.bias"] - before["head.2.bias"])
    assert set(learned({k: v for k, v in before.items() if "head" not in k}, after)) == set(after)


def test_accumulated_sums_with_decay_and_stays_exact_up_to_the_limit() -> None:
    draw = np.random.default_rng(7)
    memory: Adapter | None = None
    expected = {module: np.zeros_like(product(random_adapter(draw), module)) for module in "mn"}
    head = np.zeros((2, 4))
    for _ in range(12):  # rank 2 each: 24 in the end, more than 3 x 6 and 4 x 5 can have
        change = random_adapter(draw)
        memory = accumulated(memory, change, 0.5)
        head = 0.5 * head + change["head.2.weight"]
        for module, total in expected.items():
            expected[module] = 0.5 * total + product(change, module)
    assert memory is not None
    for module, total in expected.items():
        assert len(memory[f"{module}.lora_A"]) <= RANK_LIMIT
        np.testing.assert_allclose(product(memory, module), total, atol=1e-4)
    np.testing.assert_allclose(memory["head.2.weight"], head, atol=1e-5)


def test_truncated_is_the_best_approximation() -> None:
    draw = np.random.default_rng(8)
    a, b = draw.normal(size=(6, 9)).astype(np.float32), draw.normal(size=(7, 6)).astype(np.float32)
    short_a, short_b = truncated(a, b, 2)
    assert short_a.shape == (2, 9)
    assert short_b.shape == (7, 2)
    singular = np.linalg.svd(b @ a, compute_uv=False)
    error = np.linalg.norm(b @ a - short_b @ short_a)
    assert error == pytest.approx(np.sqrt((singular[2:] ** 2).sum()), rel=1e-4)


def test_embedding_of_a_kernel_of_that_rank_is_exact() -> None:
    rows = np.random.default_rng(9).normal(size=(6, 3))
    points = embedding(rows @ rows.T, 3)
    np.testing.assert_allclose(points @ points.T, rows @ rows.T, atol=1e-9)
    assert embedding(rows @ rows.T, 99).shape == (6, 6)


def test_cosine_by_hand() -> None:
    np.testing.assert_allclose(cosine(np.array([[4.0, 3.0], [3.0, 9.0]])), [[1.0, 0.5], [0.5, 1.0]])


def test_flattened_keeps_the_order_of_names_and_fills_missing_heads() -> None:
    rows = flattened([adapter(1, 2, 3), adapter(4, 5, 6, key="1", outputs=1)], head=False)
    np.testing.assert_array_equal(rows, [[1, 1, 1, 2, 2], [4, 4, 4, 5, 5]])
    rows = flattened([adapter(1, 2, 3), adapter(4, 5, 6, key="1", outputs=1)], head=True)
    assert rows.shape == (2, 5 + 4 + 8)
    assert list(rows[0][:4]) == [0, 0, 0, 0]
