"""Every committed benchmark has its targets, what was measured, and where it comes from."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHES = str(ROOT / "benchmarks" / "bench")
sys.path.insert(0, BENCHES)

from record import lines, met, write_record  # noqa: E402

# A benchmark has the name of a folder of tests, which would not be found any more.
sys.path.remove(BENCHES)

FILES = sorted((ROOT / "results" / "bench").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_benchmark_is_whole(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["name"] == path.stem
    assert record["targets"].keys() == record["measured"].keys()
    assert record["targets"], "a benchmark without a target"
    assert all(label.startswith(f"{path.stem}.") for label in record["targets"])
    assert all(set(target) <= {"min", "max"} and target for target in record["targets"].values())
    assert all(math.isfinite(value) for value in record["measured"].values())
    assert record["samples"]
    assert record["provenance"]["git"]["dirty"] is False
    assert (ROOT / record["provenance"]["command"][0]).is_file()


def test_the_report_says_what_falls_short(tmp_path: Path) -> None:
    targets = {"x.fast": {"min": 8.0}, "x.small": {"max": 0.5}}
    path = write_record("x", targets, {"x.fast": 7.9, "x.small": 0.5}, {"runs": [1]}, folder=tmp_path)
    first, second = lines(json.loads(path.read_text()))
    assert first.startswith("MISS")
    assert "x.fast" in first
    assert second.startswith("ok")
    assert met({"min": 1, "max": 2}, 1.5)
    assert not met({"min": 1, "max": 2}, 2.5)


def test_labels_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets"):
        write_record("x", {"x.a": {"min": 1}}, {"x.b": 1}, {}, folder=tmp_path)
