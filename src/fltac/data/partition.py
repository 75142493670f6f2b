"""How each task's training rows are split over the clients (arXiv 2404.15384, experiments, Fig. 2a).

A task is drafted first: its rows in seeded order, in groups, with each group's shares over the clients. Then
clients that may not hold it are struck off and their shares go to the others in proportion, so no row is lost;
only then are rows cut. A task has a generator of its own, so its split does not depend on which other tasks
there are; only ``max_tasks_per_client`` couples them. Purposes used: ``partition`` (client = task
name), ``task-cap`` and ``slots`` (client = client id).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fltac.config import Config, FederationConfig, PartitionConfig
from fltac.data.client_skew import keep_own
from fltac.errors import InputError
from fltac.seeding import generator

KEY = "federation.partition"
QUANTILE_BINS = 10
"""What ``label-skew`` takes as the classes of a regression."""
ROUNDING = 1e-9
"""How far above 1 the shares in a table may sum."""

Rows = NDArray[np.int64]
Shares = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Partition:
    """Which training rows each client holds.

    Attributes:
        clients: Ids of all clients in string order, also of those without any rows.
        tasks: Names of the tasks.
        rows: (client, task) to ``[n]`` int64, the sorted training row numbers; only where n > 0.
        slots: Client to the tasks that it holds, in its own shuffled order. A task's slot number is its place
            there: shuffled, since the server sees slot numbers and must not read the task from them.
    """

    clients: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: Mapping[tuple[str, str], Rows]
    slots: Mapping[str, tuple[str, ...]]

    def client_tasks(self, client: str) -> list[str]:
        """The tasks that a client holds, by slot number; the order never depends on visiting order."""
        return list(self.slots[client])


@dataclass(frozen=True)
class _Draft:
    """One task before its rows are cut.

    Attributes:
        groups: The classes for ``label-skew``, else one group: ``[n]`` int64 row numbers in seeded order.
        shares: ``[groups, clients]`` float64; a group's sum is 1, or less with ``table``.
    """

    groups: tuple[Rows, ...]
    shares: Shares

    @property
    def counts(self) -> Rows:
        """``[groups, clients]`` int64: how many rows of each group each client gets."""
        return np.stack([_apportion(len(g), s) for g, s in zip(self.groups, self.shares, strict=True)])

    @property
    def task_shares(self) -> Shares:
        """``[clients]`` float64: the shares of the whole task."""
        sizes = np.array([len(group) for group in self.groups], dtype=np.float64)
        total: Shares = sizes @ self.shares / sizes.sum()
        return total

    def only(self, kept: Mask) -> "_Draft":
        """Gives the shares of the clients outside ``kept`` (``[clients]`` bool) to the others in proportion.

        A group of which the others have no share at all goes to them by their shares of the whole task.
        """
        shares = np.where(kept, self.shares, 0.0)
        whole = np.where(kept, self.task_shares, 0.0)
        shares = np.where(shares.sum(axis=1, keepdims=True) > 0, shares, whole)
        given_out = self.shares.sum(axis=1, keepdims=True)
        return replace(self, shares=shares / shares.sum(axis=1, keepdims=True) * given_out)


def make_partition(
    config: Config, labels: Mapping[str, NDArray[Any]], lengths: Mapping[str, NDArray[np.int64]] | None = None
) -> Partition:
    """Splits every task's training rows as ``federation.partition`` says.

    All rows of a task are given out exactly once; with ``table``, as many as its shares sum to, and with
    ``client_skew`` those that the clients keep of what they were given. A share that
    rounds to no row gives nothing. ``threshold`` concerns the two Dirichlet rules; ``iid`` and ``table`` have the
    shares that they state. The table decides who the clients are: ``federation.clients`` is ignored with it.

    Args:
        config: The run's configuration.
        labels: Task to the labels of all its training rows: ``[n]`` int64 class numbers, or float32.
        lengths: Task to their tokens, for ``client_skew: length``.

    Raises:
        InputError: the table is wrong, no client reaches the threshold, the cap leaves a task to nobody, or the
            clients' skew cannot be had from these rows.
    """
    setting, seed = config.federation.partition, config.federation.seed
    clients = client_ids(config.federation)
    if setting.rule == "table":
        _check_table(setting.table or {}, {task: len(values) for task, values in labels.items()})
    drafts = {task: _draft(setting, seed, clients, task, values) for task, values in labels.items()}
    if setting.max_tasks_per_client is not None:
        drafts = _capped(drafts, clients, setting.max_tasks_per_client, seed)
    parts = {task: _cut(draft) for task, draft in drafts.items()}
    rows = {
        (client, task): part[number]
        for number, client in enumerate(clients)
        for task, part in parts.items()
        if len(part[number])
    }
    rows = keep_own(rows, setting.client_skew, seed, labels, lengths)
    slots = {client: _slots(seed, client, [task for task in parts if (client, task) in rows]) for client in clients}
    return Partition(clients, tuple(labels), rows, slots)


def client_ids(federation: FederationConfig) -> tuple[str, ...]:
    """The ids in string order; zeros before the numbers make this the order of the numbers, too."""
    if federation.partition.rule == "table":
        return tuple(sorted(federation.partition.table or {}))
    width = len(str(federation.clients - 1))
    return tuple(f"client-{number:0{width}}" for number in range(federation.clients))


def _draft(setting: PartitionConfig, seed: int, clients: Sequence[str], task: str, labels: NDArray[Any]) -> _Draft:
    """One task's groups and shares; the order of the rows is drawn first, so it is the same for every rule."""
    draw = generator(seed, "partition", client=task)
    order: Rows = draw.permutation(len(labels))
    if setting.rule == "iid":
        return _Draft((order,), np.full((1, len(clients)), 1 / len(clients)))
    if setting.rule == "table":
        stated = np.array([[(setting.table or {})[client].get(task, 0.0) for client in clients]])
        return _Draft((order,), stated / max(1.0, stated.sum()))  # The sum may be above 1 by rounding.
    groups: tuple[Rows, ...] = (order,)
    if setting.rule == "label-skew":
        classes = _classes(labels)[order]
        groups = tuple(order[classes == value] for value in np.unique(classes))
    shares = draw.dirichlet(np.full(len(clients), setting.alpha), size=len(groups))
    if not np.allclose(shares.sum(axis=1), 1):
        raise InputError(f"{KEY}.alpha: got {setting.alpha}; allowed is at most 1e300 (or rule: iid)")
    draft = _Draft(groups, shares)
    kept: Mask = draft.task_shares >= setting.threshold
    if not kept.any():
        raise InputError(
            f"{KEY}.threshold: got {setting.threshold}; no client's share of task {task} reaches it, allowed with "
            f"this seed is at most {draft.task_shares.max():.4g}"
        )
    return draft.only(kept)


def _classes(labels: NDArray[Any]) -> Rows:
    """``[n]`` int64 classes of ``[n]`` labels; a regression's are its quantile bins (fewer where values tie)."""
    if not np.issubdtype(labels.dtype, np.floating):
        return labels.astype(np.int64)
    values = labels.astype(np.float64)
    edges = np.quantile(values, np.arange(1, QUANTILE_BINS) / QUANTILE_BINS)
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def _check_table(table: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> None:
    """Refuses a wrong table; ``counts`` holds every task's number of rows."""
    for client, shares in table.items():
        for task, share in shares.items():
            where = f"{KEY}.table.{client}.{task}: got {share!r}; "
            if task not in counts:
                raise InputError(f"{where}there is no task {task}, allowed are {', '.join(counts)}")
            if not 0 <= share <= 1 + ROUNDING:  # Refuses a NaN, too.
                raise InputError(f"{where}allowed are shares from 0 to 1")
    for task, count in counts.items():
        total = sum(shares.get(task, 0.0) for shares in table.values())
        if total > 1 + ROUNDING or round(total * count) == 0:
            raise InputError(
                f"{KEY}.table: got shares of task {task} that sum to {total:.10g}; allowed is at most 1, and enough "
                f"for one of its {count} rows"
            )


def _capped(drafts: Mapping[str, _Draft], clients: Sequence[str], cap: int, seed: int) -> dict[str, _Draft]:
    """Leaves every client at most ``cap`` tasks and every task at least one client.

    Each client has a seeded random preference for each task. First every task is given to one of its holders,
    at least cost in preferences and at most ``cap`` to a client: a greedy choice, client by client, may leave a
    task without holder although there is a way. Then each client fills up in the order of its preferences.
    """
    tasks = sorted(drafts)
    where = f"{KEY}.max_tasks_per_client: got {cap}; "
    if len(clients) * cap < len(tasks):
        least = -(-len(tasks) // len(clients))
        raise InputError(f"{where}{len(clients)} clients hold {len(tasks)} tasks, allowed is at least {least}")
    held = np.stack([drafts[task].counts.sum(axis=0) > 0 for task in tasks])
    wish = [generator(seed, "task-cap", client=client).random(len(tasks)) for client in clients]
    cost = np.stack(wish, axis=1)
    # A task given to a client that does not hold it costs more than all wishes together.
    places = min(cap, len(tasks))
    rows, columns = linear_sum_assignment(np.repeat(np.where(held, cost, len(tasks) + 1.0), places, axis=1))
    owners = columns // places
    for row, owner in zip(rows, owners, strict=True):
        if not held[row, owner]:
            raise InputError(
                f"{where}it leaves task {tasks[row]} without a client, as too few clients hold it; "
                f"allowed is a larger cap, up to {len(tasks)}"
            )
    cost[rows, owners] -= 1  # Before every other wish, since wishes lie in [0, 1).
    rank = np.argsort(np.argsort(np.where(held, cost, np.inf), axis=0), axis=0)
    kept = held & (rank < cap)
    return {
        task: drafts[task] if (kept[row] == held[row]).all() else drafts[task].only(kept[row])
        for row, task in enumerate(tasks)
    }


def _apportion(count: int, shares: Shares) -> Rows:
    """``[clients]`` int64 rows for ``[clients]`` shares of ``count`` rows, by largest remainder.

    The sum is ``count`` times the sum of the shares, rounded. Nobody is a whole row away from the exact share, and
    a share of zero gets nothing. Equal remainders are served in the order of the clients.
    """
    exact = shares * count
    whole = np.floor(exact)
    missing = round(float(exact.sum())) - int(whole.sum())
    # Rounded, so that remainders that are equal but for rounding errors count as equal.
    first = np.argsort(-np.round(exact - whole, 9), kind="stable")[:missing]
    counts = whole.astype(np.int64)
    counts[first] += 1
    return counts


def _cut(draft: _Draft) -> list[Rows]:
    """Each client's ``[n]`` int64 sorted row numbers of one task."""
    pieces = [np.split(group, np.cumsum(counts))[:-1] for group, counts in zip(draft.groups, draft.counts, strict=True)]
    return [np.sort(np.concatenate(own)) for own in zip(*pieces, strict=True)]


def _slots(seed: int, client: str, held: Sequence[str]) -> tuple[str, ...]:
    """The client's tasks in its own order; sorted first, so that the order in the configuration has no say."""
    order = generator(seed, "slots", client=client).permutation(len(held))
    names = sorted(held)
    return tuple(names[number] for number in order)
