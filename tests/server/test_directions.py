"""Leading directions of several rounds' changes, held against singular value decompositions of all of them."""

import numpy as np
import pytest

from fltac.records import Adapter, ServerState
from fltac.server import spectrum
from fltac.server.changes import Changes, remember
from fltac.server.directions import DIRECTIONS, added, squared_agreement, squared_lengths
from fltac.server.similarity import Features, kernel
from fltac.server.spectrum import by_landmarks, embedding
from server.builders import update
from server.reference import changes_of_a, exact_kernel_of_a

N, WIDTH = 4, 7


def moment(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows.T @ rows)


def rows_of(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.normal(size=shape).astype(np.float32)


def test_up_to_so_many_rounds_nothing_is_lost() -> None:
    rounds = rows_of(np.random.default_rng(0), DIRECTIONS, N, WIDTH)
    held = np.zeros((N, DIRECTIONS, WIDTH), dtype=np.float32)
    for changes in rounds:
        held = added(held, changes)
    for slot in range(N):
        np.testing.assert_allclose(moment(held[slot]), moment(rounds[:, slot]), atol=1e-5)


def test_of_more_rounds_the_leading_directions_are_kept() -> None:
    """The best approximation of that rank of what was held and one change more, as a decomposition finds it."""
    draw = np.random.default_rng(1)
    held, changes = rows_of(draw, N, DIRECTIONS, WIDTH), rows_of(draw, N, WIDTH)
    found = added(held, changes)
    assert found.shape == held.shape
    assert found.dtype == np.float32
    for slot in range(N):
        _, values, right = np.linalg.svd(np.concatenate([held[slot], changes[slot, None]]))
        best = (values[:DIRECTIONS, None] * right[:DIRECTIONS]).astype(np.float64)
        np.testing.assert_allclose(moment(found[slot]), moment(best), atol=1e-4)


def test_a_slot_without_a_past_beside_one_that_has_one() -> None:
    draw = np.random.default_rng(2)
    held, changes = rows_of(draw, 2, DIRECTIONS, WIDTH), rows_of(draw, 2, WIDTH)
    held[1] = 0
    np.testing.assert_allclose(moment(added(held, changes)[1]), moment(changes[1:]), atol=1e-5)
    nothing = added(held, np.zeros_like(changes))
    np.testing.assert_allclose(moment(nothing[0]), moment(held[0]), atol=1e-5)
    assert not nothing[1].any()


def test_agreement_is_that_of_second_moments() -> None:
    draw = np.random.default_rng(3)
    left, right = rows_of(draw, N, DIRECTIONS, WIDTH), rows_of(draw, 3, DIRECTIONS, WIDTH)
    expected = [[np.sum(moment(a) * moment(b)) for b in right] for a in left]
    np.testing.assert_allclose(squared_agreement(left, right), expected, rtol=1e-4)
    np.testing.assert_allclose(squared_lengths(left), np.diag(squared_agreement(left, left)), rtol=1e-5)


def adapter_of(draw: np.random.Generator, key: str = "2") -> Adapter:
    shapes = {"m.lora_A": (2, 5), "m.lora_B": (4, 2), "n.lora_A": (2, 3), "n.lora_B": (6, 2)}
    shapes |= {f"head.{key}.weight": (int(key), 4), f"head.{key}.bias": (int(key),)}
    return {name: rows_of(draw, *shape) for name, shape in shapes.items()}


def remembered(rounds: list[list[Adapter]], initial: Adapter) -> Changes:
    """Slots that begin every round from ``initial`` and end it with these adapters."""
    state = ServerState(0, initial, ("a",))
    for adapters in rounds:
        updates = [update("a", slot, item) for slot, item in enumerate(adapters)]
        found = remember(state, updates, {item.key: initial for item in updates}, 1.0, 0, of_a=True)
        state = ServerState(1, initial, ("a",), memory=found.memory())
    return found


def test_the_kernel_of_two_rounds_is_that_of_their_second_moments() -> None:
    """Formed in float64: the cosine of sums of outer products, rooted; of each matrix, and half of the heads'."""
    draw = np.random.default_rng(4)
    initial = adapter_of(draw) | adapter_of(draw, "3")
    rounds = [[adapter_of(draw, "3" if slot == 2 else "2") for slot in range(N)] for _ in range(2)]
    learned = [[changes_of_a(initial, item) for item in adapters] for adapters in rounds]

    def rooted(name: str) -> np.ndarray:
        moments = [
            sum((np.outer(own[slot][name], own[slot][name]) for own in learned if name in own[slot]), np.zeros(()))
            for slot in range(N)
        ]
        lengths = [np.linalg.norm(item) for item in moments]
        return np.array(
            [
                [(np.sum(a * b) / (x * y)) ** 0.5 if x and y else 0.0 for b, y in zip(moments, lengths, strict=True)]
                for a, x in zip(moments, lengths, strict=True)
            ]
        )

    expected = (rooted("m") + rooted("n")) / 2 + 0.5 * (rooted("head.2") + rooted("head.3"))
    np.testing.assert_allclose(kernel(remembered(rounds, initial), True), expected, atol=1e-4)


@pytest.mark.parametrize("turned", [-1, 1])
def test_a_sign_that_turns_from_round_to_round_says_nothing(turned: int) -> None:
    """Two slots that learn the same in both rounds, one of them the other way in the second: the same to the kernel."""
    draw = np.random.default_rng(5)
    zero = {name: np.zeros_like(tensor) for name, tensor in adapter_of(draw).items()}
    first, second = adapter_of(draw), adapter_of(draw)
    other = {name: turned * tensor for name, tensor in second.items()}
    found = kernel(remembered([[first, first], [second, other]], zero), True)
    np.testing.assert_allclose(found, np.full((2, 2), 1.5), atol=1e-4)


def test_one_round_is_compared_by_absolute_cosines() -> None:
    draw = np.random.default_rng(6)
    initial = adapter_of(draw)
    adapters = [adapter_of(draw) for _ in range(N)]
    expected = exact_kernel_of_a([changes_of_a(initial, item) for item in adapters], True)
    np.testing.assert_allclose(kernel(remembered([adapters], initial), True), expected, atol=1e-5)


def test_memory_is_the_weight_of_earlier_second_moments() -> None:
    draw = np.random.default_rng(7)
    first, second = adapter_of(draw), adapter_of(draw)
    zero = {name: np.zeros_like(tensor) for name, tensor in first.items()}
    state, updates = ServerState(0, zero, ("a",)), [update("a", 0, first)]
    began = {("a", 0): zero}
    one = remember(state, updates, began, 0.25, 0, of_a=True)
    two = remember(
        ServerState(1, zero, ("a",), memory=one.memory()), [update("a", 0, second)], began, 0.25, 0, of_a=True
    )
    before, after = (item["m.lora_A"].reshape(1, -1) for item in (first, second))
    found = moment(two.memory()["a", 0]["body"][:, : before.size])
    np.testing.assert_allclose(found, 0.25 * moment(before) + moment(after), atol=1e-5)


def test_unrelated_slots_seem_alike_by_little_more_than_after_one_round() -> None:
    """Rows as sketches of unrelated long changes are: with all directions of equal length sqrt(3 / width)."""
    width, slots = 512, 40
    rows = rows_of(np.random.default_rng(8), slots, DIRECTIONS, width)
    lengths = squared_lengths(rows) ** 0.5
    alike = np.sqrt(squared_agreement(rows, rows) / np.outer(lengths, lengths))[np.triu_indices(slots, 1)]
    once = (2 / np.pi / width) ** 0.5
    assert 2 * once < alike.mean() < 2.2 * once


def test_a_slot_holds_as_many_directions_as_there_were_rounds_and_no_more() -> None:
    draw = np.random.default_rng(9)
    initial = adapter_of(draw)
    rounds = [[adapter_of(draw) for _ in range(2)] for _ in range(DIRECTIONS + 2)]
    for number in range(1, len(rounds) + 1):
        found = remembered(rounds[:number], initial)
        assert found.body.shape[1] == found.heads["2"].values.shape[1] == min(number, DIRECTIONS)


def test_many_slots_with_several_directions_are_placed_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all slots as landmarks Nystroem's method is the eigendecomposition."""
    draw = np.random.default_rng(10)
    initial = adapter_of(draw)
    found = remembered([[adapter_of(draw) for _ in range(12)] for _ in range(4)], initial)
    expected = embedding(found, True, 5, seed=0)
    monkeypatch.setattr(spectrum, "WHOLE", 12)
    points = by_landmarks(Features(found, True), [client for client, _ in found.keys], 5, seed=0)
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=1e-4)
    monkeypatch.setattr(spectrum, "WHOLE", 11)
    assert embedding(found, True, 5, seed=0).shape == (12, 5)


def test_some_slots_alone_are_compared_as_among_all() -> None:
    draw = np.random.default_rng(11)
    initial = adapter_of(draw)
    found = remembered([[adapter_of(draw) for _ in range(6)] for _ in range(3)], initial)
    few = np.array([1, 4, 5])
    np.testing.assert_allclose(kernel(found.only(few), True), kernel(found, True)[np.ix_(few, few)], atol=1e-5)
