"""What is committed as a result is whole, and the pages say what the results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fltac.config import load_config

ROOT = Path(__file__).parent.parent
RUNS = sorted(path.parent for path in (ROOT / "results").glob("*/*/seed-*/summary.json"))


def test_the_pages_are_generated_from_the_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], check=False)
    assert done.returncode == 0, "run `python benchmarks/readme.py`"


def test_there_are_results() -> None:
    assert {path.parts[-3] for path in RUNS} >= {"glue-minilm", "quickstart"}


@pytest.mark.parametrize("run", RUNS, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_result_has_its_config_and_provenance(run: Path) -> None:
    summary, manifest = (json.loads((run / name).read_text()) for name in ("summary.json", "manifest.json"))
    assert manifest["git"]["commit"]
    assert manifest["git"]["dirty"] is False
    assert manifest["versions"]["torch"]
    assert manifest["hardware"]["cpu"]
    config = load_config(run / "config.yaml")
    assert (config.method, config.federation.seed) == (summary["method"], summary["seed"])
    assert manifest["seed"] == summary["seed"] == int(run.name.removeprefix("seed-"))
    if summary["rounds"]:
        records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        assert len(records) == summary["rounds"]
        assert records[-1]["tasks"] == summary["tasks"]
    # A loss is a mean over the tokens of all rows, and needs fewer of them.
    assert all(task["n_eval"] > (40 if task["metric"] == "loss" else 200) for task in summary["tasks"].values())
