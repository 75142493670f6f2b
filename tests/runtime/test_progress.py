"""What a run says while it works."""

import io
from collections.abc import Callable

import pytest

from fltac.runtime.progress import Bars, Lines, Progress, Silent, clock_text, describe, for_stream

RECORD = {"round": 3, "loss": 0.51234, "mean_score": 0.81, "clustering": {"ari": 0.25}, "rejected": 0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(times: list[float]) -> Callable[[], float]:
    return iter(times).__next__


def drive(progress: Progress) -> None:
    progress.start(5, 8)
    for t in (3, 4):
        progress.round_started(t, 4)
        progress.slots_done(1, 0.75, 8)
        progress.slots_done(8, None, 8)
        progress.round_finished({**RECORD, "round": t})
    progress.message("a [bracketed] line")
    progress.close()
    progress.close()


def test_lines_hold_the_facts_and_the_time_left() -> None:
    stream = io.StringIO()
    # Made at 0; started at 100; rounds begin at 110 and 130 and end at 130 and 160.
    lines = Lines(stream, ticking([0, 0, 100, 110, 130, 130, 160]))
    drive(lines)
    assert stream.getvalue().splitlines() == [
        "round 3/5  loss 0.512  score 0.810  ari 0.250  20.0 s  ETA 1:00",
        "round 4/5  loss 0.512  score 0.810  ari 0.250  30.0 s  ETA 0:30",
        "a [bracketed] line",
    ]


def test_the_last_round_has_no_eta_and_missing_facts_are_left_out() -> None:
    stream = io.StringIO()
    lines = Lines(stream, lambda: 1.0)
    lines.start(1, 2)
    lines.round_finished({"round": 1, "loss": None, "mean_score": None, "clustering": None, "rejected": 2})
    assert stream.getvalue() == "round 1/1  rejected 2  0.0 s\n"


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    drive(Bars(stream))
    shown = stream.getvalue()
    for text in (
        "rounds",
        "slots",
        "4/5",
        "8/8",
        "loss 0.512",
        "score 0.810",
        "ari 0.250",
        "a [bracketed] line",
    ):
        assert text in shown


def test_bars_estimate_from_this_process_alone() -> None:
    bars = Bars(Terminal(), ticking([0.0, 10.0, 20.0]))
    bars.start(5, 8)
    bars.round_started(3, 4)
    bars.slots_done(4, 0.5, 8)
    # Half of round 3 took 10 s: two and a half rounds are left.
    assert bars._bars.tasks[0].fields["facts"] == "ETA 0:50"
    bars.round_finished(RECORD)
    bars.round_started(4, 4)
    bars.slots_done(8, 0.5, 8)
    # Rounds 3 and 4 took 20 s: one is left.
    assert bars._bars.tasks[0].fields["facts"] == "loss 0.512  score 0.810  ari 0.250  ETA 0:10"
    assert bars._bars.tasks[1].fields["facts"] == "loss 0.500"
    bars.close()


def test_a_run_without_rounds_or_slots() -> None:
    bars = Bars(Terminal())
    for progress in (bars, Lines(io.StringIO()), Silent()):
        progress.start(0, 0)
        progress.slots_done(0, None, 0)
        progress.close()
    assert [task.completed for task in bars._bars.tasks] == [0, 0]


def test_the_stream_decides() -> None:
    assert isinstance(for_stream(Terminal()), Bars)
    assert isinstance(for_stream(io.StringIO()), Lines)


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    drive(Silent())
    assert capsys.readouterr() == ("", "")


def test_describe_and_clock() -> None:
    assert describe({"round": 1}) == []
    assert [clock_text(s) for s in (0, 59.6, 187, 3729)] == ["0:00", "1:00", "3:07", "1:02:09"]
