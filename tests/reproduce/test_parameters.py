"""The paper's printed parameter counts against formulas, and the committed configs against the real architectures."""

from pathlib import Path

import pytest

from fltac.config import load_config
from fltac.errors import InputError
from fltac.reproduce.architectures import adapter_parameters, architecture, linear_head, on_meta
from fltac.reproduce.order import Made
from fltac.reproduce.parameters import make
from fltac.runtime.progress import Silent
from reproduce.experiments import order

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
QV = 12 * 2 * (768 + 768)
"""Rank 1 on query and value of 12 layers x 768: A and B each have 768 numbers."""
HEAD = 2 * 768 + 2
LLAMA = 32 * 2 * (4096 + 4096)


def counted(*overrides: str) -> Made:
    return make(order("parameters", Path("unused"), CONFIGS, *overrides), Silent())


def test_the_printed_numbers_come_out_exactly() -> None:
    made = counted()
    rows = made.data["rows"]
    assert [(row["printed"], row["computed"]) for row in rows] == [
        (192_010, 192_010),
        (614_432, 614_432),
        (None, 591_362),
        (36_864, 36_864),
        (294_912, 294_912),
        (4_259_840, 4_259_840),
        (8_519_680, 8_519_680),
        (108_311_810, 108_311_810),
    ]
    assert [row["computed"] for row in rows[:7]] == [
        5 * (QV + HEAD),
        16 * (QV + HEAD),
        16 * QV + HEAD,
        QV,
        8 * QV,
        8 * (LLAMA + 2 * 4096),
        16 * (LLAMA + 2 * 4096),
    ]
    assert [(row["rank"], row["copies"], row["adapter"], row["head"]) for row in rows[:2]] == [
        (1, 5, 36_864, 1_538),
        (1, 16, 36_864, 1_538),
    ]
    assert made.table[1][:2] == ["192,010", "192,010"]


def test_overrides_change_them() -> None:
    computed = [row["computed"] for row in counted("lora.rank=2").data["rows"]]
    assert computed[:5] == [5 * (2 * QV + HEAD), 16 * (2 * QV + HEAD), 2 * QV + HEAD, 2 * QV, 2 * QV]
    assert computed[-1] == 108_311_810, "the whole model has no rank"
    said = [row["differs"] for row in counted("lora.rank=2").data["rows"]]
    assert said[:2] == ["rank 2 for 1", "rank 2 for 1"]
    assert said[2] == "rank 2 for 16; the head once; printed is the row above"
    assert said[-1] == "nothing"
    assert counted().table[1][-1] == "nothing"
    assert counted("vit.lora.layers=[0]").data["rows"][3]["differs"] == "lora.layers [0]"
    one = [row["computed"] for row in counted("vit.lora.layers=[0]", "llama.lora.targets=[q_proj]").data["rows"]]
    assert one[0] == 5 * (QV + HEAD)
    assert one[3] == QV // 12
    assert one[5] == 8 * (LLAMA // 2 + 2 * 4096)


def test_a_local_folder_stands_in_for_a_backbone(tiny_bert: Path) -> None:
    """2 layers x 16."""
    rows = counted(f"bert.backbone.name={tiny_bert}").data["rows"]
    assert rows[0]["computed"] == 5 * (2 * 2 * 32 + 2 * 16 + 2)
    assert rows[3]["computed"] == QV


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.rounds=3", "federation.rounds: does not change a count; allowed are lora"),
        ("lora.rank=0", "rank: got 0"),
        ("lora.targets=[nothing]", "lora.targets: 'nothing' matches no linear layer"),
        ("bert.backbone.name=no/such", "backbone.name: got 'no/such'; allowed are google-bert/bert-base-uncased"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        counted(override)


@pytest.mark.parametrize("method", ["fltac-paper", "fedit"])
def test_the_papers_config_has_the_papers_counts(method: str) -> None:
    """On the architecture that the config itself names; the pooler is frozen and counts for nothing."""
    config = load_config(CONFIGS / "glue-bert.yaml", [f"method={method}"])
    model = on_meta(architecture(config.backbone.name))
    adapter = adapter_parameters(model, config.lora)
    head = linear_head(768, 2, bias=True)
    assert adapter == {"fltac-paper": QV, "fedit": 16 * QV}[method]
    assert len(config.tasks) * (adapter + head) == {"fltac-paper": 192_010, "fedit": 5 * 591_362}[method]
    assert config.lora.scaling == 16
    assert (config.federation.clients, config.federation.partition.alpha) == (10, 0.5)
    assert config.backbone.pooling == "pooler"


@pytest.mark.parametrize("name", ["glue-bert", "cifar-vit"])
def test_every_value_of_the_papers_config_says_where_it_is_from(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if line.strip() and not line.startswith("#") and not line.rstrip().endswith(":")]
    unmarked = [line for line in values if not any(f"# {mark}" in line for mark in ("paper", "public code", "ours"))]
    assert not unmarked
