"""The folder that tables and figures are written to: nothing of anybody else's is overwritten, all files are whole."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fltac.errors import InputError
from fltac.report.compare import markdown_table
from fltac.reproduce.order import Made, Order
from fltac.runtime.atomic import TEMPORARY, to_json, write_atomic

MARKER: Final = "reproduce.json"
"""In every folder that this package has written to; says at which scale."""
PICTURES: Final = (".svg", ".png")


@dataclass(frozen=True)
class Output:
    """A folder for the items of one scale.

    Attributes:
        order: What is asked for.
    """

    order: Order

    @classmethod
    def open(cls, order: Order) -> "Output":
        """Checks that an item may be written, before anything expensive; writes nothing.

        Raises:
            InputError: the folder is a file, is not empty and not made by this command, belongs to another scale, or
                holds the item with other settings or from more seeds.
        """
        out = order.out
        if out.exists() and not out.is_dir():
            raise InputError(f"--out: {out} is a file; expected a folder that is empty or does not exist")
        there = (
            sorted(path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)) if out.exists() else []
        )
        if there and MARKER not in there:
            raise InputError(f"--out: {out} is not empty and not made by `fltac reproduce` (there is {there[0]})")
        if there:
            scale = _read(out / MARKER).get("scale")
            if scale != order.scale:
                raise InputError(f"--out: {out} belongs to --scale {scale}; choose another folder for {order.scale}")
        output = cls(order)
        numbers = output.path(".json")
        if numbers.exists():
            found = _read(numbers)
            before = found.get("settings")
            if before != list(order.overrides):
                raise InputError(
                    f"--out: {numbers} was made with {_said(before)}, not with {_said(list(order.overrides))}; "
                    "choose another folder"
                )
            seeds = found.get("seeds")
            if isinstance(seeds, int) and (order.seeds or 1) < seeds:
                raise InputError(
                    f"--out: {numbers} was made from {seeds} seeds, not {order.seeds or 1}; choose another folder, or "
                    f"--seeds {seeds} or more"
                )
        return output

    def path(self, kind: str, picture: str = "") -> Path:
        """A file of the item: its kind with the dot, and which of its pictures."""
        return self.order.out / f"{self.order.name}{picture}{self.order.suffix}{kind}"

    def files(self, made: Made) -> list[Path]:
        """All files of the item."""
        pictures = [self.path(kind, name) for name in made.pictures for kind in PICTURES]
        return [*(self.path(kind) for kind in (".json", ".csv", ".md")), *pictures]

    def write(self, made: Made) -> None:
        """Writes the item, each file as a whole.

        Raises:
            InputError: the folder cannot be written.
        """
        order = self.order
        data = {"name": order.name, "scale": order.scale, "settings": list(order.overrides), "seeds": order.seeds or 1}
        data |= made.data
        drawn = [self.path(".svg", name).name for name in made.pictures]
        pictures = [line for name in drawn for line in ("", f"![{order.name}]({name})")]
        title = f"# {order.name}{order.suffix}, {order.scale} scale"
        text = "\n".join([title, "", markdown_table(made.table), *(f"\n{note}" for note in made.notes), *pictures, ""])
        try:
            mark(order)
            for name, figure in made.pictures.items():
                for kind in PICTURES:
                    write_atomic(self.path(kind, name), _drawn(figure, kind))
            write_atomic(self.path(".csv"), _csv(made).encode())
            write_atomic(self.path(".md"), text.encode())
            write_atomic(self.path(".json"), (to_json(data, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(f"--out: {order.out} cannot be written: {error.strerror or error}") from error


def mark(order: Order) -> None:
    """Makes the folder this command's own, once. Raises InputError where it cannot be written."""
    try:
        order.out.mkdir(parents=True, exist_ok=True)
        if not (order.out / MARKER).exists():
            write_atomic(order.out / MARKER, (to_json({"scale": order.scale}) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out: {order.out} cannot be written: {error.strerror or error}") from error


def _drawn(figure: Any, kind: str) -> bytes:
    """The picture's file; the same numbers give the same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    without_date = {"metadata": {"Date": None}} if kind == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "fltac"}):
        figure.savefig(buffer, format=kind[1:], dpi=120, **without_date)
    return buffer.getvalue()


def _csv(made: Made) -> str:
    buffer = io.StringIO()
    heading, *body = made.table
    rows: Sequence[Mapping[str, object]] = made.csv or [dict(zip(heading, row, strict=True)) for row in body]
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {path} cannot be read as JSON; choose another folder") from error
    if not isinstance(tree, dict):
        raise InputError(f"--out: {path} is not written by `fltac reproduce`; choose another folder")
    return tree


def _said(settings: object) -> str:
    return " ".join(map(str, settings)) if isinstance(settings, list) and settings else "no settings of its own"
