"""The rules of aggregation against dense products in NumPy."""

import numpy as np
import pytest

from fltac.config import AggregationConfig
from fltac.records import Adapter, base_of
from fltac.server.aggregation import Part, combined, product_error
from fltac.server.aggregation.parts import decomposed

SHAPES = {"one": (7, 5), "two": (4, 6)}
"""Outputs and inputs of two adapted matrices."""
RANK = 3


def normal(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.normal(size=shape).astype(np.float32)


def factors(seed: int, rank: int = RANK) -> dict[str, np.ndarray]:
    """Random factors and a head; those of a smaller rank are filled up with zeros."""
    draw, out = np.random.default_rng(seed), {}
    for name, (outputs, inputs) in SHAPES.items():
        out[f"{name}.lora_A"], out[f"{name}.lora_B"] = normal(draw, RANK, inputs), normal(draw, outputs, RANK)
        out[f"{name}.lora_A"][rank:] = 0
        out[f"{name}.lora_B"][:, rank:] = 0
    out["head.2.weight"] = normal(draw, 2, 3)
    return out


def base(seed: int, rank: int = 2) -> dict[str, np.ndarray]:
    draw, out = np.random.default_rng(seed), {}
    for name, (outputs, inputs) in SHAPES.items():
        out[f"{name}.base_A"], out[f"{name}.base_B"] = normal(draw, rank, inputs), normal(draw, outputs, rank)
    return out


def members(*ranks: int, bases: tuple[Adapter, ...] = ()) -> list[Part]:
    """One member for each rank, with weights 1, 2, 3 and so on."""
    return [Part(factors(seed, rank), bases[seed] if bases else {}, float(seed + 1)) for seed, rank in enumerate(ranks)]


def dense(adapter: Adapter, module: str) -> np.ndarray:
    """All that an adapter adds to one matrix."""
    out = adapter[f"{module}.lora_B"].astype(np.float64) @ adapter[f"{module}.lora_A"].astype(np.float64)
    if f"{module}.base_A" in adapter:
        out = out + adapter[f"{module}.base_B"].astype(np.float64) @ adapter[f"{module}.base_A"].astype(np.float64)
    return out


def mean_product(parts: list[Part], module: str) -> np.ndarray:
    weights = [part.weight for part in parts]
    return np.average([dense({**part.adapter, **part.base}, module) for part in parts], axis=0, weights=weights)


def dense_error(parts: list[Part], result: Adapter) -> float:
    """As ``product_error`` says it, from formed products."""
    exact = {module: mean_product(parts, module) for module in SHAPES}
    missed = sum(np.sum((dense(result, module) - exact[module]) ** 2) for module in SHAPES)
    return float(np.sqrt(missed / sum(np.sum(matrix**2) for matrix in exact.values())))


def by(rule: str, parts: list[Part], fresh: Adapter | None = None) -> Adapter:
    config = AggregationConfig.model_validate({"rule": rule})
    return combined(parts, config, fresh or fresh_factors())


def fresh_factors() -> Adapter:
    return {
        name: np.zeros_like(x) if name.endswith("B") else x for name, x in factors(99).items() if "head" not in name
    }


@pytest.mark.parametrize("rule", ["mean", "hetlora", "flexlora", "flora", "fedex"])
def test_heads_are_averaged_by_weight(rule: str) -> None:
    parts = members(3, 3, 3)
    expected = np.average([part.adapter["head.2.weight"] for part in parts], axis=0, weights=[1, 2, 3])
    np.testing.assert_allclose(by(rule, parts)["head.2.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_error_of_averaged_factors() -> None:
    parts = members(3, 3, 3)
    result = by("mean", parts)
    assert dense_error(parts, result) > 0.3
    assert product_error([(parts, result)], seed=0) == pytest.approx(dense_error(parts, result), rel=1e-6)


def test_the_error_over_clusters_adds_their_squares() -> None:
    """One cluster of one member, which is exact, and one of two."""
    alone, pair = members(3), [Part(factors(5), {}, 1.0), Part(factors(6), {}, 3.0)]
    found = product_error([(alone, by("mean", alone)), (pair, by("mean", pair))], seed=0)
    exact = [sum(np.sum(mean_product(parts, name) ** 2) for name in SHAPES) for parts in (alone, pair)]
    assert found == pytest.approx(dense_error(pair, by("mean", pair)) * np.sqrt(exact[1] / sum(exact)), rel=1e-6)


def test_the_error_of_many_members_is_estimated() -> None:
    parts = members(*[3] * 60)
    for rule in ("mean", "flexlora"):
        result = by(rule, parts)
        assert product_error([(parts, result)], seed=0) == pytest.approx(dense_error(parts, result), rel=0.15)
    assert product_error([(parts, by("fedex", parts))], seed=0) < 1e-5  # type: ignore[operator]


def test_the_error_of_nothing_learned_is_undefined() -> None:
    parts = [Part(fresh_factors(), {}, 1.0)]
    assert product_error([(parts, by("mean", parts))], seed=0) is None
    assert product_error([], seed=0) is None


def test_one_a_makes_the_mean_exact() -> None:
    """FFA-LoRA: all members have the same A."""
    shared = {name: x for name, x in factors(50).items() if name.endswith("lora_A")}
    parts = [Part({**part.adapter, **shared}, {}, part.weight) for part in members(3, 3, 3)]
    result = by("ffa", parts)
    for name, tensor in shared.items():
        np.testing.assert_array_equal(result[name], tensor)
    assert dense_error(parts, result) < 1e-6


def test_flexlora_is_the_best_approximation_of_every_rank() -> None:
    parts = members(3, 1, 2)
    result = by("flexlora", parts)
    for module in SHAPES:
        exact = mean_product(parts, module)
        u, values, v = np.linalg.svd(exact)
        for rank in (1, 2, 3):
            cut = {
                f"{module}.lora_A": result[f"{module}.lora_A"][:rank],
                f"{module}.lora_B": result[f"{module}.lora_B"][:, :rank],
            }
            np.testing.assert_allclose(dense(cut, module), u[:, :rank] * values[:rank] @ v[:rank], atol=1e-5)
    assert product_error([(parts, result)], seed=0) == pytest.approx(dense_error(parts, result), rel=1e-5)


def test_flexlora_is_exact_at_full_rank_and_leaves_room_to_learn() -> None:
    """Members of rank 1 and 1 together have no more than the cluster's rank of 3."""
    parts, fresh = members(1, 1), fresh_factors()
    result = by("flexlora", [*parts], fresh)
    assert dense_error(parts, result) < 1e-6
    lonely = by("flexlora", members(1)[:1], fresh)
    assert (np.abs(lonely["one.lora_A"]).sum(axis=1) > 0.1).all(), "a row of zeros would stay zero for ever"


@pytest.mark.parametrize("rule", ["flora", "fedex"])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_goes_into_the_frozen_weights_makes_the_mean_exact(rule: str, earlier: bool) -> None:
    """Also where the members come from clusters with different bases."""
    old = base(70)
    parts = members(3, 3, 3, bases=(old, base(71, 1), old) if earlier else ())
    result = by(rule, parts)
    for module in SHAPES:
        np.testing.assert_allclose(dense(result, module), mean_product(parts, module), atol=1e-5)
    assert product_error([(parts, result)], seed=0) < 1e-5  # type: ignore[operator]
    for name, tensor in base_of(result).items():
        assert min(tensor.shape) <= min(SHAPES[name.partition(".")[0]])
    factors_after = fresh_factors() if rule == "flora" else by("mean", parts)
    for name in fresh_factors():
        np.testing.assert_array_equal(result[name], factors_after[name])


def test_flora_mixes_ranks() -> None:
    parts = members(1, 3, 2)
    assert dense_error(parts, by("flora", parts)) < 1e-6


def test_a_lone_member_leaves_no_residual() -> None:
    assert base_of(by("fedex", members(3))) == {}


def test_hetlora_weighs_by_the_norms_of_the_products() -> None:
    parts = members(1, 3, 2)
    norms = [np.sqrt(sum(np.sum(dense(part.adapter, name) ** 2) for name in SHAPES)) for part in parts]
    weights = [part.weight * norm for part, norm in zip(parts, norms, strict=True)]
    result = by("hetlora", parts)
    for name in fresh_factors():
        expected = np.average([part.adapter[name] for part in parts], axis=0, weights=weights)
        np.testing.assert_allclose(result[name], expected, rtol=1e-5, atol=1e-6)
    lower = by("hetlora", members(1, 2), fresh_factors())
    for name in SHAPES:
        np.testing.assert_array_equal(lower[f"{name}.lora_A"][2], fresh_factors()[f"{name}.lora_A"][2])
        assert not lower[f"{name}.lora_B"][:, 2].any(), "the product stays"
        assert not np.array_equal(lower[f"{name}.lora_A"][1], fresh_factors()[f"{name}.lora_A"][1])
    nothing = [Part(fresh_factors(), {}, 1.0), Part({**fresh_factors()}, {}, 1.0)]
    np.testing.assert_array_equal(by("hetlora", nothing)["one.lora_A"], fresh_factors()["one.lora_A"])


@pytest.mark.parametrize("columns", [2, 9])
def test_a_decomposition_without_the_product_is_that_of_the_product(columns: int) -> None:
    draw = np.random.default_rng(0)
    b, a = draw.normal(size=(7, columns)), draw.normal(size=(columns, 5))
    u, values, v = decomposed(b, a)
    np.testing.assert_allclose(u * values @ v, b @ a, atol=1e-10)
    np.testing.assert_allclose(values, np.linalg.svd(b @ a)[1][: len(values)], atol=1e-10)
