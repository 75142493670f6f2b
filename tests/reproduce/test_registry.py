"""Names, folders and extras: what is refused, and that nothing is overwritten."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fltac.cli import main
from fltac.errors import InputError
from fltac.reproduce import registry
from fltac.reproduce.order import sort_overrides
from fltac.reproduce.registry import ITEMS, reproduce
from fltac.reproduce_command import reproduce as reproduce_command
from fltac.runtime.progress import Silent
from reproduce.experiments import order

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["reproduce", *arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def test_help_names_what_there_is() -> None:
    (line,) = (line for line in (reproduce_command.__doc__ or "").splitlines() if "NAME:" in line)
    assert re.findall(r"[a-z]+\d|parameters", line) == list(ITEMS)


def test_the_command_prints_json_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command("parameters", "bert.lora.rank=2", "--json", "--out", str(out)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["computed"] == 5 * (2 * 36_864 + 1_538)
    assert printed["files"] == [str(out / f"parameters.{kind}") for kind in ("json", "csv", "md")]
    assert json.loads((out / "parameters.json").read_text())["rows"] == printed["rows"]
    assert (
        (out / "parameters.csv")
        .read_text()
        .splitlines()[1]
        .startswith("192010,376330,google-bert/bert-base-cased,2,5,")
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("table3", "did you mean table"), ("parametres", "did you mean parameters?"), ("x", "allowed are table1")],
)
def test_an_unknown_name(name: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: NAME: got '{name}'")
    assert hint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_fltac_data_the_small_scale_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLTAC_DATA", raising=False)
    code = command("figure4", "projection=pca", "--out", str(tmp_path / "out"), "--configs", str(CONFIGS))
    error = capsys.readouterr().err
    assert code == 2
    assert error == (
        "error: data_root: '${FLTAC_DATA}/data' uses the environment variable FLTAC_DATA, which is not set\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and not made by `fltac reproduce` \(there is thesis\.tex\)"):
        reproduce(order("parameters", tmp_path, CONFIGS), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        reproduce(order("parameters", tmp_path / "out", CONFIGS), Silent())


def test_what_was_made_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reproduce(order("parameters", out, CONFIGS), Silent())
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"was made with no settings of its own, not with lora\.rank=2"):
        reproduce(order("parameters", out, CONFIGS, "lora.rank=2"), Silent())
    with pytest.raises(InputError, match="belongs to --scale small; choose another folder for paper"):
        reproduce(order("parameters", out, CONFIGS, scale="paper"), Silent())
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    reproduce(order("parameters", out, CONFIGS), Silent())
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_fewer_seeds_do_not_replace_what_more_have_made(tmp_path: Path) -> None:
    """A single seed for figure3's default of ten would lose nine; more seeds go on from those there are."""
    quick = ("epochs=1", "points=3")
    out = tmp_path / "out"
    reproduce(order("figure3", out, CONFIGS, *quick, seeds=2), Silent())
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"was made from 2 seeds, not 1; choose another folder, or --seeds 2 or more"):
        reproduce(order("figure3", out, CONFIGS, *quick, seeds=1), Silent())
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    reproduce(order("figure3", out, CONFIGS, *quick), Silent())
    assert json.loads((out / "figure3.json").read_text())["seeds"] == 10


@pytest.mark.parametrize("name", ["parameters", "figure4"])
def test_seeds_that_would_be_ignored_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--seeds: got 3; {name} is made from one"):
        reproduce(order(name, tmp_path / "out", CONFIGS, seeds=3), Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_marker(content: str, tmp_path: Path) -> None:
    (tmp_path / "reproduce.json").write_text(content)
    with pytest.raises(InputError, match=r"--out: .*reproduce\.json"):
        reproduce(order("parameters", tmp_path, CONFIGS), Silent())


@pytest.mark.parametrize(
    ("name", "overrides", "module", "extra"),
    [("figure3", (), "matplotlib", "plot"), ("figure2", (), "matplotlib", "plot"), ("figure4", (), "umap", "umap")],
)
def test_a_missing_extra_is_named(
    name: str, overrides: tuple[str, ...], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(wanted: str, *rest: Any) -> Any:
        return None if wanted == module else real(wanted, *rest)

    monkeypatch.setattr(registry.importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=rf"{name}: needs {module}, which is not installed; install fltac\[{extra}\]"):
        reproduce(order(name, tmp_path / "out", CONFIGS, *overrides), Silent())
    assert not (tmp_path / "out").exists()


def test_overrides_are_sorted_by_what_they_are_for() -> None:
    sorted_ = sort_overrides(
        ["projection=pca", "lora.rank=2", "glue.lora.rank=3"], {"projection": ("umap", "pca")}, ("glue", "cifar")
    )
    assert sorted_.own == {"projection": "pca"}
    assert sorted_.config("glue") == ["lora.rank=2", "lora.rank=3"]
    assert sorted_.config("cifar") == ["lora.rank=2"]
    with pytest.raises(InputError, match="projection: got 'tsne'; allowed are umap, pca"):
        sort_overrides(["projection=tsne"], {"projection": ("umap", "pca")})
    with pytest.raises(InputError, match="expected key=value"):
        sort_overrides(["projection"])
