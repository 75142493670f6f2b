"""K-means against scikit-learn, the constrained assignment against all permutations."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import adjusted_rand_score, silhouette_score

from fltac.server import clustering
from fltac.server.clustering import assign_distinct, first_centres, group, silhouette, squared_distances, teams_of


def blobs(seed: int = 0, owners: int = 6, k: int = 3, spread: float = 0.2) -> tuple[np.ndarray, list[str], list[int]]:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(k, 4))
    points = [centres[task] + spread * draw.normal(size=4) for _ in range(owners) for task in range(k)]
    return np.array(points), [f"c{owner}" for owner in range(owners) for _ in range(k)], list(range(k)) * owners


def test_plain_is_scikit_learn() -> None:
    points, _, _ = blobs()
    expected = KMeans(3, n_init=7, random_state=5).fit_predict(points)
    assert adjusted_rand_score(expected, group(points, 3, None, 7, 5)) == 1.0


def test_iterations_without_clients_are_scikit_learns() -> None:
    points, _, _ = blobs(owners=40, spread=0.8)
    starts = first_centres(points, 3, 5, 0)
    for start, labels, objective in zip(starts, *clustering._lloyd(points, starts, ()), strict=True):
        expected = KMeans(3, init=start, n_init=1, tol=0, algorithm="lloyd").fit(points)
        np.testing.assert_array_equal(labels, expected.labels_)
        assert objective == pytest.approx(expected.inertia_)


def test_starts_side_by_side_are_each_alone() -> None:
    """With clients of one, two and three slots, so that teams of all sizes are matched in each start."""
    points, _, _ = blobs(owners=40, spread=2.0)
    teams = clustering.teams_of(
        [f"c{number // 3 if number < 60 else number // 2 + number % 5}" for number in range(120)]
    )
    assert len(teams) > 1
    starts = first_centres(points, 3, 6, 1)
    together = clustering._lloyd(points, starts, teams)
    assert len({labels.tobytes() for labels in together[0]}) > 1
    for number in range(len(starts)):
        labels, sums = clustering._lloyd(points, starts[number : number + 1], teams)
        np.testing.assert_array_equal(labels[0], together[0][number])
        assert sums[0] == pytest.approx(together[1][number])


def test_first_centres_leave_as_little_as_scikit_learns() -> None:
    points, state = np.random.default_rng(0).normal(size=(200, 6)), np.random.RandomState(0)
    ours = [squared_distances(points, centres).min(axis=1).sum() for centres in first_centres(points, 6, 400, 0)]
    theirs = [
        squared_distances(points, kmeans_plusplus(points, 6, random_state=state)[0]).min(axis=1).sum()
        for _ in range(400)
    ]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.015)  # one standard error is .004
    drawn = np.mean([squared_distances(points, points[state.permutation(200)[:6]]).min(axis=1).sum() for _ in ours])
    assert np.mean(ours) < 0.97 * drawn


def test_the_second_centre_by_hand() -> None:
    """The better of two points, each drawn by its squared distance; at a tie that which was drawn first."""
    points, starts = np.array([[0.0], [3.0], [4.0]]), 30_000
    pairs = first_centres(points, 2, starts, 0)[:, :, 0]
    expected = {
        (0, 3): 9 / 25,
        (0, 4): 16 / 25,
        (3, 0): 1 - 0.1**2,
        (3, 4): 0.1**2,
        (4, 0): 1 - (1 / 17) ** 2,
        (4, 3): (1 / 17) ** 2,
    }
    for (first, second), share in expected.items():
        found = ((pairs[:, 0] == first) & (pairs[:, 1] == second)).mean()
        assert found == pytest.approx(share / 3, abs=0.012)  # four standard errors
    assert set(map(tuple, pairs.tolist())) <= set(expected)


def test_first_centres_of_points_that_are_all_alike() -> None:
    assert (first_centres(np.ones((5, 2)), 3, 4, 0) == 1).all()


def test_cannot_link_repairs_what_plain_k_means_confuses() -> None:
    """Two of three centres overlap; only whose the points are tells them apart. Mean ARI of eight draws."""
    centres = np.array([[0.0, 0.0], [0.6, 0.0], [9.0, 0.0]])
    owners, truth = [str(index // 3) for index in range(36)], [index % 3 for index in range(36)]
    plain, linked = [], []
    for seed in range(8):
        draw = np.random.default_rng(seed)
        points = np.array([centres[task] + 0.3 * draw.normal(size=2) for task in truth])
        plain.append(adjusted_rand_score(truth, group(points, 3, None, 20, 0)))
        linked.append(adjusted_rand_score(truth, group(points, 3, owners, 20, 0)))
    assert np.mean(linked) > np.mean(plain) + 0.1


@given(seed=st.integers(0, 50), n=st.integers(1, 4), k=st.integers(1, 4))
def test_assignment_is_the_cheapest_of_all(seed: int, n: int, k: int) -> None:
    costs = np.random.default_rng(seed).random((n, k))
    labels = assign_distinct(costs, [np.arange(n)[None]])
    capacity = -(-n // k)
    best = min(
        sum(costs[row, column % k] for row, column in enumerate(columns))
        for columns in permutations(range(k * capacity), n)
    )
    assert costs[np.arange(n), labels].sum() == pytest.approx(best)
    assert np.bincount(labels).max() <= capacity


@pytest.mark.parametrize("k", [5, 9])
@pytest.mark.parametrize("block", [1, 2**18])
def test_many_clients_at_once_are_assigned_as_one_by_one(monkeypatch: pytest.MonkeyPatch, k: int, block: int) -> None:
    """Clients of all sizes, some with more points than clusters; with nine clusters not every way is compared."""
    monkeypatch.setattr(clustering, "BLOCK", block * 720)
    draw = np.random.default_rng(0)
    owners = [f"c{owner}" for owner, count in enumerate(draw.integers(1, k + 3, 60)) for _ in range(count)]
    order = draw.permutation(len(owners))
    names, costs = [owners[index] for index in order], draw.random((len(owners), k))
    labels = assign_distinct(costs, teams_of(names))
    for owner in set(names):
        rows = np.flatnonzero(np.array(names) == owner)
        own = np.tile(costs[rows], (1, -(-len(rows) // k)))
        np.testing.assert_array_equal(labels[rows], linear_sum_assignment(own)[1] % k)


def test_points_of_an_owner_stay_together() -> None:
    teams = teams_of(["b", "a", "b", "c", "a", "a"])
    assert [team.tolist() for team in teams] == [[[3]], [[0, 2]], [[1, 4, 5]]]


@pytest.mark.parametrize("linked", [False, True])
def test_many_points_are_grouped_as_few_are(monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    """Starts tried on a sample end where starts tried on all points end."""
    points, owners, truth = blobs(owners=200, spread=0.5)
    expected = group(points, 3, owners if linked else None, 20, 0)
    assert adjusted_rand_score(truth, expected) > 0.3
    monkeypatch.setattr(clustering, "SAMPLE", 100)
    found = group(points, 3, owners if linked else None, 20, 0)
    assert adjusted_rand_score(expected, found) > 0.98  # scikit-learn stops a little before the last point moves


def test_a_sample_has_all_points_of_an_owner() -> None:
    owners = [f"c{owner}" for owner in range(20) for _ in range(3)]
    rows = clustering.sample(60, owners, 0, 10)
    assert len(rows) == 12
    assert set(np.bincount(rows // 3)) == {0, 3}
    assert len(clustering.sample(60, None, 0, 10)) == 10


def test_slots_of_a_client_fall_into_different_clusters() -> None:
    points, owners, truth = blobs(spread=5.0)
    labels = group(points, 3, owners, 5, 0)
    for owner in set(owners):
        own = [label for label, name in zip(labels, owners, strict=True) if name == owner]
        assert len(set(own)) == len(own)
    assert len(truth) == len(labels)


def test_more_slots_than_clusters_share_them_evenly() -> None:
    points = np.random.default_rng(1).normal(size=(12, 2))
    labels = group(points, 2, ["a"] * 5 + ["b"] * 7, 3, 0)
    assert np.bincount(labels[:5]).max() == 3
    assert np.bincount(labels[5:]).max() == 4


def test_the_order_of_the_points_does_not_matter() -> None:
    points, owners, _ = blobs(seed=3)
    order = np.random.default_rng(0).permutation(len(points))
    straight = group(points, 3, owners, 10, 0)
    shuffled = group(points[order], 3, [owners[index] for index in order], 10, 0)
    assert adjusted_rand_score(straight[order], shuffled) == 1.0


def test_fewer_points_than_clusters_are_each_alone() -> None:
    assert list(group(np.ones((2, 3)), 5, ["a", "a"], 3, 0)) == [0, 1]
    assert list(group(np.ones((3, 3)), 3, None, 3, 0)) == [0, 1, 2]


@pytest.mark.parametrize("owners", [None, ["a", "a", "b", "b", "c"]])
def test_points_that_are_all_alike(owners: list[str] | None) -> None:
    labels = group(np.zeros((5, 3)), 2, owners, 3, 0)
    assert set(labels) <= {0, 1}
    if owners:
        assert labels[0] != labels[1]
        assert labels[2] != labels[3]


def test_distances_by_hand() -> None:
    found = squared_distances(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(found, [[25.0], [0.0]])


def test_silhouette_where_it_is_not_defined() -> None:
    points = np.array([[0.0], [1.0], [9.0]])
    assert silhouette(points, np.array([0, 0, 0]), 0) is None
    assert silhouette(points, np.array([0, 1, 2]), 0) is None
    # By hand: a = 1, b = 9 or 8; the single point counts 0.
    assert silhouette(points, np.array([0, 0, 1]), 0) == pytest.approx((8 / 9 + 7 / 8) / 3)


def test_silhouette_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _, truth = blobs(owners=100, spread=0.5)
    labels = np.array(truth)
    labels[0] = 7  # alone in its cluster
    expected = silhouette_score(points, labels)
    assert silhouette(points, labels, 0) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(clustering, "SAMPLE", 150)
    monkeypatch.setattr(clustering, "BLOCK", 1000)
    sampled = silhouette(points, labels, 0)
    assert sampled == pytest.approx(expected, abs=0.05)
    assert sampled != pytest.approx(expected, abs=1e-9)


def test_the_grouping_before_stays_unless_another_is_better_by_the_share() -> None:
    points = np.array([[0.0], [0.2], [1.0], [1.2], [0.55]])
    before, found = np.array([7, 7, 9, 9, 9]), np.array([0, 0, 1, 1, 0])
    # Sums of squares by hand: {0, .2}, {1, 1.2, .55} is .02 + .22167; {0, .2, .55}, {1, 1.2} is .155 + .02.
    assert clustering.keep_or_move(points, before, found, None, 0.2).tolist() == [0, 0, 1, 1, 0]
    assert clustering.keep_or_move(points, before, found, None, 0.4).tolist() == [7, 7, 9, 9, 9]


def test_a_newcomer_joins_the_grouping_that_stays_beside_its_owners_other_slots() -> None:
    points = np.array([[0.0], [0.1], [1.0], [1.1], [0.05]])
    before, found = np.array([3, 3, 5, 5, -1]), np.array([0, 0, 1, 1, 0])
    owners = ["a", "b", "a", "b", "b"]
    assert clustering.keep_or_move(points, before, found, None, 0.5).tolist() == [3, 3, 5, 5, 3]
    # b has a slot in each cluster already: the matching may fill a cluster twice, and takes the nearer one.
    assert clustering.keep_or_move(points, before, found, owners, 0.5).tolist() == [3, 3, 5, 5, 3]
    owners[1] = "c"
    # b holds cluster 5, so its newcomer goes to 3; if b holds 3 alone, it goes to 5 in spite of the distance.
    assert clustering.keep_or_move(points, before, found, owners, 0.5).tolist() == [3, 3, 5, 5, 3]
    owners[1], owners[3] = "b", "c"
    assert clustering.keep_or_move(points, before, found, owners, 0.99).tolist() == [3, 3, 5, 5, 5]


def test_without_a_grouping_before_the_new_one_holds() -> None:
    points = np.array([[0.0], [1.0]])
    found = np.array([0, 1])
    assert clustering.keep_or_move(points, np.array([-1, -1]), found, None, 0.9).tolist() == [0, 1]
