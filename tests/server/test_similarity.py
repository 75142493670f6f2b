"""The kernel of sketches against the kernel of formed products; the embedding against an eigendecomposition."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fltac.records import Adapter, ServerState
from fltac.server import changes, similarity, spectrum
from fltac.server.changes import Changes, remember
from fltac.server.clustering import group
from fltac.server.similarity import Features, distance_sketches, flattened, kernel, views
from fltac.server.spectrum import by_landmarks, embedding, principal
from server.builders import adapter, planted, update
from server.reference import changes_of_a, exact_kernel, exact_kernel_of_a, products


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


def zeros(like: Adapter) -> Adapter:
    return {name: np.zeros_like(tensor) for name, tensor in like.items()}


def learned(adapters: Sequence[Adapter], initial: Adapter | None = None, of_a: bool = False) -> Changes:
    """What slots have learned that went from ``initial``, or from zero, to these adapters."""
    if initial is None:
        initial = zeros({name: tensor for item in adapters for name, tensor in item.items()})
    updates = [update("a", slot, item) for slot, item in enumerate(adapters)]
    began = {update.key: initial for update in updates}
    return remember(ServerState(0, initial, ("a",)), updates, began, 1.0, 0, of_a)


@given(rank=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 99), head=st.booleans())
def test_the_kernel_of_small_matrices_is_exact(rank: int, n: int, seed: int, head: bool) -> None:
    draw = np.random.default_rng(seed)
    initial = random_adapter(draw, rank)
    held = [random_adapter(draw, rank) for _ in range(n)]
    expected = exact_kernel([products(initial, item) for item in held], head)
    np.testing.assert_allclose(kernel(learned(held, initial), head), expected, atol=1e-5)


@given(rank=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 99), head=st.booleans())
def test_the_kernel_of_a_is_exact_where_nothing_is_sketched(rank: int, n: int, seed: int, head: bool) -> None:
    draw = np.random.default_rng(seed)
    initial = random_adapter(draw, rank)
    held = [random_adapter(draw, rank, "3" if slot % 3 == 2 else "2") for slot in range(n)]
    initial |= random_adapter(draw, rank, "3")
    expected = exact_kernel_of_a([changes_of_a(initial, item) for item in held], head)
    np.testing.assert_allclose(kernel(learned(held, initial, of_a=True), head), expected, atol=1e-5)


def test_the_kernel_of_a_does_not_see_which_way_labels_push() -> None:
    """A slot that learned the same with all signs turned is the same; with products it is the opposite."""
    draw = np.random.default_rng(2)
    item = random_adapter(draw)
    other = {name: -tensor for name, tensor in item.items()}
    found = kernel(learned([item, other], of_a=True), True)
    np.testing.assert_allclose(found, np.full((2, 2), 1.5), atol=1e-5)
    turned = {name: -tensor if ".lora_B" in name or "head" in name else tensor for name, tensor in item.items()}
    np.testing.assert_allclose(kernel(learned([item, turned]), True)[0, 1], -2.0, atol=1e-5)
    np.testing.assert_allclose(kernel(learned([item, turned], of_a=True), True)[0, 1], 1.5, atol=1e-5)


@pytest.mark.parametrize("width", [512, 2048])
def test_the_kernel_of_sketches_has_the_error_that_is_promised(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Two matrices of 96 x 96 and a head that fits; the mean of two cosines is right to sqrt(2 / (2 * width))."""
    monkeypatch.setattr(changes, "WIDEST", width)
    draw = np.random.default_rng(0)
    shapes = {"m.lora_A": (2, 96), "m.lora_B": (96, 2), "n.lora_A": (2, 96), "n.lora_B": (96, 2)}
    shapes |= {"head.2.weight": (2, 96), "head.2.bias": (2,)}
    base = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moved = [
        {n: t + np.float32(0.3) * draw.normal(size=t.shape).astype(np.float32) for n, t in base.items()}
        for _ in range(30)
    ]
    found = kernel(learned(moved, base), True)
    expected = exact_kernel([products(base, item) for item in moved], True)
    errors = (found - expected)[np.triu_indices(30, 1)]
    assert 0.3 * width**-0.5 < errors.std() < 1.3 * width**-0.5
    np.testing.assert_allclose(np.diag(found), 2.0, atol=1e-5)


def test_sketches_of_long_changes_of_a_are_off_by_little_more_than_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its sign an error does not average out: unrelated slots seem alike by about sqrt(2 / (pi * width))."""
    width = 512
    monkeypatch.setattr(changes, "WIDEST", width)
    draw = np.random.default_rng(0)
    shapes = {f"{name}.lora_A": (8, 384) for name in "mnop"} | {f"{name}.lora_B": (4, 8) for name in "mnop"}
    base = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    moved = [{n: t + draw.normal(size=t.shape).astype(np.float32) for n, t in base.items()} for _ in range(20)]
    found = kernel(learned(moved, base, of_a=True), False)
    exact = exact_kernel_of_a([changes_of_a(base, item) for item in moved], False)
    pairs = np.triu_indices(20, 1)
    assert exact[pairs].mean() < found[pairs].mean() < exact[pairs].mean() + (2 / np.pi / width) ** 0.5
    np.testing.assert_allclose(np.diag(found), 1.0, atol=1e-5)


def test_a_small_change_of_large_factors_keeps_its_direction() -> None:
    """The change is three parts in ten thousand of the factors; its cosine must not drown in rounding."""
    draw = np.random.default_rng(0)
    base = random_adapter(draw)
    moved = [
        {name: t + np.float32(3e-4) * draw.normal(size=t.shape).astype(np.float32) for name, t in base.items()}
        for _ in range(4)
    ]
    expected = exact_kernel([products(base, item) for item in moved], True)
    np.testing.assert_allclose(kernel(learned(moved, base), True), expected, atol=1e-4)


def test_the_kernel_does_not_see_the_choice_of_factors() -> None:
    """A -> R A, B -> B R^-1 leaves every product as it is."""
    draw = np.random.default_rng(1)
    held = [random_adapter(draw) for _ in range(4)]
    turned = []
    for tensors in held:
        turn = draw.normal(size=(2, 2)) + 2 * np.eye(2)
        item = dict(tensors)
        for module in "mn":
            item[f"{module}.lora_A"] = (turn @ tensors[f"{module}.lora_A"]).astype(np.float32)
            item[f"{module}.lora_B"] = (tensors[f"{module}.lora_B"] @ np.linalg.inv(turn)).astype(np.float32)
        turned.append(item)
    np.testing.assert_allclose(kernel(learned(held), True), kernel(learned(turned), True), atol=1e-4)
    before, after = flattened(held, False), flattened(turned, False)
    assert np.abs(before - after).max() > 0.1


def test_a_loud_matrix_does_not_decide() -> None:
    draw = np.random.default_rng(3)
    held = [random_adapter(draw) for _ in range(3)]
    loud = [{**item, "m.lora_B": item["m.lora_B"] * np.float32(1000)} for item in held]
    np.testing.assert_allclose(kernel(learned(held), True), kernel(learned(loud), True), atol=1e-5)


def test_heads_of_other_shapes_are_at_right_angles() -> None:
    draw = np.random.default_rng(4)
    found = learned([random_adapter(draw), random_adapter(draw, key="3")])
    assert kernel(found, True)[0, 1] == pytest.approx(kernel(found, False)[0, 1])
    np.testing.assert_allclose(np.diag(kernel(found, True)), 2.0, atol=1e-5)


def test_a_slot_that_learned_nothing_is_similar_to_nobody() -> None:
    item = random_adapter(np.random.default_rng(5))
    found = kernel(learned([item, zeros(item)]), True)
    assert np.isfinite(found).all()
    assert list(found[1]) == [0.0, 0.0]


def planted_changes(clients: int, of_a: bool = False) -> tuple[Changes, int]:
    updates, truth = planted(clients, 3, noise=1.0)
    return learned([item.adapter for item in updates], of_a=of_a), len(truth)


@pytest.mark.parametrize("block", [7, 60])
def test_many_slots_are_placed_by_their_similarity_to_a_sample(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """A sample of as many as there are is the eigendecomposition; one of half keeps the tasks apart."""
    updates, truth = planted(40, 3)
    found = learned([item.adapter for item in updates], of_a=True)
    expected = embedding(found, True, 3, seed=0)
    features = Features(found, True)
    owners = [client for client, _ in found.keys]
    monkeypatch.setattr(spectrum, "WHOLE", len(truth))
    points = by_landmarks(features, owners, 3, seed=0)
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=1e-5)
    monkeypatch.setattr(spectrum, "WHOLE", block)
    points = embedding(found, True, 3, seed=0)
    np.testing.assert_array_equal(points, by_landmarks(features, owners, 3, seed=0))
    assert points.shape == expected.shape
    owners = [item.client for item in updates]
    assert adjusted_rand_score(truth, group(points, 3, owners, 20, 0)) == 1.0


def test_embedding_is_the_truncated_eigendecomposition() -> None:
    found, n = planted_changes(5)
    exact = kernel(found, True)
    values, vectors = np.linalg.eigh(exact)
    points = embedding(found, True, 3, seed=0)
    top = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    np.testing.assert_allclose(points @ points.T, top, atol=1e-9)
    assert embedding(found, True, 99, seed=0).shape == (n, n)


@pytest.mark.parametrize("block", [1, 1000, 2**18])
def test_the_embedding_of_many_slots_is_that_of_few(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    found, _ = planted_changes(40)
    expected = embedding(found, True, 4, seed=0)
    monkeypatch.setattr(spectrum, "WHOLE", 0)
    monkeypatch.setattr(similarity, "BLOCK", block)
    points = embedding(found, True, 4, seed=0)
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=2e-3)
    np.testing.assert_array_equal(points, principal(Features(found, True), 4, seed=0))


def test_rows_of_a_block_are_those_of_the_whole() -> None:
    draw = np.random.default_rng(8)
    held = [random_adapter(draw, key=key) for key in ("2", "3", "3", "2", "3")]
    features = Features(learned(held), True)
    whole = features.block(0, 5)
    np.testing.assert_array_equal(np.concatenate([features.block(0, 2), features.block(2, 5)]), whole)
    np.testing.assert_allclose((whole**2).sum(axis=1), 2.0, atol=1e-5)


def test_flattened_keeps_the_order_of_names_and_fills_missing_heads() -> None:
    rows = flattened([adapter(1, 2, 3), adapter(4, 5, 6, key="1", outputs=1)], head=False)
    np.testing.assert_array_equal(rows, [[1, 1, 1, 2, 2], [4, 4, 4, 5, 5]])
    rows = flattened([adapter(1, 2, 3), adapter(4, 5, 6, key="1", outputs=1)], head=True)
    assert rows.shape == (2, 5 + 4 + 8)
    assert list(rows[0][:4]) == [0, 0, 0, 0]


def test_sketches_of_many_flattened_adapters_are_as_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(9)
    held = [{"m.lora_A": draw.normal(size=(1, 3000)).astype(np.float32)} for _ in range(20)]
    exact = distance_sketches(held, False, 0)
    np.testing.assert_array_equal(exact, flattened(held, False))
    monkeypatch.setattr(similarity, "WHOLE", 5)
    sketches = distance_sketches(held, False, 0)
    assert sketches.shape == (20, similarity.DISTANCE_WIDTH)
    pairs = np.triu_indices(20, 1)
    distances = [((rows[pairs[0]] - rows[pairs[1]]) ** 2).sum(axis=1) for rows in (sketches, exact)]
    ratio = distances[0] / distances[1]
    assert 0.9 < ratio.min() < 0.999
    assert 1.001 < ratio.max() < 1.1


def test_views_are_kernels_of_different_parts() -> None:
    draw = np.random.default_rng(4)
    initial = random_adapter(draw)
    held = [random_adapter(draw) for _ in range(5)]
    each = [products(initial, item) for item in held]

    def part(*names: str) -> np.ndarray:
        return sum(exact_kernel([{"x": change[name]} for change in each], False) for name in names)  # type: ignore[return-value]

    found = views(learned(held, initial), True)
    expected = [(("m", "head.2"), ("n",)), (("n", "head.2"), ("m",)), (("m", "n"), ("head.2",))]
    for (by, within), (own, other), share in zip(found, expected, (1, 1, 2), strict=True):
        np.testing.assert_allclose(by, part(*own) / share, atol=1e-5)
        np.testing.assert_allclose(within, part(*other), atol=1e-5)
    without = views(learned(held, initial), False)
    assert len(without) == 2
    np.testing.assert_allclose(without[0][0], part("m"), atol=1e-5)
    np.testing.assert_allclose(without[0][1], part("n"), atol=1e-5)


def test_a_single_part_is_both_views() -> None:
    one = learned([adapter(1, 2), adapter(3, 4), adapter(5, -1)])
    (by, within), *more = views(one, False)
    assert not more
    np.testing.assert_allclose(by, kernel(one, False))
    np.testing.assert_allclose(within, by)


def test_changes_of_some_slots_are_those_of_these_slots_alone() -> None:
    draw = np.random.default_rng(5)
    held = [random_adapter(draw, key=key) for key in ("2", "3", "2", "3", "2")]
    some = np.array([0, 1, 4])
    whole = learned(held)
    np.testing.assert_allclose(kernel(whole.only(some), True), kernel(whole, True)[np.ix_(some, some)], atol=1e-6)
    assert whole.only(some).keys == tuple(whole.keys[row] for row in some)
    assert set(whole.only(np.array([1, 3])).heads) == {"3"}
