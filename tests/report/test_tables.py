"""The terminal's tables and the partition's figure."""

import builtins
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from fltac.errors import InputError
from fltac.report.partition_plot import check_plot_file, plot_partition, shares
from fltac.report.tables import partition_table, summary_table

COUNTS = {"c0": {"sst2": 30, "rte": 5}, "c1": {"sst2": 10}, "c2": {}}


def cells(table: Table) -> list[list[str]]:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    lines = [line for line in capture.get().splitlines() if re.search(r"\w", line)]
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]


def test_summary_table() -> None:
    summary = {
        "tasks": {
            "sst2": {"metric": "accuracy", "score": 0.8741, "worst_client": 0.861, "n_eval": 872},
            "stsb": {"metric": "pearson", "score": None, "worst_client": None, "n_eval": 10},
        },
        "mean_score": None,
        "baselines": {"majority": {"sst2": 0.509}},
    }
    assert cells(summary_table(summary)) == [
        ["task", "metric", "score", "worst client", "majority"],
        ["sst2", "accuracy", "0.874", "0.861", "0.509"],
        ["stsb", "pearson", "-", "-", "-"],
        ["mean", "", "-", "", "-"],
    ]
    whole = {**summary, "mean_score": 0.5, "baselines": {"majority": {"sst2": 0.5, "stsb": 0.0}}}
    assert cells(summary_table(whole))[-1] == ["mean", "", "0.500", "", "0.250"]


def test_summary_table_of_answers() -> None:
    """A language model's evaluation; the second task's prompts were not answered."""
    task = {"metric": "loss", "score": 3.0, "worst_client": 3.5, "n_eval": 8}
    record = {
        "tasks": {"one": task, "other": task},
        "mean_score": 3.0,
        "baselines": {"majority": {}},
        "generation": {"tasks": {"one": {"rouge_l": 0.25, "token_f1": 0.5, "n": 4}}},
    }
    assert cells(summary_table(record)) == [
        ["task", "metric", "score", "worst client", "majority", "ROUGE-L", "token F1"],
        ["one", "loss", "3.000", "3.500", "-", "0.250", "0.500"],
        ["other", "loss", "3.000", "3.500", "-", "-", "-"],
        ["mean", "", "3.000", "", "-", "0.250", "0.500"],
    ]
    judged = cells(summary_table({**record, "judge": {"model": "m", "tasks": {"one": 0.75}}}))
    assert [row[-1] for row in judged] == ["judge", "0.750", "-", "0.750"]


def test_partition_table() -> None:
    assert cells(partition_table(COUNTS, ["sst2", "rte"])) == [
        ["client", "sst2", "rte", "rows"],
        ["c0", "30", "5", "35"],
        ["c1", "10", "-", "10"],
        ["c2", "-", "-", "0"],
        ["all", "40", "5", "45"],
    ]


def test_shares_are_of_the_rows_given_out() -> None:
    assert shares(COUNTS, "sst2") == {"c0": 0.75, "c1": 0.25}
    assert shares(COUNTS, "rte") == {"c0": 1.0}
    assert shares(COUNTS, "none") == {}


def test_the_figure_names_tasks_and_clients(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot_partition(COUNTS, ["sst2", "rte"], tmp_path / "shares.svg")
    texts = {"".join(node.itertext()).strip() for node in xml.etree.ElementTree.parse(tmp_path / "shares.svg").iter()}
    assert {"sst2", "rte", "c0", "c1"} <= texts
    assert any(text.endswith("c2") for text in texts), "a client whose piece is too narrow stands in the legend"
    plot_partition(COUNTS, ["sst2"], tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_figure_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--plot: .*a.txt: unknown kind of figure '.txt'; allowed are .png, .svg"):
        check_plot_file(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"--plot: .*a.png: the folder .*nowhere does not exist"):
        check_plot_file(tmp_path / "nowhere" / "a.png")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"--plot: needs matplotlib; install fltac\[plot\]"):
        check_plot_file(tmp_path / "a.png")
