"""A client's rows have something in common over all its tasks; what is kept is a fixed function of seed and client."""

import numpy as np
import pytest

from fltac.data.client_skew import keep_own
from fltac.errors import InputError

N = 4000
LABELS = {"x": np.tile([0, 1], N // 2), "y": np.tile([0, 1, 1, 0], N // 4)}
LENGTHS = {"x": np.arange(N) % 100, "y": np.arange(N)[::-1] // 3}
ROWS = {(client, task): np.arange(number, N, 2) for number, client in enumerate("ab") for task in "xy"}


def share_of_ones(rows: dict[tuple[str, str], np.ndarray], client: str, task: str) -> float:
    return float(LABELS[task][rows[client, task]].mean())


def test_none_keeps_all_rows() -> None:
    assert keep_own(ROWS, "none", 0, LABELS, None) == ROWS


def test_label_shares_are_a_clients_own_and_the_same_in_its_tasks() -> None:
    for seed in range(6):
        kept = keep_own({key: np.arange(N) for key in ROWS}, "labels", seed, LABELS, None)
        for client in "ab":
            assert share_of_ones(kept, client, "x") == pytest.approx(share_of_ones(kept, client, "y"), abs=0.05)
        # The commoner class is kept whole.
        counts = np.bincount(LABELS["x"][kept["a", "x"]], minlength=2)
        assert counts.max() == N // 2
    shares = [share_of_ones(keep_own(ROWS, "labels", seed, LABELS, None), "a", "y") for seed in range(30)]
    assert np.std(shares) > 0.1


def test_lengths_are_of_one_quarter_the_same_in_a_clients_tasks() -> None:
    kept = keep_own({key: np.arange(N) for key in ROWS}, "length", 1, LABELS, LENGTHS)
    for client in "ab":
        quarters = []
        for task in "xy":
            rank = np.argsort(np.argsort(LENGTHS[task], kind="stable"))[kept[client, task]]
            assert len(rank) == N // 4
            assert rank.max() - rank.min() == N // 4 - 1
            quarters.append(int(rank.min() * 4 // N))
        assert quarters[0] == quarters[1]


def test_it_does_not_depend_on_other_clients_or_tasks() -> None:
    whole = keep_own(ROWS, "labels", 3, LABELS, None)
    alone = keep_own({("b", "y"): ROWS["b", "y"]}, "labels", 3, {"y": LABELS["y"]}, None)
    assert whole["b", "y"].tolist() == alone["b", "y"].tolist()


def test_what_cannot_be_skewed_is_refused() -> None:
    with pytest.raises(InputError, match=r"client_skew: got 'labels', but task z is a regression"):
        keep_own({}, "labels", 0, {"z": np.zeros(3, np.float32)}, None)
    with pytest.raises(InputError, match=r"client_skew: got 'length', but all rows of task x are equally long"):
        keep_own({}, "length", 0, LABELS, {"x": np.ones(3, np.int64)})
    with pytest.raises(InputError, match=r"client_skew: got 'length', which needs encoded rows"):
        keep_own({}, "length", 0, LABELS, None)
