"""Several passes side by side, each on a thread of its own, around one set of frozen weights."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import torch

from fltac.model.lanes import LaneModel

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """Workers that each have a model of their own, with the same frozen weights, and one thread of the processor.

    Operations hold no lock while they compute, so that the workers do not wait for each other.
    """

    def __init__(self, model: LaneModel, workers: int) -> None:
        self._models: SimpleQueue[LaneModel] = SimpleQueue()
        for own in (model, *(model.twin() for _ in range(workers - 1))):
            self._models.put(own)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

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
