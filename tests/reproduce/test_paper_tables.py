"""Tables from tiny runs: what they say, what is run again, and what is refused before anything is run."""

import csv
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from fltac.config import load_config
from fltac.errors import InputError
from fltac.model.backbone import load_backbone
from fltac.report.results import Result
from fltac.reproduce import comparison, paper, runs
from fltac.reproduce.order import sort_overrides
from fltac.reproduce.registry import reproduce
from fltac.runtime import experiment
from fltac.runtime.progress import Silent
from reproduce.experiments import order, read

METHODS = "methods=zero,fedit,fltac-paper,oracle"


@pytest.fixture(scope="module")
def table1(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "table1"
    reproduce(order("table1", out, tiny, METHODS), Silent())
    return out


def rows_of(out: Path, name: str = "table1") -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["task"]): row for row in read(out / f"{name}.json")["rows"]}


def test_scores_stand_beside_the_papers(table1: Path) -> None:
    rows = rows_of(table1)
    assert {method for method, _ in rows} == {"majority", "zero", "fedit", "fltac-paper", "oracle"}
    summary = read(table1 / "glue" / "fltac-paper" / "seed-0" / "summary.json")
    ours = rows["fltac-paper", "rte"]
    assert ours["ours"] == summary["tasks"]["rte"]["score"]
    assert (ours["paper"], ours["metric"], ours["seeds"], ours["std"]) == (0.532, "accuracy", 1, None)
    assert rows["majority", "sst2"]["ours"] == summary["baselines"]["majority"]["sst2"]
    assert rows["fedit", "sst2"]["paper"] == 0.652
    assert rows["oracle", "rte"]["paper"] is None
    assert rows["fltac-paper", "digits-high"]["paper"] is None, "a task that the paper does not have"
    written = list(csv.DictReader((table1 / "table1.csv").open()))
    assert [float(row["ours"]) for row in written] == [row["ours"] for row in rows.values()]


def test_the_table_says_what_differs(table1: Path) -> None:
    """Configs of the two scales differ in rounds here; sizes are 60 and 30 rows for 2,490 and 277."""
    differs = rows_of(table1)["fedit", "rte"]["differs"]
    assert "2 rounds for 5" in differs
    assert "rte: 2.4% of the training rows, rte: 10.8% of the validation rows" in differs
    assert "one seed" in differs
    assert "rank" not in differs, "the two scales have the same one"
    text = (table1 / "table1.md").read_text()
    assert "A (glue): data rte: 2.4% of the training rows" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    below = next(cells[row + 1] for row, line in enumerate(cells) if line[1] == "fedit")
    assert below[1:5] == ["", "paper", "0.524", "0.652"]


def test_a_row_says_where_its_method_differs_otherwise(tiny: Path, tmp_path: Path) -> None:
    """``central`` has a rate and a schedule of its own at the small scale, and the tasks are none of the paper's."""
    configs = tmp_path / "configs"
    shutil.copytree(tiny, configs)
    path = configs / "cifar-vit-small.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["lora"]["dropout"] = 0.1
    tree["methods"] = {"central": {"training": {"lr": 0.001, "schedule": "linear"}, "federation": {"rounds": 5}}}
    path.write_text(yaml.safe_dump(tree))
    overrides = sort_overrides((), parts=("cifar",))
    wanted = order("table1", tmp_path / "out", configs)
    chosen = {
        method: runs.runs_of(wanted, "cifar", [method], overrides)[0].config
        for method in ("fltac-paper", "fltac", "central")
    }
    theirs = {method: load_config(configs / "cifar-vit.yaml", [f"method={method}"]) for method in chosen}
    results = {method: Result(method, method, ()) for method in chosen}
    block = comparison.Block("cifar", chosen, results, {"digits-high": (50, 20)})
    common = comparison.common_differences(block, theirs)
    assert common == [
        "data digits-high: 50 rows, scored on 20, not a task of the paper",
        "2 rounds for 5",
        "0.1 dropout for 0.0",
    ]
    own = comparison.own_differences(block, "central", theirs)
    assert own[:-1] == ["5 rounds as there", "0.001 learning rate for 0.005", "linear schedule for constant"]
    assert comparison.own_differences(block, "fltac-paper", theirs)[:-1] == []
    own = comparison.own_differences(block, "fltac", theirs)
    assert own[:-1] == ["20 batches of gradients beside the steps"]


def test_what_is_finished_is_not_run_again(table1: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (table1 / "table1.json").read_bytes()
    monkeypatch.setattr(experiment, "run", lambda *_: pytest.fail("everything is finished"))
    reproduce(order("table1", table1, tiny, METHODS), Silent())
    assert (table1 / "table1.json").read_bytes() == before


def test_seeds_give_mean_and_deviation(tiny: Path, tmp_path: Path) -> None:
    made, _ = reproduce(order("table2", tmp_path / "out", tiny, "methods=fedit", seeds=3), Silent())
    scores = [
        read(tmp_path / "out" / "dolly" / "fedit" / f"seed-{seed}" / "summary.json")["tasks"]["sst2"]["score"]
        for seed in range(3)
    ]
    row = rows_of(tmp_path / "out", "table2")["fedit", "sst2"]
    assert row["ours"] == pytest.approx(statistics.mean(scores))
    assert row["std"] == pytest.approx(statistics.stdev(scores))
    assert row["seeds"] == 3
    assert "3 seeds" in row["differs"]
    ours = next(line for line in made.table if line[0] == "fedit")
    assert f"{row['ours']:.3f} ± {row['std']:.3f}" in ours
    assert made.table[made.table.index(ours) + 1][1] == "paper"


def test_an_interrupted_table_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second method's run is stopped; the first one's is kept and not run again."""
    ran: list[str] = []
    real = experiment.run

    def stopping(config: Any, out: Any, *rest: Any) -> Any:
        ran.append(config.method)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(config, out, *rest)

    monkeypatch.setattr(experiment, "run", stopping)
    wanted = order("table2", tmp_path / "out", tiny, "methods=zero,fedit")
    with pytest.raises(KeyboardInterrupt):
        reproduce(wanted, Silent())
    reproduce(wanted, Silent())
    assert ran == ["zero", "fedit", "fedit"]
    assert ("fedit", "rte") in rows_of(tmp_path / "out", "table2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods=zero,fedti"], "methods: got 'fedti'; allowed are zero, local, fedit"),
        (["method=fedit"], "method: not allowed here; methods=a,b says which methods are run"),
        (["lora.ranq=2"], "lora.ranq: unknown key; did you mean lora.rank?"),
        (["glue.data_root=${NO_SUCH_VARIABLE}/data"], "NO_SUCH_VARIABLE, which is not set"),
        (["cifar.backbone.name=results/models/nothing"], "'results/models/nothing': there is no such folder; relative"),
        (["cifar.backbone.name=/no/such/model"], "backbone.name: '/no/such/model': there is no such folder"),
        (["cifar.tasks={own: {kind: image, path: /no/rows, columns: [img], label: y}}"], "'/no/rows': no such file"),
        (["glue.data_root=/no/such/folder"], "data_root: '/no/such/folder': there is no folder"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(
    overrides: list[str], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message.replace("$", r"\$")) as caught:
        reproduce(order("table1", tmp_path / "out", tiny, *overrides), Silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_settings_is_refused(table1: Path, tiny: Path) -> None:
    """The table's own file is moved away, so that it is the run directory that says no."""
    numbers = table1 / "table1.json"
    kept = numbers.read_bytes()
    numbers.unlink()
    try:
        with pytest.raises(InputError, match=r"belongs to another config: lora\.rank is 1 there, but 2"):
            reproduce(order("table1", table1, tiny, METHODS, "glue.lora.rank=2"), Silent())
    finally:
        numbers.write_bytes(kept)


def test_a_missing_experiment_is_named(tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "configs"
    empty.mkdir()
    with pytest.raises(InputError, match=r"glue-bert-small\.yaml: no such file"):
        reproduce(order("table1", tmp_path / "out", empty), Silent())


def test_a_hub_out_of_reach_is_named(tmp_path: Path) -> None:
    """The committed config of the paper's scale; the tests have no hub."""
    configs = Path(__file__).parents[2] / "configs" / "paper"
    config = load_config(configs / "glue-bert.yaml")
    with pytest.raises(InputError, match=r"'nyu-mll/glue/qnli' could not be loaded .*with data_root= .*local files"):
        experiment.run(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"google-bert/bert-base-cased' cannot be loaded.*local Hugging Face folder"):
        load_backbone(config.backbone, "text")
    assert not (tmp_path / "run").exists()


def test_settings_for_one_experiment(tiny: Path, tmp_path: Path) -> None:
    wanted = order("table1", tmp_path, tiny)
    overrides = sort_overrides(["lora.rank=2", "cifar.lora.rank=3"], parts=("glue", "cifar"))
    ranks = {part: runs.runs_of(wanted, part, ["fltac"], overrides)[0].config.lora.rank for part in ("glue", "cifar")}
    assert ranks == {"glue": 2, "cifar": 3}


def test_the_papers_mean_is_that_of_its_categories() -> None:
    """The printed means of Dolly's eight categories, to the paper's rounding."""
    for row in paper.JUDGED.values():
        categories = [score for name, score in row.items() if name != "mean"]
        assert len(categories) == 8
        assert statistics.mean(categories) == pytest.approx(row["mean"], abs=0.006)
