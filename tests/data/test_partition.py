"""How training rows are split over the clients."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fltac.config import Config, load_config
from fltac.data.partition import Partition, make_partition
from fltac.errors import InputError

SPLITS = settings(deadline=None, max_examples=60)
Labels = Mapping[str, NDArray[Any]]


def config_of(clients: int = 10, seed: int = 0, **partition: Any) -> Config:
    federation = {"clients": clients, "seed": seed, "partition": partition}
    tree = {"backbone": {"name": "none"}, "tasks": {"a": {"preset": "sst2"}}, "federation": federation}
    return load_config(tree)


def labels_of(**counts: int) -> Labels:
    """Two classes, one after the other."""
    return {task: np.arange(count, dtype=np.int64) * 2 // count for task, count in counts.items()}


def split(labels: Labels, clients: int = 10, seed: int = 0, **partition: Any) -> Partition:
    return make_partition(config_of(clients, seed, **partition), labels)


def counts_of(partition: Partition, task: str) -> list[int]:
    return [len(partition.rows.get((client, task), ())) for client in partition.clients]


def held_by(partition: Partition, client: str) -> set[str]:
    return {task for owner, task in partition.rows if owner == client}


def plain(partition: Partition) -> dict[Any, Any]:
    rows = {key: value.tolist() for key, value in partition.rows.items()}
    return {"clients": partition.clients, "rows": rows, "slots": dict(partition.slots)}


def assert_each_row_once(partition: Partition, labels: Labels) -> None:
    for task, values in labels.items():
        parts = [rows for (_, held), rows in partition.rows.items() if held == task]
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(values)))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Labels, int, int, dict[str, Any]]:
    labels: dict[str, NDArray[Any]] = {}
    for task in draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)):
        count = draw(st.integers(1, 60))
        if draw(st.booleans()):
            labels[task] = np.array(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
        else:
            seed = draw(st.integers(0, 9))
            labels[task] = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    setting = {
        "rule": draw(st.sampled_from(["dirichlet", "iid", "label-skew"])),
        "alpha": draw(st.sampled_from([1e-3, 0.1, 0.5, 1.0, 100.0])),
        "threshold": draw(st.sampled_from([0.0, 0.01, 0.05])),
    }
    return labels, draw(st.integers(1, 12)), draw(st.integers(0, 10_000)), setting


@SPLITS
@given(situations())
def test_every_row_is_given_out_once(situation: tuple[Labels, int, int, dict[str, Any]]) -> None:
    labels, clients, seed, setting = situation
    partition = split(labels, clients, seed, **setting)
    assert_each_row_once(partition, labels)
    for rows in partition.rows.values():
        assert rows.dtype == np.int64
        assert len(rows) > 0
        assert rows.tolist() == sorted(rows.tolist())
    for client in partition.clients:
        tasks = partition.client_tasks(client)
        assert len(tasks) == len(set(tasks))
        assert set(tasks) == held_by(partition, client)


@SPLITS
@given(situations())
def test_other_tasks_and_their_order_change_nothing(
    situation: tuple[Labels, int, int, dict[str, Any]],
) -> None:
    labels, clients, seed, setting = situation
    together = split(labels, clients, seed, **setting)
    assert plain(split(dict(reversed(list(labels.items()))), clients, seed, **setting)) == plain(together)
    for task, values in labels.items():
        alone = split({task: values}, clients, seed, **setting)
        shared = {key: rows.tolist() for key, rows in together.rows.items() if key[1] == task}
        assert plain(alone)["rows"] == shared


@SPLITS
@given(situations(), st.integers(1, 4))
def test_cap(situation: tuple[Labels, int, int, dict[str, Any]], cap: int) -> None:
    labels, clients, seed, setting = situation
    free = split(labels, clients, seed, **setting)
    try:
        partition = split(labels, clients, seed, **setting, max_tasks_per_client=cap)
    except InputError:
        assert max(len(held_by(free, client)) for client in free.clients) > cap
        return
    assert_each_row_once(partition, labels)
    for client in partition.clients:
        assert held_by(partition, client) <= held_by(free, client)
        assert len(held_by(partition, client)) <= cap
    if all(len(held_by(free, client)) <= cap for client in free.clients):
        assert plain(partition) == plain(free)
    again = split(dict(reversed(list(labels.items()))), clients, seed, **setting, max_tasks_per_client=cap)
    assert plain(again) == plain(partition)


def test_the_seed_decides() -> None:
    labels = labels_of(a=100)
    assert plain(split(labels, seed=1)) == plain(split(labels, seed=1))
    assert plain(split(labels, seed=1)) != plain(split(labels, seed=2))
    twins = split(labels_of(a=100, b=100), seed=1)
    assert counts_of(twins, "a") != counts_of(twins, "b")
    assert split(labels, 2, seed=1, rule="iid").rows["client-0", "a"].tolist() != list(range(50))


@pytest.mark.parametrize(
    ("clients", "first", "last"),
    [(1, "client-0", "client-0"), (10, "client-0", "client-9"), (12, "client-00", "client-11")],
)
def test_string_order_of_the_ids_is_their_order(clients: int, first: str, last: str) -> None:
    ids = split(labels_of(a=20), clients).clients
    assert (len(ids), ids[0], ids[-1]) == (clients, first, last)
    assert list(ids) == sorted(ids)


def test_iid_shares_are_equal() -> None:
    partition = split(labels_of(a=20, b=11, c=2), 4, rule="iid", threshold=0.5)
    assert counts_of(partition, "a") == [5, 5, 5, 5]
    assert counts_of(partition, "b") == [3, 3, 3, 2]
    assert counts_of(partition, "c") == [1, 1, 0, 0]
    assert held_by(partition, "client-2") == {"a", "b"}


def test_table() -> None:
    table = {"y": {"a": 0.5, "b": 0.29}, "x": {"a": 0.3, "b": 0.0}, "z": {}, "w": {"a": 0.01}}
    partition = split(labels_of(a=10, b=100), 99, rule="table", table=table, threshold=0.4)
    assert partition.clients == ("w", "x", "y", "z")
    assert counts_of(partition, "a") == [0, 3, 5, 0]
    assert counts_of(partition, "b") == [0, 0, 29, 0]
    assert set(partition.client_tasks("y")) == {"a", "b"}
    assert partition.client_tasks("x") == ["a"]
    assert partition.client_tasks("w") == partition.client_tasks("z") == []
    assert set(partition.rows["x", "a"].tolist()).isdisjoint(partition.rows["y", "a"].tolist())


def test_shares_of_a_table_may_sum_to_one_but_for_rounding() -> None:
    table = {f"c{number}": {"a": 0.1} for number in range(10)}
    assert sum(shares["a"] for shares in table.values()) != 1
    assert counts_of(split(labels_of(a=70), rule="table", table=table), "a") == [7] * 10
    table["c0"]["a"] += 5e-10
    assert counts_of(split(labels_of(a=70), rule="table", table=table), "a") == [7] * 10


def test_equal_remainders_are_served_in_the_order_of_the_clients() -> None:
    assert 0.29 * 50 < 14.5  # By rounding; y's is 35.5 exactly.
    table = {"x": {"a": 0.29}, "y": {"a": 0.71}}
    assert counts_of(split(labels_of(a=50), rule="table", table=table), "a") == [15, 35]


def test_cap_gives_the_dropped_rows_to_the_other_holders_in_proportion() -> None:
    table = {"x": {"a": 0.4, "b": 1.0}, "y": {"a": 0.1}, "z": {"a": 0.3}}
    partition = split(labels_of(a=40, b=6), rule="table", table=table, max_tasks_per_client=1)
    # x alone holds b, so x keeps b; its 16 rows of a go to y and z as 1 to 3.
    assert counts_of(partition, "a") == [0, 8, 24]
    assert counts_of(partition, "b") == [6, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_cap_leaves_every_task_a_holder_where_there_is_a_way(seed: int) -> None:
    # Where x, served first, keeps a or b, there is no place for the other and c. The way: x c, y b, z a.
    held = {"x": "abc", "y": "bc", "z": "a"}
    table = {client: dict.fromkeys(tasks, 1 / 3) for client, tasks in held.items()}
    partition = split(labels_of(a=9, b=9, c=9), rule="table", table=table, seed=seed, max_tasks_per_client=1)
    assert {task for _, task in partition.rows} == {"a", "b", "c"}
    assert partition.client_tasks("z") == ["a"]


def test_cap_chooses_by_seed_and_client() -> None:
    def chosen(seed: int) -> list[tuple[str, ...]]:
        partition = split(labels_of(a=60, b=60, c=60), 6, seed, rule="iid", max_tasks_per_client=2)
        assert [len(partition.client_tasks(client)) for client in partition.clients] == [2] * 6
        return [tuple(sorted(partition.client_tasks(client))) for client in partition.clients]

    over_seeds = Counter(choice for seed in range(40) for choice in chosen(seed))
    assert chosen(3) == chosen(3)
    # With the same preferences everywhere, only the holder of the least liked task would differ: two choices.
    assert max(len(set(chosen(seed))) for seed in range(10)) == 3
    # 240 choices among 3 pairs: 80 each, standard deviation 7.3.
    assert len(over_seeds) == 3
    assert all(50 < count < 110 for count in over_seeds.values())


def test_slots_do_not_tell_the_task() -> None:
    labels = labels_of(a=400, b=400, c=400, d=400)
    firsts: Counter[str] = Counter()
    for seed in range(20):
        partition = split(labels, 10, seed, rule="iid")
        orders = [tuple(partition.client_tasks(client)) for client in partition.clients]
        assert len(set(orders)) > 1
        firsts.update(order[0] for order in orders)
    # 200 first slots over 4 tasks: 50 each, standard deviation 6.1.
    assert all(25 < firsts[task] < 75 for task in labels)


def test_dirichlet_shares_have_the_mean_and_spread_of_the_distribution() -> None:
    shares = np.array([counts_of(split(labels_of(a=2000), 5, seed, threshold=0.0), "a") for seed in range(400)])
    shares = shares / 2000
    # Dirichlet(0.5) over 5: mean 1/5, variance (1/5)(4/5) / (5 * 0.5 + 1); the mean of 400 is good to 0.011.
    assert np.abs(shares.mean(axis=0) - 0.2).max() < 0.04
    assert shares.std() == pytest.approx((0.2 * 0.8 / 3.5) ** 0.5, rel=0.1)


@SPLITS
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.08]), st.sampled_from(["dirichlet", "label-skew"]))
def test_no_share_is_below_the_threshold(seed: int, threshold: float, rule: str) -> None:
    partition = split(labels_of(a=10_000), 10, seed, rule=rule, threshold=threshold)
    # Cutting takes less than one row of each of the two classes from a share.
    assert all(count == 0 or count > threshold * 10_000 - 2 for count in counts_of(partition, "a"))


def test_the_threshold_drops_the_small_shares_and_keeps_the_ratios_of_the_others() -> None:
    dropped = 0
    for seed in range(10):
        free = np.array(counts_of(split(labels_of(a=10**5), 10, seed, threshold=0.0), "a")) / 10**5
        cut = np.array(counts_of(split(labels_of(a=10**5), 10, seed, threshold=0.05), "a")) / 10**5
        expected = np.where(free >= 0.05, free, 0)
        assert cut == pytest.approx(expected / expected.sum(), abs=1e-4)
        dropped += int(((free > 0) & (cut == 0)).sum())
    assert dropped > 10


def skew(partition: Partition, classes: NDArray[Any]) -> float:
    """Mean total variation between a client's classes and the task's, weighted by rows."""
    whole = np.bincount(classes) / len(classes)
    parts = list(partition.rows.values())
    distances = [
        np.abs(np.bincount(classes[rows], minlength=len(whole)) / len(rows) - whole).sum() / 2 for rows in parts
    ]
    return float(np.average(distances, weights=[len(rows) for rows in parts]))


def test_label_skew_skews_the_classes() -> None:
    classes = np.arange(4000, dtype=np.int64) % 4
    skewed = skew(split({"a": classes}, rule="label-skew"), classes)
    assert skew(split({"a": classes}, rule="iid"), classes) < 0.06
    assert skew(split({"a": classes}, rule="dirichlet"), classes) < 0.06
    assert skewed > 0.3
    assert skew(split({"a": classes}, rule="label-skew", alpha=1000.0), classes) < 0.06


def test_label_skew_of_a_regression_skews_its_deciles() -> None:
    order = np.random.default_rng(0).permutation(4000)
    values = ((order / 4000) ** 3).astype(np.float32)
    deciles = order // 400
    assert skew(split({"a": values}, rule="label-skew"), deciles) > 0.3
    assert skew(split({"a": values}, rule="iid"), deciles) < 0.1
    # With this alpha a class goes to one client whole.
    whole = split({"a": values}, rule="label-skew", alpha=1e-3, threshold=0.0)
    owners = [{int(decile) for decile in deciles[rows]} for rows in whole.rows.values() if len(rows) >= 200]
    assert sum(len(owned) for owned in owners) == 10
    assert len(owners) > 2


def test_label_skew_gives_out_a_class_that_only_dropped_clients_had() -> None:
    # With this alpha a class goes to one client whole; the share of the three small ones is below the threshold.
    classes = np.array([0] * 1000 + [1, 2, 3], dtype=np.int64)
    clients: set[str] = set()
    for seed in range(10):
        partition = split({"a": classes}, 10, seed, rule="label-skew", alpha=1e-3, threshold=0.2)
        assert_each_row_once(partition, {"a": classes})
        clients.update(client for client, _ in partition.rows)
    assert len(clients) > 1


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            {"table": {"x": {"a": 1.0, "b": 0.5, "q": 0.5}}},
            "table.x.q: got 0.5; there is no task q, allowed are a, b",
        ),
        ({"table": {"x": {"a": -0.25, "b": 1}}}, "table.x.a: got -0.25; allowed are shares from 0 to 1"),
        ({"table": {"x": {"a": float("nan")}}}, "table.x.a: got nan; input should be a finite number"),
        ({"table": {"x": {"a": 1.5}}}, "table.x.a: got 1.5; allowed are shares from 0 to 1"),
        (
            {"table": {"x": {"a": 0.5, "b": 1}, "y": {"a": 0.75}}},
            "table: got shares of task a that sum to 1.25; allowed is at most 1, and enough for one of its 20 rows",
        ),
        (
            {"table": {"x": {"a": 1.0}}},
            "table: got shares of task b that sum to 0; allowed is at most 1, and enough for one of its 20 rows",
        ),
        (
            {"table": {"x": {"a": 0.0, "b": 0.0}}},
            "table: got shares of task a that sum to 0; allowed is at most 1, and enough for one of its 20 rows",
        ),
        (
            {"table": {"x": {"a": 1.0, "b": 0.02}}},
            "table: got shares of task b that sum to 0.02; allowed is at most 1, and enough for one of its 20 rows",
        ),
        (
            {"table": {"x": {"a": 1, "b": 1}, "y": {}}, "max_tasks_per_client": 1},
            "max_tasks_per_client: got 1; it leaves task {} without a client, as too few clients hold it; allowed is "
            "a larger cap, up to 2",
        ),
        (
            {"table": {"x": {"a": 1, "b": 1}}, "max_tasks_per_client": 1},
            "max_tasks_per_client: got 1; 1 clients hold 2 tasks, allowed is at least 2",
        ),
        ({"rule": "dirichlet", "alpha": float("inf")}, "alpha: got inf; input should be a finite number"),
        ({"rule": "dirichlet", "alpha": 1.7e308}, "alpha: got 1.7e+308; allowed is at most 1e300 (or rule: iid)"),
    ],
)
def test_wrong_settings(partition: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        split(labels_of(a=20, b=20), **{"rule": "table", **partition})
    assert str(caught.value) in {f"federation.partition.{message}".replace("{}", task) for task in "ab"}


def test_threshold_that_nobody_reaches() -> None:
    with pytest.raises(InputError) as caught:
        split(labels_of(a=20), alpha=100.0, threshold=0.5)
    start, _, largest = str(caught.value).rpartition(" ")
    assert start == (
        "federation.partition.threshold: got 0.5; no client's share of task a reaches it, allowed with this seed "
        "is at most"
    )
    assert 0.1 < float(largest) < 0.2


def test_a_client_of_several_tasks_has_them_all_in_its_slots() -> None:
    partition = split(labels_of(a=50, b=50, c=50), 3, rule="iid")
    assert all(sorted(partition.client_tasks(client)) == ["a", "b", "c"] for client in partition.clients)
    assert all(one < other for one, other in pairwise(partition.clients))
    assert partition.tasks == ("a", "b", "c")
