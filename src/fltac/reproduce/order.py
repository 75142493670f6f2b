"""What is asked of a table or figure, and what it answers; the same two records for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fltac.config import parse_override
from fltac.errors import InputError

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")
EXPERIMENT = "experiment="


@dataclass(frozen=True)
class Order:
    """A table or figure that is wanted.

    Attributes:
        name: Which one, see ``registry.ITEMS``.
        scale: ``small`` fits two cores and local data; ``paper`` has the paper's models and sizes.
        overrides: ``key=value`` strings, see :class:`Overrides`.
        seeds: How many; None for the item's own default.
        out: The folder that everything is written to.
        configs: The folder of the paper's experiments.
    """

    name: str
    scale: Scale
    overrides: tuple[str, ...]
    seeds: int | None
    out: Path
    configs: Path

    @property
    def suffix(self) -> str:
        """Stands behind its files' names: the experiment if one is asked for, so that a folder can hold several."""
        asked = [text.removeprefix(EXPERIMENT) for text in self.overrides if text.startswith(EXPERIMENT)]
        return f"-{asked[-1]}" if asked else ""


@dataclass(frozen=True)
class Made:
    """A table or figure.

    Attributes:
        data: All of its numbers, for the JSON file that it can be drawn from again.
        table: The Markdown table's rows, the heading first.
        csv: Rows of the CSV file, one for each number, all with the same keys; empty to write the Markdown's.
        notes: Paragraphs below the table: what it shows, what differs from the paper.
        pictures: Ending of the file's name (may be empty) to matplotlib figure.
    """

    data: Mapping[str, Any]
    table: Sequence[Sequence[str]]
    notes: Sequence[str]
    csv: Sequence[Mapping[str, object]] = ()
    pictures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Overrides:
    """The ``key=value`` strings of an order, sorted by what they are for.

    Attributes:
        own: Keys of the item itself, such as ``projection``, with their text.
        common: Config settings for every experiment of the item.
        of_part: Config settings for one experiment: ``glue.lora.rank=2`` holds for ``glue`` alone.
    """

    own: Mapping[str, str]
    common: tuple[str, ...]
    of_part: Mapping[str, tuple[str, ...]]

    def config(self, part: str) -> list[str]:
        """The settings for one experiment, its own ones last."""
        return [*self.common, *self.of_part.get(part, ())]


def sort_overrides(
    texts: Sequence[str], own: Mapping[str, Sequence[str]] | None = None, parts: Sequence[str] = ()
) -> Overrides:
    """Sorts overrides by what they are for.

    Args:
        texts: As given.
        own: The item's own keys with the values that are allowed; an empty sequence allows any.
        parts: Names of the item's experiments.

    Raises:
        InputError: one is not ``key=value``, or an own key has a value that is not allowed.
    """
    mine: dict[str, str] = {}
    common: list[str] = []
    of_part: dict[str, list[str]] = {part: [] for part in parts}
    for text in texts:
        parse_override(text)
        key, _, value = text.partition("=")
        first, dot, rest = key.partition(".")
        if own is not None and key in own:
            if own[key] and value not in own[key]:
                raise InputError(f"{key}: got {value!r}; allowed are {', '.join(own[key])}")
            mine[key] = value
        elif dot and first in of_part:
            of_part[first].append(f"{rest}={value}")
        else:
            common.append(text)
    return Overrides(mine, tuple(common), {part: tuple(found) for part, found in of_part.items()})
