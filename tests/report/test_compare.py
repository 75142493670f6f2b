"""The comparison table and its reader, on hand-made run directories."""

import json
from pathlib import Path

import pytest

from fltac.errors import InputError
from fltac.report.compare import comparison_json, comparison_table, load_results


def summary(method: str, seed: int = 0, sst2: float = 0.8, rte: float = 0.6, **changes: object) -> dict[str, object]:
    return {
        "method": method,
        "seed": seed,
        "rounds": 5,
        "round": 5,
        "tasks": {
            "sst2": {"metric": "accuracy", "score": sst2, "worst_client": sst2 - 0.1, "n_eval": 872},
            "rte": {"metric": "f1", "score": rte, "worst_client": rte - 0.1, "n_eval": 277},
        },
        "mean_score": (sst2 + rte) / 2,
        "clustering": {"k": 2, "ari": 0.5, "accuracy": 0.75, "silhouette": 0.4},
        "bytes_total": {"up": 1_500_000, "down": 2_000_000},
        "baselines": {"majority": {"sst2": 0.51, "rte": 0.53}},
        **changes,
    }


def write_run(folder: Path, tree: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(tree))
    return folder


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")]


def test_table_of_single_runs(tmp_path: Path) -> None:
    nothing = {"clustering": None, "bytes_total": {"up": 0, "down": 0}}
    folders = [
        write_run(tmp_path / "central", summary("central", sst2=0.9, rte=0.7, **nothing)),
        write_run(tmp_path / "fltac", summary("fltac", sst2=0.8, rte=0.6)),
        write_run(tmp_path / "oracle", summary("oracle", sst2=0.85, rte=0.65)),
        write_run(tmp_path / "fedit", summary("fedit", sst2=0.7, rte=0.62)),
        write_run(tmp_path / "fedit-heads", summary("fedit-heads", sst2=0.88, rte=0.68)),
        write_run(tmp_path / "zero", summary("zero", sst2=0.5, rte=0.5, **nothing)),
    ]
    rows = rows_of(comparison_table(load_results(folders)))
    facts = ["0.50", "0.75", "1.50", "2.00", "5", "one seed"]
    none = ["-", "-", "0.00", "0.00", "5", "one seed"]
    heads = ["ARI", "cluster acc.", "MB up", "MB down", "rounds", "seeds"]
    assert rows == [
        ["method", "sst2", "rte (f1)", "mean", *heads],
        ["majority", "0.510", "0.530", "0.520", *["-"] * 6],
        ["zero", "0.500", "0.500", "0.500", *none],
        ["fedit", "0.700", "**0.620**", "0.660", *facts],
        ["fedit-heads (told the tasks)", "0.880", "0.680", "0.780", *facts],
        ["fltac", "**0.800**", "0.600", "**0.700**", *facts],
        ["oracle (told the tasks)", "0.850", "0.650", "0.750", *facts],
        ["central", "0.900", "0.700", "0.800", *none],
    ]


def test_ties_are_all_bold_and_a_lone_method_is_not(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", summary("fltac", sst2=0.80004, rte=0.6))
    assert "**" not in comparison_table(load_results([one]))
    two = write_run(tmp_path / "b", summary("fedit", sst2=0.8, rte=0.5))
    rows = rows_of(comparison_table(load_results([one, two])))
    assert [row[1] for row in rows[2:]] == ["**0.800**", "**0.800**"]


def test_seeds_give_mean_and_sample_deviation(tmp_path: Path) -> None:
    for seed, score in ((0, 0.7), (10, 0.9), (2, 0.8)):
        write_run(tmp_path / "fltac" / f"seed-{seed}", summary("fltac", seed, sst2=score, rte=0.6))
    results = load_results([tmp_path / "fltac"])
    assert [run.seed for run in results[0].runs] == [0, 2, 10]
    row = rows_of(comparison_table(results))[2]
    # The sample standard deviation of .7, .8, .9 is .1; of their means with .6 it is .05.
    assert row[:4] == ["fltac", "0.800 ± 0.100", "0.600 ± 0.000", "0.700 ± 0.050"]
    assert row[4] == "0.50 ± 0.00"
    assert row[-1] == "3 seeds"
    tree = comparison_json(results)
    assert tree["majority"] == pytest.approx({"sst2": 0.51, "rte": 0.53})
    (found,) = tree["rows"]  # type: ignore[misc, attr-defined]
    assert found["seeds"] == [0, 2, 10]
    assert found["tasks"]["sst2"]["score"] == pytest.approx({"mean": 0.8, "std": 0.1})
    assert found["tasks"]["sst2"]["worst_client"] == pytest.approx({"mean": 0.7, "std": 0.1})
    assert found["up_bytes"] == {"mean": 1_500_000, "std": 0.0}
    assert found["finished"] is True
    json.dumps(tree, allow_nan=False)


def test_a_folder_of_methods_is_opened(tmp_path: Path) -> None:
    write_run(tmp_path / "fedit" / "seed-0", summary("fedit"))
    write_run(tmp_path / "fltac" / "seed-0", summary("fltac"))
    write_run(tmp_path / "local", summary("local"))
    (tmp_path / "plots").mkdir()
    assert [result.label for result in load_results([tmp_path])] == ["local", "fedit", "fltac"]


def test_rows_of_one_method_are_told_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "rank-1", summary("fltac"))
    b = write_run(tmp_path / "rank-4", summary("fltac"))
    assert [result.label for result in load_results([b, a])] == ["fltac (rank-1)", "fltac (rank-4)"]
    c = write_run(tmp_path / "other" / "rank-1", summary("fltac"))
    assert [result.label for result in load_results([a, c])] == sorted([f"fltac ({a})", f"fltac ({c})"])


def test_order_of_methods(tmp_path: Path) -> None:
    given = ["central-full", "mine", "central", "central-single", "oracle", "fltac", "fltac-paper", "random"]
    given += ["fedit-heads", "fedit", "local", "zero"]
    folders = [write_run(tmp_path / method, summary(method)) for method in given]
    assert [result.method for result in load_results(folders)] == [
        *["zero", "local", "fedit", "fedit-heads", "random", "fltac-paper", "fltac", "oracle"],
        *["central-single", "central", "central-full", "mine"],
    ]


def test_runs_on_different_tasks_leave_gaps(tmp_path: Path) -> None:
    fewer = summary("fedit")
    del fewer["tasks"]["rte"]  # type: ignore[attr-defined]
    undefined = summary("random", mean_score=None)
    undefined["tasks"]["sst2"]["score"] = None  # type: ignore[index]
    folders = [
        write_run(tmp_path / "a", summary("fltac")),
        write_run(tmp_path / "b", fewer),
        write_run(tmp_path / "c", undefined),
    ]
    rows = rows_of(comparison_table(load_results(folders)))
    assert [row[:3] for row in rows[2:]] == [
        ["fedit", "**0.800**", "-"],
        ["random", "-", "**0.600**"],
        ["fltac", "**0.800**", "**0.600**"],
    ]
    assert rows[3][3] == "-"


def test_an_unfinished_run_shows_its_last_evaluation(tmp_path: Path) -> None:
    def line(number: int, evaluated: bool) -> str:
        whole = summary("fltac")
        record = {
            "round": number,
            "bytes": {"up": 1_000_000, "down": 250_000},
            "clustering": whole["clustering"],
        }
        record |= {"tasks": whole["tasks"] if evaluated else None, "mean_score": 0.7 if evaluated else None}
        return json.dumps(record)

    run = tmp_path / "seed-4"
    run.mkdir()
    (run / "config.yaml").write_text("method: fltac\nbackbone:\n  name: x\n")
    (run / "rounds.jsonl").write_text("\n".join([line(1, False), line(2, True), line(3, False), '{"rou']))
    results = load_results([tmp_path])
    assert results[0].runs[0].seed == 4
    row = rows_of(comparison_table(results))[1]
    assert row[0] == "fltac (unfinished)"
    assert row[1:4] == ["0.800", "0.600", "0.700"]
    assert row[-4:] == ["3.00", "0.75", "2", "one seed"]

    (run / "rounds.jsonl").write_text(line(1, False) + "\n")
    with pytest.raises(InputError, match=r"rounds.jsonl: no round has been evaluated yet"):
        load_results([run])
    (run / "rounds.jsonl").write_text("oops\n" + line(1, True) + "\n")
    with pytest.raises(InputError, match=r"rounds.jsonl: line 1 is not the record of a round"):
        load_results([run])
    (run / "rounds.jsonl").write_text('{"tasks": {"a": 1}}\n')
    with pytest.raises(InputError, match=r"rounds.jsonl: a record has no 'bytes'"):
        load_results([run])
    (run / "rounds.jsonl").write_text(line(1, True) + "\n")
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"has neither summary.json nor a config.yaml with a method"):
        load_results([run])


def test_foreign_and_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        load_results([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no run: neither summary.json nor rounds.jsonl"):
        load_results([tmp_path / "empty"])
    run = write_run(tmp_path / "run", summary("fltac"))
    damaged = [
        ("{", r"summary.json: not JSON"),
        ("[]", r"summary.json: expected a JSON object, got list"),
        ('{"rounds": 3}', r"summary.json: the key 'tasks' is missing"),
        (json.dumps(summary("fltac", tasks=None)), r"summary.json: not laid out as expected"),
        (
            json.dumps(summary("fltac", rounds="many")),
            r"summary.json: not laid out as expected \(invalid literal",
        ),
    ]
    for text, message in damaged:
        (run / "summary.json").write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            load_results([run])
        assert "\n" not in str(caught.value)
    for seed, method in ((0, "fltac"), (1, "fedit")):
        write_run(tmp_path / "mixed" / f"seed-{seed}", summary(method, seed))
    with pytest.raises(InputError, match=r"mixed: its seeds are runs of different methods: fedit, fltac"):
        load_results([tmp_path / "mixed"])


def test_of_losses_the_lowest_is_best(tmp_path: Path) -> None:
    def loss(method: str, value: float) -> Path:
        task = {"metric": "loss", "score": value, "worst_client": value + 1, "n_eval": 9, "perplexity": 8.0}
        tree = summary(method, tasks={"open-qa": task}, mean_score=value, baselines={"majority": {}})
        return write_run(tmp_path / method, tree)

    results = load_results([loss("zero", 4.0), loss("fedit", 2.5), loss("fltac", 2.25)])
    table = comparison_table(results)
    rows = rows_of(table)
    assert rows[0][:3] == ["method", "open-qa (loss)", "mean"]
    assert [row[:3] for row in rows[1:]] == [
        ["zero", "4.000", "4.000"],
        ["fedit", "2.500", "2.500"],
        ["fltac", "**2.250**", "**2.250**"],
    ]
    assert "lower is better" in table
