"""The paper's tables and figures by name, and the one way in which each of them is made and written."""

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fltac.errors import InputError
from fltac.reproduce.order import Made, Order
from fltac.reproduce.output import Output
from fltac.runtime.progress import Progress


@dataclass(frozen=True)
class Item:
    """One table or figure.

    Attributes:
        what: In a few words, for ``--help`` and for errors.
        needs: Extra of the package to the module that it brings, where the item cannot do without.
        seeds: How many it is made from by default; None if it is made from one and no other number.
    """

    what: str
    needs: Mapping[str, str]
    seeds: int | None = 1


PLOT: Final = {"plot": "matplotlib"}

ITEMS: Final[Mapping[str, Item]] = {
    "table1": Item("accuracy on GLUE and CIFAR by method", {}),
    "table2": Item("scores on the categories of Dolly by method", {}),
    "figure2": Item("who holds what, and the methods' scores as a radar chart", PLOT),
    "figure3": Item("two small nets against one on two noisy sines", PLOT, 10),
    "figure4": Item("the uploaded adapters over the rounds, in the plane", PLOT, None),
    "parameters": Item("the paper's parameter counts, from the real architectures", {}, None),
}
"""Each is made by ``make`` of the module of its name in this package."""


def reproduce(order: Order, progress: Progress) -> tuple[Made, Output]:
    """Makes one table or figure and writes it to its folder.

    Raises:
        InputError: the name is unknown, an extra is missing, the folder holds something else, or anything in the
            experiments' configs, data or backbones is wrong. Nothing that was there has been overwritten.
    """
    check_name(order.name)
    item = ITEMS[order.name]
    if item.seeds is None and (order.seeds or 1) > 1:
        raise InputError(f"--seeds: got {order.seeds}; {order.name} is made from one")
    order = replace(order, seeds=order.seeds or item.seeds)
    refuse_missing(order.name, item.needs)
    output = Output.open(order)
    make: Callable[[Order, Progress], Made] = importlib.import_module(f"fltac.reproduce.{order.name}").make
    made = make(order, progress)
    output.write(made)
    return made, output


def check_name(name: str) -> None:
    """Raises InputError for a name that is not in the table, with the nearest one that is."""
    if name not in ITEMS:
        near = difflib.get_close_matches(name, ITEMS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"NAME: got {name!r}; allowed are {', '.join(ITEMS)}{hint}")


def refuse_missing(name: str, needs: Mapping[str, str]) -> None:
    """Raises InputError, naming the extra to install, where a module that an item needs is not there."""
    for extra, module in needs.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{name}: needs {module}, which is not installed; install fltac[{extra}]")


def as_json(made: Made, output: Output) -> dict[str, Any]:
    """What the command prints with ``--json``: the numbers, and the files that were written."""
    return {"files": [str(path) for path in output.files(made)], **made.data}
