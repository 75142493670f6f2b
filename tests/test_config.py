"""Precedence of settings, presets, and one clear line for everything that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fltac.config import PRESETS, Config, load_config, parse_override, to_yaml
from fltac.errors import InputError

BASE: dict[str, Any] = {"backbone": {"name": "x"}, "tasks": ["sst2", "mrpc"]}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_k_defaults_to_the_number_of_tasks() -> None:
    assert load_config(BASE).clusters == 2
    assert load_config(BASE, ["server.clustering.k=7"]).clusters == 7


def test_the_file_wins_over_its_own_methods_preset() -> None:
    tree = {**BASE, "method": "fltac-paper", "server": {"aggregation": {"weighting": "examples"}}}
    config = load_config(tree)
    assert config.server.clustering.rule == "kmeans"
    assert config.server.aggregation.weighting == "examples"


def test_an_overriding_method_wins_over_the_file_and_loses_to_other_overrides() -> None:
    tree = {**BASE, "method": "fltac", "server": {"clustering": {"rule": "kmeans"}}}
    assert load_config(tree, ["method=fedit"]).server.clustering.rule == "single"
    assert load_config(tree, ["server.clustering.rule=none", "method=fedit"]).server.clustering.rule == "none"


@pytest.mark.parametrize(("name", "other", "own"), [("from_round", 3, 1), ("shrinkage", 0.5, 0.0)])
def test_an_overriding_method_sends_means_as_it_does_itself(name: str, other: float, own: float) -> None:
    tree = {**BASE, "server": {"aggregation": {name: other}}}
    assert getattr(load_config(tree).server.aggregation, name) == other
    for method in PRESETS:
        assert getattr(load_config(tree, [f"method={method}"]).server.aggregation, name) == own, method


@pytest.mark.parametrize("before", PRESETS)
@pytest.mark.parametrize("after", PRESETS)
def test_nothing_of_another_method_is_left_over(before: str, after: str) -> None:
    """A resolved config of one method, run with another one, is that other one."""
    resolved = yaml.safe_load(to_yaml(load_config(BASE, [f"method={before}"])))
    assert load_config(resolved, [f"method={after}"]) == load_config(BASE, [f"method={after}"])


def test_pooled_methods_ignore_participation() -> None:
    assert load_config(BASE, ["federation.participation=0.3"]).server_settings.participation == 0.3
    overrides = ["federation.participation=0.3", "method=central"]
    assert load_config(BASE, overrides).server_settings.participation == 1.0


def test_full_fine_tuning_has_a_rate_of_its_own() -> None:
    tree = {**BASE, "training": {"lr": 1e-3}}
    assert load_config(tree, ["method=central-full"]).training.peak_lr == 5e-5
    assert load_config(tree, ["method=central"]).training.peak_lr == 1e-3


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (3, "methods: got 3"),
        ({"fedit": 3}, "methods.fedit: got 3"),
        ({"fedti": {}}, "did you mean fedit"),
        ({"fedit": {"lora": {"rnk": 5}}}, "methods.fedit.lora.rnk: unknown key; did you mean methods.fedit.lora.rank"),
        ({"fedit": {"method": "local"}}, "methods.fedit.method: not allowed"),
    ],
)
def test_wrong_settings_for_a_method_that_is_not_run(methods: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**BASE, "methods": methods})
    assert message in str(caught.value)


def test_settings_for_a_method_may_be_overridden() -> None:
    assert load_config(BASE, ["method=fedit", "methods.fedit.lora.rank=5"]).lora.rank == 5
    assert load_config(BASE, ["methods.fedit.lora.rank=5"]).lora.rank == 1


def test_a_section_that_is_no_mapping_is_refused_whatever_the_method() -> None:
    with pytest.raises(InputError, match="federation: got 3"):
        load_config({**BASE, "federation": 3}, ["method=central"])


def test_settings_for_one_method_hold_for_it_alone() -> None:
    tree = {**BASE, "lora": {"rank": 1}, "methods": {"fedit": {"lora": {"rank": 5}}}}
    assert load_config(tree).lora.rank == 1
    assert load_config(tree, ["method=fedit"]).lora.rank == 5
    assert load_config(tree, ["method=fedit", "lora.rank=3"]).lora.rank == 3


@pytest.mark.parametrize("method", PRESETS)
def test_a_resolved_config_read_again_is_the_same(method: str) -> None:
    config = load_config(BASE, [f"method={method}"])
    again = load_config(yaml.safe_load(to_yaml(config)))
    assert again == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_read(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_numbers_in_exponent_notation() -> None:
    assert load_config({**BASE, "training": {"lr": "2e-3"}}).training.lr == 0.002
    assert load_config(BASE, ["training.lr=2e-3"]).training.lr == 0.002


def test_rounds_and_communication_of_the_methods() -> None:
    configs = {name: load_config(BASE, [f"method={name}"]) for name in PRESETS}
    assert configs["zero"].rounds == 0
    assert configs["central"].rounds == 1
    assert configs["fltac"].rounds == 5
    silent = {name for name, config in configs.items() if not config.communicates}
    assert silent == {"local", "central", "central-single", "central-full", "zero"}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["federation.round=3"], ["federation.round", "unknown key", "federation.rounds"]),
        (["federatoin.rounds=3"], ["federatoin", "unknown key", "federation"]),
        (["training.lr=-1"], ["training.lr", "-1", "greater than 0"]),
        (["training.steps=many"], ["training.steps", "'many'", "integer"]),
        (["lora.rank=0"], ["lora.rank", "0", "greater than or equal to 1"]),
        (["method=fedti"], ["method", "'fedti'", "did you mean fedit?"]),
        (["server.clustering.k=auto", "method=fltac-paper"], ["server.clustering.k", "auto", "kmeans", "spectral"]),
        (["server.clustering.k=auto", "method=random"], ["server.clustering.k", "auto", "random"]),
        (["server.clustering.hysteresis=1"], ["server.clustering.hysteresis", "1", "less than 1"]),
        (["training.loss=focal"], ["training.loss", "'focal'", "'balanced'"]),
        (["federation.partition.client_skew=label"], ["federation.partition.client_skew", "'label'", "'labels'"]),
        (["server.clustering.rule=kmean"], ["server.clustering.rule", "'kmean'", "'kmeans'"]),
        (["federation.participation=0"], ["federation.participation", "0", "greater than 0"]),
        (["training.steps=3", "training.epochs=1"], ["training.steps", "training.epochs", "not both"]),
        (["training.trainable=all"], ["training.trainable", "federation.pool"]),
        (["tasks.sst2.colums=[a]"], ["tasks.sst2.colums", "tasks.sst2.columns"]),
        (["federation.partition.rule=table"], ["federation.partition.table"]),
        (["federation.rounds"], ["federation.rounds", "key=value"]),
        (["tasks=3"], ["tasks", "3"]),
        (["tasks=[rte, rte]"], ["tasks", "rte", "once"]),
        (["training.lr=.inf"], ["training.lr", "inf", "finite"]),
        (["training.lanes=foo"], ["training.lanes: got 'foo'"]),
        (["federation=3"], ["federation", "3"]),
        (["lora.rank=2", "lora.ranks={a: 1}"], ["lora.ranks", "'mean'", "hetlora, flexlora, flora can"]),
        (["method=fedex-lora", "lora.rank=2", "lora.ranks={a: 1}"], ["lora.ranks", "'fedex'", "flora can"]),
        (["method=flora", "lora.rank=2", "lora.ranks={a: 3}"], ["lora.ranks.a: got 3", "lora.rank=2"]),
        (["method=flora", "lora.ranks={a: 0}"], ["lora.ranks.a", "0", "greater than or equal to 1"]),
        (["method=flora", "server.aggregation.optimizer=fedadam"], ["'fedadam'", "'flora'", "mean, ffa, rolora"]),
        (["method=central-full", "server.aggregation.rule=flora"], ["'flora'", "training.trainable=all", "only mean"]),
        (
            ["method=central", "server.aggregation.rule=flora", "lora.rank=2", "lora.ranks={a: 1}"],
            ["lora.ranks", "federation.pool"],
        ),
        (["method=central", "server.aggregation.optimizer=fedavgm"], ["'fedavgm'", "federation.pool", "only none"]),
        (["method=central", "server.aggregation.rule=rolora"], ["'rolora'", "federation.pool"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(overrides: list[str], parts: list[str]) -> None:
    tree = {**BASE, "tasks": {"sst2": {"preset": "sst2"}}}
    with pytest.raises(InputError) as caught:
        load_config(tree, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_a_file_that_is_no_yaml_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_are_yaml() -> None:
    assert parse_override("a.b=[1, 2]") == {"a": {"b": [1, 2]}}
    assert parse_override("a=") == {"a": None}
