"""The sharpened kernel: against loops and numbers by hand; and what it is for, told with planted slots."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fltac.errors import InputError
from fltac.records import ServerState, Update
from fltac.server import spectrum
from fltac.server.changes import Changes, remember
from fltac.server.clustering import group
from fltac.server.pairing import Pairing, paired
from fltac.server.similarity import kernel
from fltac.server.spectrum import embedding, leading
from server.builders import planted, server


def by_hand(similarity: np.ndarray, owners: list[str], sharpness: float) -> np.ndarray:
    """The same, pair by pair."""
    n = len(owners)
    pairs = [(i, j) for i in range(n) for j in range(n) if owners[i] != owners[j]]
    sums = [max(0.0, sum(similarity[i, j] for j in range(n) if owners[i] != owners[j])) for i in range(n)]
    more = {(i, j): similarity[i, j] - sums[i] * sums[j] / sum(sums) for i, j in pairs}
    unit = math.sqrt(sum(value**2 for value in more.values()) / len(pairs))
    weights = {pair: math.exp(sharpness * value / unit) for pair, value in more.items()}
    found = np.eye(n)
    for i, j in pairs:
        row = 1 + sum(weights[i, other] for other in range(n) if owners[other] == owners[j])
        column = 1 + sum(weights[other, j] for other in range(n) if owners[other] == owners[i])
        found[i, j] = weights[i, j] / math.sqrt(row * column)
    return found


def random_kernel(seed: int, sizes: list[int]) -> tuple[np.ndarray, list[str]]:
    owners = [f"client-{client}" for client, size in enumerate(sizes) for _ in range(size)]
    rows = np.random.default_rng(seed).normal(size=(len(owners), 6))
    return np.abs(rows @ rows.T), owners


@given(st.integers(0, 99), st.lists(st.integers(1, 4), min_size=3, max_size=5), st.floats(0.1, 4))
def test_each_pair_is_what_the_sums_written_out_say(seed: int, sizes: list[int], sharpness: float) -> None:
    similarity, owners = random_kernel(seed, sizes)
    found = paired(similarity, owners, sharpness)
    np.testing.assert_allclose(found, by_hand(similarity, owners, sharpness), atol=1e-9)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert found.min() >= 0
    assert found.max() <= 1


def test_four_slots_by_hand() -> None:
    """Two clients of two slots; all sums are 1/2, so 1/8 is expected: 3/8 more or 1/8 less, in rms root(5)/8."""
    similarity = np.array([[9, 9, 0.5, 0], [9, 9, 0, 0.5], [0.5, 0, 9, 9], [0, 0.5, 9, 9]])
    high, low = math.exp(3 / math.sqrt(5)), math.exp(-1 / math.sqrt(5))
    first, second = high / (1 + high + low), low / (1 + high + low)
    expected = [[1, 0, first, second], [0, 1, second, first], [first, second, 1, 0], [second, first, 0, 1]]
    np.testing.assert_allclose(paired(similarity, ["a", "a", "b", "b"], 1.0), expected, atol=1e-12)


def test_what_a_client_says_of_its_own_slots_does_not_count() -> None:
    similarity, owners = random_kernel(3, [3, 2, 4])
    own = np.array(owners)[:, None] == np.array(owners)
    loud = np.where(own, 100.0, similarity)
    np.testing.assert_array_equal(paired(similarity, owners, 1.5), paired(loud, owners, 1.5))


def test_a_slot_that_is_like_all_others_is_nobodys_partner() -> None:
    """Three clients: x of each are alike, and a client's y is a bit like everything. Alone, y is nearer to the x."""
    owners = ["a", "a", "b", "b", "c", "c"]
    loud = np.array([1, 0.2, 1, 0.2, 1, 0.2])
    similarity = 0.5 * np.outer(loud, loud)
    similarity[np.ix_([1, 3, 5], [1, 3, 5])] += 0.05
    found = paired(similarity, owners, 1.5)
    assert similarity[1, 2] > similarity[1, 3], "as it is, y of a is nearer to x of b than to y of b"
    assert found[1, 3] > 2 * found[1, 2]


@pytest.mark.parametrize(
    ("similarity", "owners"),
    [
        (np.ones((3, 3)), ["a", "a", "a"]),
        (np.zeros((4, 4)), ["a", "a", "b", "b"]),
        (np.ones((1, 1)), ["a"]),
        (-np.ones((4, 4)), ["a", "a", "b", "b"]),
    ],
)
def test_where_nothing_can_be_sharpened_similarities_stay_as_they_are(
    similarity: np.ndarray, owners: list[str]
) -> None:
    assert not Pairing(similarity, owners, 1.5).works
    assert paired(similarity, owners, 1.5) is similarity


def test_without_sharpness_similarities_stay_as_they_are() -> None:
    similarity, owners = random_kernel(0, [2, 2])
    assert paired(similarity, owners, 0.0) is similarity


def test_a_very_loud_pair_does_not_overflow() -> None:
    similarity, owners = random_kernel(0, [2, 2, 2])
    similarity[0, 2] = similarity[2, 0] = 1e30
    found = paired(similarity, owners, 100.0)
    assert np.isfinite(found).all()
    assert found[0, 2] == pytest.approx(1.0)


def learned(updates: Sequence[Update], *, nothing: bool = False) -> Changes:
    """What slots learned that began at zero, or where they are."""
    zero = {name: np.zeros_like(tensor) for name, tensor in updates[0].adapter.items()}
    first = ServerState(0, zero, tuple(sorted({item.client for item in updates})))
    began = {item.key: item.adapter if nothing else zero for item in updates}
    return remember(first, updates, began, 1.0, 0, of_a=True)


def many(clients: int, noise: float, seed: int = 0) -> tuple[Changes, list[int], list[str]]:
    """Slots of four tasks, their truth and their owners."""
    updates, truth = planted(clients, 4, seed=seed, noise=noise, features=24)
    order = sorted(range(len(updates)), key=lambda row: updates[row].key)
    found = learned(updates)
    return found, [truth[row] for row in order], [client for client, _ in found.keys]


def test_slots_are_told_apart_more_often() -> None:
    """The same embedding of the same noisy slots, with and without; the mean over draws."""
    plain, sharp = [], []
    for seed in range(10):
        changes, truth, owners = many(12, 2.0, seed)
        for found, sharpness in ((plain, 0.0), (sharp, 1.5)):
            points = embedding(changes, True, 6, 0, 1.0, sharpness)
            found.append(adjusted_rand_score(truth, group(points, 4, owners, 20, 0)))
    assert np.mean(sharp) > np.mean(plain) + 0.04


def test_of_many_slots_those_of_whole_clients_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all as landmarks it is the eigendecomposition; with half of them the tasks are still told apart."""
    changes, truth, owners = many(30, 0.7)
    n = len(owners)
    exact = embedding(changes, True, 6, 0, 1.0, 1.5)
    np.testing.assert_allclose(
        exact @ exact.T, (whole := leading(paired(kernel(changes, True), owners, 1.5), 6)) @ whole.T
    )
    features = spectrum.Features(changes, True)
    monkeypatch.setattr(spectrum, "WHOLE", n)
    points = spectrum.by_landmarks(features, owners, 6, 0, 1.5)
    np.testing.assert_allclose(points @ points.T, exact @ exact.T, atol=1e-6)
    for block in (n // 2, 17):
        monkeypatch.setattr(spectrum, "WHOLE", block)
        points = embedding(changes, True, 6, 0, 1.0, 1.5)
        assert points.shape == exact.shape
        assert adjusted_rand_score(truth, group(points, 4, owners, 20, 0)) > 0.95


def test_of_many_slots_that_learned_nothing_nothing_is_sharpened(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = learned(planted(6, 3)[0], nothing=True)
    monkeypatch.setattr(spectrum, "WHOLE", 9)
    assert not embedding(nothing, True, 5, 0, 1.0, 1.5).any()


def test_without_cannot_link_slots_of_a_client_do_not_compete() -> None:
    with pytest.raises(InputError, match=r"dual_softmax: got 2, but without cannot_link .*; allowed: 0"):
        server("server.clustering.dual_softmax=2", "server.clustering.cannot_link=false")
    assert (
        server("server.clustering.dual_softmax=0", "server.clustering.cannot_link=false").clustering.dual_softmax == 0
    )
