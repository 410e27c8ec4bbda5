"""Rotary settings as files have them: in one schema, in the other, or in both."""

import math
from typing import Any

import pytest

from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import UnsupportedModel
from tests.families.configs import written

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(family: str = "llama", **rope: Any) -> Any:
    config = {
        k: v for k, v in written(family).items() if k not in ("rope_parameters", "rope_theta")
    }
    return architecture({**config, **rope}).ropes


def old(kind: dict[str, Any]) -> dict[str, Any]:
    """With `type`, as before transformers 4.45."""
    return {("type" if name == "rope_type" else name): value for name, value in kind.items()}


@pytest.mark.parametrize("kind", [LLAMA3, YARN, LONGROPE])
def test_both_schemas_that_agree(kind: dict[str, Any]) -> None:
    new = read(rope_parameters={**kind, "rope_theta": 5e5})
    assert new == read(rope_scaling=old(kind), rope_theta=500000)
    assert new == read(
        rope_scaling=kind, rope_theta=5e5, rope_parameters={**kind, "rope_theta": 5e5}
    )
    assert new == read(rope_theta=5e5, rope_parameters={**kind, "rope_theta": 5e5})
    assert new == read(rope_theta=5e5, rope_parameters=kind, rope_scaling=None)
    assert new == read(rope_theta=5e5, rope_parameters={**kind, "type": kind["rope_type"]})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        # transformers would take the base of rope_scaling, which is the usual one.
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "type": "linear"}},
    ],
)
def test_a_conflict(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"(rope_parameters=|rope type ).* and .*"):
        read(**rope)


def test_both_schemas_where_layers_differ() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    parts = {FULL: {**scaling, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    new = read("gemma3_text", rope_parameters=parts)
    both = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    assert new == read("gemma3_text", **both) == read("gemma3_text", **both, rope_parameters=parts)
    with pytest.raises(UnsupportedModel, match=r"rope_theta=1000000.0 differ"):
        read(
            "gemma3_text",
            **both,
            rope_parameters={**parts, SLIDING: {"rope_theta": 1e6}, FULL: {"rope_theta": 9e5}},
        )
    with pytest.raises(UnsupportedModel, match=r"rope_parameters=.* other parts than"):
        read("gemma3_text", rope_parameters=scaling)  # of which transformers takes no notice


@pytest.mark.parametrize("wrong", [None, math.nan, math.inf, 0, -1.0, "8", True, [8.0], 10**400])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({"rope_type": "linear", "factor": 4.0}, "factor"),
        ({"rope_type": "dynamic", "factor": 4.0}, "factor"),
        *((LLAMA3, name) for name in LLAMA3 if name != "rope_type"),
        (YARN, "factor"),
        (YARN, "original_max_position_embeddings"),
        (LONGROPE, "original_max_position_embeddings"),
        (LONGROPE, "long_factor"),
        (LLAMA3, "rope_theta"),
    ],
)
def test_a_number_that_is_none(kind: dict[str, Any], name: str, wrong: Any) -> None:
    read(rope_parameters=kind)
    with pytest.raises(UnsupportedModel, match=f"{name}=|{name} has 1 numbers"):
        read(rope_parameters={**kind, name: wrong})


@pytest.mark.parametrize("name", ["beta_fast", "beta_slow", "mscale", "attention_factor"])
def test_null_where_transformers_has_a_default_for_it(name: str) -> None:
    assert read(rope_parameters={**YARN, name: None}) == read(rope_parameters=YARN)
    assert read(rope_parameters={**LONGROPE, "factor": None}) == read(rope_parameters=LONGROPE)


@pytest.mark.parametrize("value", [None, 1, "false"])
def test_truncate_is_true_or_false(value: Any) -> None:
    with pytest.raises(UnsupportedModel, match="truncate="):
        read(rope_parameters={**YARN, "truncate": value})


@pytest.mark.parametrize("kind", [None, 3, ["yarn"], "spiral"])
def test_a_kind_that_is_none(kind: Any) -> None:
    with pytest.raises(UnsupportedModel, match="rope type"):
        read(rope_parameters={"rope_type": kind, "factor": 2.0})


def test_dynamic_ntk_changes_nothing_up_to_the_context() -> None:
    assert read(rope_scaling={"type": "dynamic", "factor": 4.0}) == read()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_kinds_that_phi_has_not(kind: str) -> None:
    kinds = {"llama3": LLAMA3}
    with pytest.raises(UnsupportedModel, match=r"rope type|long_factor"):
        read("phi3", rope_parameters=kinds.get(kind, {"rope_type": kind, "factor": 4.0}))


def test_layers_without_rotation_are_not_made_longer_either() -> None:
    """EXAONE: the attention factor of yarn is for layers that turn."""
    full, still = read("exaone4", rope_parameters={**YARN, "rope_theta": 1e4}, sliding_window=5)
    assert full.attention_factor > 1 and (still.kind, still.attention_factor) == ("none", 1.0)
