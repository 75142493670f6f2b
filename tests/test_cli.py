"""The command line: exit codes, streams, paths; the API below it is a stand-in that notes what it was asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fltac.runtime
from fltac.cli import main
from fltac.config import Config, load_config
from fltac.errors import InputError, RunError
from fltac.records import ServerState
from fltac.runtime import run_directory
from fltac.runtime.checkpoint import save_checkpoint

CONFIG = "backbone: {name: x}\ntasks: [sst2, rte]\nfederation: {rounds: 2, seed: 5}\n"


def summary(config: Config) -> dict[str, Any]:
    seed = config.federation.seed
    score = {"metric": "accuracy", "score": 0.8 + seed / 100, "worst_client": 0.75, "n_eval": 9}
    return {
        "method": config.method,
        "rounds": config.federation.rounds,
        "seed": seed,
        "tasks": {"sst2": score, "rte": score},
        "mean_score": score["score"],
        "clustering": {"k": 2, "ari": 0.25, "accuracy": 0.5, "silhouette": None},
        "bytes_total": {"up": 1, "down": 2},
        "baselines": {"majority": {"sst2": 0.5, "rte": 0.6}},
    }


class StandIn:
    """The experiment module as the command line uses it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: BaseException | None = None

    def run(self, config: Config, out: Path, progress: Any) -> SimpleNamespace:
        self.calls.append(("run", config.federation.seed, config.method, str(out)))
        print("a library talks")
        directory = run_directory.create(out, config)
        if self.fail is not None:
            raise self.fail
        directory.write_summary(summary(config))
        return SimpleNamespace(directory=out, summary=summary(config))

    def resume(self, directory: Path, progress: Any) -> SimpleNamespace:
        self.calls.append(("resume", str(directory)))
        if self.fail is not None:
            raise self.fail
        return SimpleNamespace(directory=directory, summary=summary(run_directory.open_existing(directory).config))

    def evaluate(self, directory: Path, progress: Any, overrides: list[str]) -> dict[str, Any]:
        self.calls.append(("evaluate", str(directory), *overrides))
        if self.fail is not None:
            raise self.fail
        whole = summary(run_directory.open_existing(directory).config)
        return {key: whole[key] for key in ("tasks", "mean_score", "clustering")}

    def export(self, directory: Path, out: Path) -> list[Path]:
        self.calls.append(("export", str(directory), str(out)))
        return [out / "cluster-0", out / "cluster-1"]

    def partition_of(self, config: Config) -> SimpleNamespace:
        rows = {("c0", "sst2"): np.arange(3), ("c1", "sst2"): np.arange(1), ("c1", "rte"): np.arange(4)}
        return SimpleNamespace(
            clients=("c0", "c1"),
            rows=rows,
            client_tasks=lambda client: tuple(task for owner, task in rows if owner == client),
        )


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    stand_in, module = StandIn(), ModuleType("fltac.runtime.experiment")
    for name in ("run", "resume", "evaluate", "export", "partition_of"):
        setattr(module, name, getattr(stand_in, name))
    monkeypatch.setitem(sys.modules, "fltac.runtime.experiment", module)
    monkeypatch.setattr(fltac.runtime, "experiment", module, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG)
    return stand_in


def call(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_run_prints_the_table(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "a.yaml", "federation.seed=3", "--out", "out") == 0
    assert api.calls == [("run", 3, "fltac", "out")]
    captured = capsys.readouterr()
    for text in ("sst2", "accuracy", "0.830", "0.750", "0.600", "ARI 0.250", "out"):
        assert text in captured.out
    assert "fltac, seed 3: out" in captured.err


def test_default_folders(api: StandIn) -> None:
    assert call("run", "a.yaml", "method=fedit") == 0
    assert call("run", "a.yaml", "output.dir=chosen") == 0
    assert call("run", "a.yaml", "output.dir=chosen", "--out", "stronger") == 0
    assert [folder for *_, folder in api.calls] == ["runs/a-fedit", "chosen", "stronger"]


def test_json_keeps_stdout_clean(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "a.yaml", "--out", "out", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"directory": "out", **summary(load_config("a.yaml"))}
    assert "a library talks" in captured.err


def test_seeds_each_get_a_folder(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "a.yaml", "--out", "out", "--seeds", "3") == 0
    assert api.calls == [("run", seed, "fltac", f"out/seed-{seed}") for seed in (5, 6, 7)]
    assert load_config("out/seed-6/config.yaml").federation.seed == 6
    # Scores .85, .86, .87.
    assert "0.860 ± 0.010" in capsys.readouterr().out
    assert call("run", "a.yaml", "--out", "out2", "--seeds", "1", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["directory"] == "out2"
    assert [run["directory"] for run in tree["runs"]] == ["out2/seed-5"]


def test_nothing_starts_if_one_seed_is_there_already(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "a.yaml", "--out", "out/seed-6") == 0
    assert call("run", "a.yaml", "--out", "out", "--seeds", "2") == 2
    assert len(api.calls) == 1
    expected = "error: out/seed-6 is not empty; continue it with `fltac resume out/seed-6`, or choose another folder"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_wrong_input_is_one_line_and_code_2(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        (["run", "b.yaml"], "error: config b.yaml: no such file"),
        (["run", "a.yaml", "lora.rnk=3"], "error: lora.rnk: unknown key; did you mean lora.rank?"),
        (["run"], "error: Missing argument 'CONFIG'. (see `fltac run --help`)"),
        (["run", "a.yaml", "--seeds", "0"], "error: Invalid value for '--seeds'"),
        (["runn"], "error: No such command 'runn'."),
        (["resume", "nowhere"], "error: run directory nowhere: no such folder"),
        (["compare", "nowhere"], "error: nowhere: no such folder"),
        (["partition", "a.yaml", "--plot", "x.bmp"], "error: --plot: x.bmp: unknown kind of figure"),
    ]
    for arguments, message in lines:
        assert call(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(message)
        assert captured.err.count("\n") == 1
    assert api.calls == []


def test_failures_while_running(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    api.fail = RunError("client c3 stopped\nanswering")
    assert call("run", "a.yaml", "--out", "a") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: client c3 stopped answering"
    api.fail = InputError("tasks.sst2.label: got 7")
    assert call("run", "a.yaml", "--out", "b") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: tasks.sst2.label: got 7"
    api.fail = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["run", "a.yaml", "--out", "c"])


def test_interrupt_says_how_to_go_on(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    api.fail = KeyboardInterrupt()
    assert call("run", "a.yaml", "--out", "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped before there was a checkpoint in out"
    save_checkpoint(Path("out"), ServerState(1, {}, ()), {})
    message = "stopped; the last checkpoint lies at out/checkpoints/round-0001: continue with `fltac resume out`"
    assert call("resume", "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_resume_and_evaluate(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory.create(Path("out"), load_config("a.yaml"))
    assert call("resume", "out") == 0
    assert "0.850" in capsys.readouterr().out
    assert call("resume", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["directory"] == "out"
    assert call("evaluate", "out") == 0
    assert "0.850" in capsys.readouterr().out
    assert call("evaluate", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["mean_score"] == pytest.approx(0.85)
    assert call("evaluate", "out", "evaluation.generation.max_rows=3") == 0
    overridden = ("evaluate", "out", "evaluation.generation.max_rows=3")
    assert api.calls == [("resume", "out")] * 2 + [("evaluate", "out")] * 2 + [overridden]
    api.fail = RunError("judge: it is down")
    assert call("evaluate", "out") == 1


def test_export_prints_the_folders(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", "out", "peft") == 0
    assert api.calls == [("export", "out", "peft")]
    assert capsys.readouterr().out == "peft/cluster-0\npeft/cluster-1\n"


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    """The table of several seeds holds a plus-minus sign."""
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        tasks = {"a": {"metric": "accuracy", "score": 0.5 + seed / 10, "worst_client": 0.5, "n_eval": 4}}
        summary = {"method": "fltac", "rounds": 1, "seed": seed, "tasks": tasks, "mean_score": 0.5, "clustering": None}
        (folder / "summary.json").write_text(json.dumps({**summary, "bytes_total": {"up": 1, "down": 1}}))
    command = [sys.executable, "-m", "fltac", "compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert b"0.550 ? 0.071" in done.stdout


def test_partition(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("partition", "a.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "tasks": ["sst2", "rte"],
        "clients": {"c0": {"sst2": 3}, "c1": {"sst2": 1, "rte": 4}},
    }
    pytest.importorskip("matplotlib")
    assert call("partition", "a.yaml", "--plot", "shares.png") == 0
    captured = capsys.readouterr()
    assert Path("shares.png").stat().st_size > 0
    assert "wrote shares.png" in captured.err
    assert [line.count("4") for line in captured.out.splitlines() if "c1" in line] == [1]


def test_compare(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "a.yaml", "--out", "all/one") == 0
    assert call("run", "a.yaml", "method=fedit", "federation.seed=0", "--out", "all/two") == 0
    capsys.readouterr()
    assert call("compare", "all/one", "all/two") == 0
    table = capsys.readouterr().out
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")] == [
        *["method", "majority", "fedit", "fltac"]
    ]
    assert call("compare", "all", "--json") == 0
    assert [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["fedit", "fltac"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"fltac {fltac.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'peft', 'matplotlib', 'numpy'}"
    for arguments in (["--help"], [], ["run", "--help"], ["compare", "--help"]):
        code = (
            "import sys\nfrom fltac.cli import main\n"
            f"try:\n    main({arguments!r})\n"
            f"finally:\n    print('heavy', sorted({heavy} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Usage: fltac" in done.stdout
        assert done.stdout.splitlines()[-1] == "heavy []"


def test_python_dash_m() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", "fltac", "resume", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: run directory nowhere: no such folder\n"
