"""Edits in the weights: the logits are those of the same edits of the stream, or it is refused."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_refusal as jr
from jax_refusal import sharding
from jax_refusal.edits import EditError
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import INSIDE, POST_NORM, WRITES, Leaf, Param
from jax_refusal.models.spec import Architecture, Moe
from jax_refusal.study import orthogonalize as weights
from jax_refusal.study.directions import DirectionError
from jax_refusal.study.orthogonalize import WeightEditError, bake_addition, orthogonalize
from tests import oracle, tiny
from tests.models.cases import CASES, fields
from tests.tolerances import BFLOAT16, PARITY, ROUNDING, assert_close, largest

L, D = 4, 64
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "head_width": {"head_dim": 24},
    "mistral_window": {"architecture": "mistral", "sliding_window": 7},
    "qwen2_tied": {"architecture": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architecture": "qwen3"},
    "gemma": {"architecture": "gemma"},
    "phi3": {"architecture": "phi3"},
    "smollm3": {"architecture": "smollm3", "no_rope_layer_interval": 2},
    "mixtral": {"architecture": "mixtral"},
    "qwen3_moe": {"architecture": "qwen3_moe", "norm_topk_prob": True},
    "gpt_oss_biases": {"architecture": "gpt_oss", "sliding_window": 7, "swiglu_limit": 1.0},
}
Checkpoint = Callable[..., Path]


def direction(seed: int = 0) -> np.ndarray:  # [D]
    return 3 * np.random.default_rng(seed).normal(size=D).astype(np.float32)


def ids(model: Transformer) -> np.ndarray:  # [B, T]
    return np.random.default_rng(1).integers(model.arch.vocab, size=(2, 24))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_ablation_at_all_sites(name: str, checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(**CONFIGS[name])))
    edited = orthogonalize(model, direction())
    expected = jr.logits(model, ids(model), edit=jr.ablate(direction(), L))
    assert_close(jr.logits(edited, ids(model)), expected, PARITY, name)
    unedited = jr.logits(model, ids(model))
    assert largest(expected - unedited) > 0.01 * largest(expected)  # it does something


@pytest.mark.parametrize("name", ["tied", "biases", "gpt_oss_biases"])
def test_logits_are_those_of_hooks(name: str, checkpoint: Checkpoint):
    """Against transformers with the paper's hooks, which share no code with this."""
    path = checkpoint(**CONFIGS[name])
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    with oracle.ablation_hooks(hf, direction()), torch.no_grad():
        expected = hf(torch.tensor(ids(model))).logits.numpy()
    assert_close(jr.logits(orthogonalize(model, direction()), ids(model)), expected, PARITY)


@pytest.mark.parametrize(
    "name",
    ["grouped", "tied_biases", "gpt_oss_biases", "gemma2", "gemma4", "gemma4_text_all_untied"],
)
def test_nothing_is_written_along_the_direction(name: str, checkpoint: Checkpoint):
    """Nor before a norm of what is written, where the edit is an approximation."""
    post_norm = name in CASES
    given = fields(name, hidden_size=D) if post_norm else CONFIGS[name]
    model = jr.load_model(str(checkpoint(**given)))
    edited = orthogonalize(model, direction(), approximate=post_norm)
    unit = direction() / np.linalg.norm(direction())
    for path in weights.writers(model.arch):
        axis = leaves(model.arch)[path].stream_axis
        before, after = (np.moveaxis(m.leaves()[path], axis, -1) for m in (model, edited))
        assert largest(before @ unit) > 1e-3, path
        assert largest(after @ unit) < ROUNDING * largest(before), path
    untouched = set(model.leaves()) - set(weights.writers(model.arch))
    for path in untouched:
        np.testing.assert_array_equal(edited.leaves()[path], model.leaves()[path], err_msg=path)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma4_text", "olmo2"])
def test_families_with_post_norms_are_refused_unless_asked_for(family: str, checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(architecture=family)))
    with pytest.raises(WeightEditError, match=r"attn_post_norm.*approximate=True"):
        orthogonalize(model, direction())
    nearly = orthogonalize(model, direction(), approximate=True)
    exact = jr.logits(model, ids(model), edit=jr.ablate(direction(), model.arch.layers))
    assert largest(jr.logits(nearly, ids(model)) - exact) > 0


@pytest.mark.parametrize("edit", [orthogonalize, partial(bake_addition, layer=1), weights.rank_one])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e39])
def test_a_direction_that_is_none(edit: Callable, value: float, model: Transformer):
    with pytest.raises(EditError, match=r"zero|norm 0|NaN or infinity"):
        edit(model, np.full(D, value))


@pytest.mark.parametrize("coefficient", [np.nan, np.inf, 1e38])
def test_a_coefficient_that_is_too_large(coefficient: float, model: Transformer):
    with pytest.raises(EditError, match="coefficient"):
        bake_addition(model, np.full(D, 10.0), 1, coefficient)


@pytest.mark.parametrize("layer", [0, L, -1, 1.0, np.nan, True])
def test_a_layer_that_has_no_room(layer: Any, model: Transformer):
    with pytest.raises(WeightEditError, match=r"layer=.*at layers 1 to 3"):
        bake_addition(model, direction(), layer)


def test_weights_that_overflow(model: Transformer):
    """Those whose sums pass what their dtype holds, and those that another dtype does not."""
    biased = bake_addition(model, np.full(D, 2e38), 1)
    with pytest.raises(WeightEditError, match=r"not be finite in float32.*blocks\.0\.down_bias"):
        bake_addition(biased, np.full(D, 2e38), 1)
    arrays = {"a": jnp.ones(3), "b": jnp.full((2, 3), 7e4)}
    weights.check_finite(arrays, jnp.bfloat16)
    with pytest.raises(WeightEditError, match=r"in float16, which ends at 6\.55e\+04: b\. Take"):
        weights.check_finite(arrays, np.float16)


def test_experts_have_no_place_in_an_adapter(checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(architecture="mixtral")))
    with pytest.raises(WeightEditError, match="no place for the experts"):
        weights.rank_one(model, direction())


def test_the_given_model_stays_as_it_is(model: Transformer):
    before = {path: np.array(leaf) for path, leaf in model.leaves().items()}
    orthogonalize(model, direction())
    bake_addition(model, direction(), 1)
    for path, leaf in model.leaves().items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_a_tied_head_is_untied_and_kept(checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(**CONFIGS["tied"])))
    edited = orthogonalize(model, direction())
    assert model.arch.tied_head and not edited.arch.tied_head
    np.testing.assert_array_equal(edited.leaves()["head"], model.leaves()["embed"])


def test_twice_is_once(model: Transformer):
    once = orthogonalize(model, direction())
    twice = orthogonalize(once, -2 * direction())
    for path, leaf in twice.leaves().items():
        assert_close(leaf, once.leaves()[path], PARITY, path)


def test_bfloat16_keeps_its_dtype(tiny_dir: Path):
    model = jr.load_model(str(tiny_dir), dtype="bfloat16")
    edited = orthogonalize(model, direction())
    assert {leaf.dtype for leaf in edited.leaves().values()} == {jnp.dtype("bfloat16")}
    exact = jr.logits(jr.load_model(str(tiny_dir)), ids(model), edit=jr.ablate(direction(), L))
    ours = np.asarray(jr.logits(edited, ids(model)))
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= BFLOAT16 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("name", ["tied", "biases", "gpt_oss_biases"])
def test_sharded_leaves_stay_sharded(name: str, checkpoint: Checkpoint):
    source = str(checkpoint(**CONFIGS[name]))
    mesh = sharding.make_mesh(data=2, model=2)
    for edit in (
        lambda m: orthogonalize(m, direction()),
        lambda m: bake_addition(m, direction(), 2),
    ):
        one, many = edit(jr.load_model(source)), edit(jr.load_model(source, mesh=mesh))
        for path, leaf in leaves(many.arch).items():
            x = many.leaves()[path]
            assert x.sharding == sharding.named(mesh, leaf.axes, leaf.shape), path
            assert_close(x, one.leaves()[path], PARITY, path)
        assert_close(jr.logits(many, ids(many)), jr.logits(one, ids(one)), PARITY)


# Coverage


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_of_the_stream_is_known(name: str, checkpoint: Checkpoint):
    arch = jr.load_model(str(checkpoint(**CONFIGS[name]))).arch
    down = "expert_down" if isinstance(arch.specs[0].branches[0][1], Moe) else "down"
    expected = {"embed", "blocks.0.o", f"blocks.0.{down}"}
    if "biases" in name:
        expected |= {"blocks.0.o_bias", f"blocks.0.{down}_bias"}
    assert set(weights.writers(arch)) == expected


@pytest.mark.parametrize(
    ("leaf", "axes"),
    [
        ("shared_down", ("experts", "mlp", "embed")),
        ("side_bias", ("embed",)),
        ("position", ("context", "embed")),
        ("side_down", ("embed", "mlp")),
    ],
)
def test_a_leaf_of_the_stream_without_a_role_cannot_be_declared(leaf: str, axes: tuple[str, ...]):
    sized = tuple((axis, 2) for axis in axes)
    with pytest.raises(ValueError, match=rf"leaf '{leaf}' has axes .*'embed'.*Say which of"):
        Param(leaf, sized, INSIDE, "x.weight")
    assert Param(leaf, sized, WRITES, "x.weight").role == WRITES
    with pytest.raises(ValueError, match="if and only if"):
        Param(leaf, (("mlp", 2),), WRITES, "x.weight")


def test_a_norm_behind_a_write_is_refused_unless_asked_for(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
):
    def declared(arch: Architecture) -> dict[str, Leaf]:
        found = leaves(arch)
        path = "blocks.0.mlp_norm"
        param = dataclasses.replace(found[path].param, role=POST_NORM)
        return found | {path: dataclasses.replace(found[path], param=param)}

    monkeypatch.setattr(weights, "leaves", declared)
    for edit in (orthogonalize, lambda m, d, **o: bake_addition(m, d, 1, **o)):
        with pytest.raises(WeightEditError, match=r"norms what its blocks write.*approximate=True"):
            edit(model, direction())
        assert edit(model, direction(), approximate=True).arch.layers == L


# Activation addition


@pytest.mark.parametrize("name", ["grouped", "tied", "biases", "head_width", "gpt_oss_biases"])
@pytest.mark.parametrize("layer", [1, L - 1])
def test_a_baked_addition_is_the_addition(name: str, layer: int, checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(**CONFIGS[name])))
    baked = bake_addition(model, direction(), layer, -1.5)
    edit = jr.add(direction(), L, layer=layer, coefficient=-1.5)
    expected = jr.logits(model, ids(model), edit=edit)
    assert_close(jr.logits(baked, ids(model)), expected, PARITY, name)
    assert largest(expected - jr.logits(model, ids(model))) > 0.01 * largest(expected)
    assert all(spec.branches[0][1].bias for spec in baked.arch.specs)
    assert baked.arch.tied_head == model.arch.tied_head


def test_additions_add_up(model: Transformer):
    twice = bake_addition(bake_addition(model, direction(), 2, 0.5), direction(1), 2)
    once = bake_addition(model, 0.5 * direction() + direction(1), 2)
    assert_close(twice.leaves()["blocks.0.down_bias"], once.leaves()["blocks.0.down_bias"], PARITY)


@pytest.mark.parametrize("layer", [0, -1, L])
def test_a_layer_without_room(layer: int, model: Transformer):
    with pytest.raises(WeightEditError, match=f"layer={layer}: .*layers 1 to 3"):
        bake_addition(model, direction(), layer)


def test_a_family_without_room(checkpoint: Checkpoint):
    model = jr.load_model(str(checkpoint(architecture="mistral")))
    with pytest.raises(WeightEditError, match="mistral model has no bias at its MLP output"):
        bake_addition(model, direction(), 1)


# Bad directions


@pytest.mark.parametrize("edit", [orthogonalize, lambda m, d: bake_addition(m, d, 1)])
def test_directions_of_another_shape_are_refused(edit: Any, model: Transformer):
    for wrong in (np.ones(D - 1), np.ones((2, D))):
        with pytest.raises(DirectionError, match=r"takes \(64,\)"):
            edit(model, wrong)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_no_direction_at_all(value: float, model: Transformer):
    with pytest.raises(ValueError, match="finite"):
        orthogonalize(model, np.full(D, value))
