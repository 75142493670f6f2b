"""Several passes side by side, each on a thread of its own, around one set of frozen weights."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event, Lock
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from fltac.model.lanes import LaneModel

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """Workers that each have a model of their own, with the same frozen weights, and their own processor threads.

    Operations hold no lock while they compute, so that the workers do not wait for each other.
    """

    def __init__(self, model: LaneModel, workers: int, threads: int) -> None:
        """Makes the workers.

        Args:
            model: One worker's; the others get twins of it.
            workers: How many.
            threads: Of each.
        """
        self._over, self._lock = Event(), Lock()
        self._models: SimpleQueue[LaneModel] = SimpleQueue()
        for own in (model, *(model.twin() for _ in range(workers - 1))):
            self._models.put(own)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def watched(self, report: Callable[[int, Tensor], None]) -> Callable[[int, Tensor], None]:
        """A report for after each pass: one worker at a time, and a worker that nobody waits for any more ends."""

        def one(active: int, losses: Tensor) -> None:
            if self._over.is_set():
                raise CancelledError
            with self._lock:
                report(active, losses)

        return one

    def map(self, work: Callable[[LaneModel, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Works on all items, some at a time; yields the results in the items' order.

        Args:
            work: Given a worker's model and an item.
            items: What there is to do.
        """

        def one(item: Item) -> Result:
            model = self._models.get()
            try:
                return work(model, item)
            finally:
                self._models.put(model)

        yield from self._pool.map(one, items)
