"""What a run says while it works, always on stderr: live bars on a terminal, one line a round elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """Told what a run does; none of it changes the run."""

    def start(self, rounds: int, slots: int) -> None:
        """A run of so many rounds begins (or continues); so many slots train in a full round."""

    def round_started(self, t: int, cohort: int) -> None:
        """Round ``t`` begins with so many clients."""

    def slots_done(self, n: int, loss: float | None, total: int) -> None:
        """So many of the round's slots are trained; the loss is that of the slot trained last."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is over; the record is its line of ``rounds.jsonl``."""

    def message(self, text: str) -> None:
        """One line of text."""

    def close(self) -> None:
        """The run is over, for whatever reason; may be called twice."""


def for_stream(stream: TextIO | None = None) -> Progress:
    """Bars if the stream (default: stderr) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return Bars(stream) if stream.isatty() else Lines(stream)


class Silent:
    """Says nothing."""

    def start(self, rounds: int, slots: int) -> None: ...

    def round_started(self, t: int, cohort: int) -> None: ...

    def slots_done(self, n: int, loss: float | None, total: int) -> None: ...

    def round_finished(self, record: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """One plain line for each round: loss, mean score, ARI, seconds, and the time that is left."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._rounds, self._done, self._start, self._round_start = 0, 0, clock(), clock()

    def start(self, rounds: int, slots: int) -> None:
        self._rounds, self._done, self._start = rounds, 0, self._clock()
        self._round_start = self._start

    def round_started(self, t: int, cohort: int) -> None:
        self._round_start = self._clock()

    def slots_done(self, n: int, loss: float | None, total: int) -> None: ...

    def round_finished(self, record: Mapping[str, Any]) -> None:
        now = self._clock()
        self._done += 1
        left_seconds = (now - self._start) / self._done * max(0, self._rounds - int(record["round"]))
        facts = [
            f"round {record['round']}/{self._rounds}",
            *describe(record),
            f"{now - self._round_start:.1f} s",
        ]
        if left_seconds:
            facts.append(f"ETA {clock_text(left_seconds)}")
        self.message("  ".join(facts))

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None: ...


class Bars:
    """Two live bars, over the rounds and over the round's slots, with the last scores, loss and ETA."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._rounds, self._slots = TaskID(0), TaskID(0)
        self._total, self._first, self._start = 0, 0.0, 0.0
        self._facts: list[str] = []

    def start(self, rounds: int, slots: int) -> None:
        self._total, self._first, self._start, self._facts = rounds, 0.0, self._clock(), []
        self._rounds = self._bars.add_task("rounds", total=rounds, facts="")
        self._slots = self._bars.add_task("slots", total=slots, facts="")
        self._bars.start()

    def round_started(self, t: int, cohort: int) -> None:
        if not self._first:
            self._first = float(t)
            self._bars.update(self._rounds, completed=t - 1)
        self._bars.update(self._slots, completed=0, facts=f"round {t}, {cohort} clients")

    def slots_done(self, n: int, loss: float | None, total: int) -> None:
        facts = "" if loss is None else f"loss {loss:.3f}"
        self._bars.update(self._slots, completed=n, total=total, facts=facts)
        before = self._bars.tasks[self._rounds].completed
        part = n / total if total else 0.0
        done = before - self._first + 1 + part
        if not done:
            return
        left_seconds = (self._clock() - self._start) / done * (self._total - before - part)
        self._show([*self._facts, f"ETA {clock_text(left_seconds)}"])

    def round_finished(self, record: Mapping[str, Any]) -> None:
        self._facts = describe(record)
        self._bars.update(self._rounds, completed=int(record["round"]))
        self._show(self._facts)

    def message(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()

    def _show(self, facts: list[str]) -> None:
        self._bars.update(self._rounds, facts="  ".join(facts))


def describe(record: Mapping[str, Any]) -> list[str]:
    """Loss, mean score, ARI and rejected updates of a round's record, those that it has."""
    clustering = record.get("clustering") or {}
    named = (
        ("loss", record.get("loss")),
        ("score", record.get("mean_score")),
        ("ari", clustering.get("ari")),
    )
    facts = [f"{name} {value:.3f}" for name, value in named if value is not None]
    if record.get("rejected"):
        facts.append(f"rejected {record['rejected']}")
    return facts


def clock_text(seconds: float) -> str:
    """``3:07`` or ``1:02:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
