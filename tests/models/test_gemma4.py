"""Gemma 4: what it writes to the stream, layers of several shapes, and checkpoints as they lie.

Letters: B batch row, T token, D residual width, L layers, W width of a layer's own input.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.edits import SITES
from jax_refusal.models import declaration, gemma4, kinds, lora, names
from jax_refusal.models.cache import Tokens, empty
from jax_refusal.models.transformer import Transformer
from jax_refusal.runtime.batching import Prompts
from jax_refusal.study.orthogonalize import writers
from jax_refusal.study.scores import refusal_score
from jax_refusal.study.sweep import Sweep
from tests import tiny
from tests.models.cases import fields
from tests.models.test_cache import one_by_one, sharing
from tests.models.test_families import random_ids
from tests.tolerances import INVARIANCE, PARITY, SCORES, assert_close, largest

ALL = "gemma4_text_all_untied"  # all but a wider MLP: L = 6, the last three share keys
L, D, LAST = 6, 32, 5
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def path(checkpoint: Checkpoint) -> Path:
    return checkpoint(**fields(ALL))


@pytest.fixture(scope="module")
def model(path: Path) -> Transformer:
    return jr.load_model(str(path))


def direction() -> np.ndarray:  # [D]
    return np.random.default_rng(5).normal(size=D).astype(np.float32)


# Inputs for each layer


@torch.no_grad()
def test_inputs_of_each_layer_and_what_they_write(model: Transformer, path: Path) -> None:
    hf, ids = tiny.hf_model(path).model, torch.tensor(random_ids(model.arch.vocab))
    own = hf.project_per_layer_inputs(hf.embed_tokens(ids), hf.get_per_layer_inputs(ids))
    ours = gemma4.per_layer_inputs(model, jnp.asarray(ids.numpy()))
    assert_close(ours, own.permute(2, 0, 1, 3), PARITY, "inputs")
    x = torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(model.unrolled()):
        theirs = hf.layers[layer]
        gate = theirs.act_fn(theirs.per_layer_input_gate(x)) * own[:, :, layer]
        written = theirs.post_per_layer_input_norm(theirs.per_layer_projection(gate))
        found = gemma4.gated_input(block, jnp.asarray(x.numpy()), ours[layer])
        assert_close(found, written, PARITY, f"layer {layer}")


@torch.no_grad()
def hooked(
    path: Path, ids: np.ndarray, hooks: dict[tuple[int, str], Callable], nudge: int = 0
) -> np.ndarray:
    """Logits of transformers with what some norms write passed through functions. nudge: every
    weight is first moved by one part in 2^24, the least that float32 can; up or down by a seed."""
    hf, stream = tiny.hf_model(path), torch.Generator().manual_seed(nudge)
    for weight in hf.parameters() if nudge else ():
        weight *= 1 + 2**-24 * torch.randn(weight.shape, generator=stream).sign()
    for (layer, name), change in hooks.items():
        module: Any = hf.model.layers[layer]
        if name:
            hook = lambda _module, _args, out, f=change: f(out)  # noqa: E731
            module.get_submodule(name).register_forward_hook(hook)
        else:
            hook = lambda _module, args, f=change: (f(args[0]), *args[1:])  # noqa: E731
            module.register_forward_pre_hook(hook)
    return hf(torch.tensor(ids)).logits.numpy()


# The stream into a block, and all that writes to it.
WRITES = (
    "",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "post_per_layer_input_norm",
)


def test_ablation_is_at_every_write(model: Transformer, path: Path) -> None:
    """Against hooks at the four writes of each layer; nothing is left, behind the last one too."""
    unit = torch.tensor(direction() / np.linalg.norm(direction()))

    def ablated(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ unit)[..., None] * unit

    ids, edit = random_ids(model.arch.vocab), jr.ablate(direction(), L)
    everywhere = {(i, name): ablated for i in range(L) for name in WRITES}
    expected = hooked(path, ids, everywhere)
    # At a few tokens rounding alone makes PARITY, in transformers too: nothing is compared there.
    nudged = np.stack([hooked(path, ids, everywhere, nudge) for nudge in (1, 2, 3, 4)])
    firm = np.abs(nudged - expected).max((0, -1)) < PARITY / 2 * largest(expected)
    assert firm.mean() > 0.8
    assert_close(np.asarray(jr.logits(model, ids, edit=edit))[firm], expected[firm], PARITY)
    short = hooked(path, ids, {(i, name): ablated for i in range(L) for name in WRITES[:3]})
    assert largest(short - expected) > 1e3 * PARITY * largest(expected)  # the fourth counts
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    x = np.asarray(jax.jit(lambda m, t, e: m(t, e).x)(model, tokens, edit))
    assert np.abs(x @ unit.numpy()).max() < 1e-5 * largest(x)


@pytest.mark.parametrize(
    ("site", "norm"),
    [("mlp_out", "post_feedforward_layernorm"), ("per_layer_out", "post_per_layer_input_norm")],
)
def test_what_is_put_in_at_one_write_is_put_in_once(
    site: str, norm: str, model: Transformer, path: Path
) -> None:
    ids, vector = random_ids(model.arch.vocab), torch.tensor(direction())
    edit = jr.add(direction(), L, layer=LAST, site=site, coefficient=0.5)
    place = (LAST, norm)
    expected = hooked(path, ids, {place: lambda x: x + 0.5 * vector})
    assert_close(jr.logits(model, ids, edit=edit), expected, PARITY)


def test_an_edit_of_ones_own_sees_every_write(model: Transformer) -> None:
    seen = []

    def look(params: Any, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
        seen.append(site)
        return x

    ids = random_ids(model.arch.vocab)
    edit = jr.Transform(function=look, params=None)
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    jax.eval_shape(partial(model.stream, model.embedded(tokens.ids)), tokens, edit)
    assert seen == list(SITES)


# Layers of several shapes


def test_nothing_is_padded(model: Transformer) -> None:
    """Every leaf has the layers that have it, and the cache those with keys of their own."""
    arch = model.arch
    assert arch.kv_of_layer == (0, 1, 2, 2, 2, 1) and arch.cache_layers == 3
    counted = kinds.members(arch)
    assert counted["local_layers"] == (0, 2, 3, 4) and counted["own_local_layers"] == (0, 2)
    shapes = {path: leaf.shape for path, leaf in model.leaves().items()}
    assert shapes["local.q"] == (4, 4, 8, D) and shapes["global.q"] == (2, 4, 16, D)
    assert shapes["local.k"] == (2, 2, 8, D) and shapes["global.k"] == (1, 1, 16, D)
    assert "global.v" not in shapes and shapes["local.v"] == (2, 2, 8, D)
    wide = dataclasses.replace(arch, wide_mlp=96)
    shapes = {path: declaration.shape(wide, a) for path, a in declaration.axes(wide).items()}
    assert shapes["own.down"] == (3, D, 48) and shapes["sharing.down"] == (3, D, 96)
    assert "blocks.down" not in shapes
    cache = empty(arch, 2, 7, model.dtype)
    assert cache.k.shape == (3, 2, 2, 8, 7) and cache.v.shape == (3, 2, 2, 7, 8)


def test_heads_of_two_widths_in_one_cache(model: Transformer) -> None:
    """Packed and unpacked keys and values are the same, where there is room to spare too."""
    for heads, width in ((2, 8), (1, 16), (2, 16)):
        arch = dataclasses.replace(model.arch, kv_heads=3, global_kv_heads=2)
        x = jax.random.normal(jax.random.key(0), (2, 5, heads, width))
        packed = kinds._packed(arch, x)
        assert packed.shape == (2, 5, arch.cache_heads, 8)
        stored = packed.transpose(0, 2, 3, 1), packed.swapaxes(1, 2)
        k, v = kinds._unpacked(*stored, heads, width)
        np.testing.assert_array_equal(k, x.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(v, x.swapaxes(1, 2))


def test_additions_behind_the_layers_whose_keys_are_read(model: Transformer) -> None:
    """Selection starts a forward at the layer of its vector, and no later than those keys."""
    assert [model.arch.first_needed(i) for i in range(L + 1)] == [0, 1, 1, 1, 1, 1, 6]
    prompts = sharing(model, 5, (9, 12, 10))
    prompts = Prompts(prompts.ids, prompts.prefix, positions=1)
    vectors = np.random.default_rng(2).normal(size=(1, L, D)).astype(np.float32)
    cells, token_ids = [(0, layer) for layer in (0, 1, 3, LAST)], jnp.array([43, 50])
    scores = Sweep(model, vectors, prompts, prompts, (43, 50)).induce(cells)
    for (_, layer), score in zip(cells, scores, strict=True):
        edit = jr.add(vectors[0, layer], L, layer=layer)
        logits = jnp.asarray(one_by_one(model, prompts, edit))
        assert abs(score - float(refusal_score(logits, token_ids).mean())) < SCORES, layer


def test_a_mesh_agrees(model: Transformer, path: Path) -> None:
    many = jr.load_model(str(path), mesh=jr.make_mesh(2, 2))
    ids = random_ids(model.arch.vocab)
    assert_close(jr.logits(many, ids), jr.logits(model, ids), INVARIANCE)


def test_every_leaf_of_the_stream_is_known(model: Transformer) -> None:
    others = {"embed", "local.o", "global.o", "blocks.expert_down", "blocks.per_layer_out"}
    assert set(writers(model.arch)) == {*others, "blocks.down"}
    wide = dataclasses.replace(model.arch, wide_mlp=96)
    assert set(writers(wide)) == {*others, "own.down", "sharing.down"}


def test_no_adapter_where_layers_differ_in_shape(model: Transformer) -> None:
    with pytest.raises(lora.AdapterError, match="'q_proj' is no projection of this model"):
        lora.initial(model.arch, ("q_proj",), rank=2, alpha=1.0, key=jax.random.key(0))


# Checkpoints as they lie


def test_what_files_hold_beside_the_text_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Keys of layers that share them are stored and unused; other modalities lie beside."""
    source = checkpoint(**fields("gemma4"))
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    assert any(name.startswith("model.vision_tower.") for name in tensors)
    one = np.ones(1, np.float32)
    for name in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.language_model.layers.4.self_attn.{name}.weight"] = one
    for name in ("audio_tower.a", "embed_audio.b", "vision_embedder.c"):
        tensors[f"model.{name}"] = one
    save_file(tensors, tmp_path / "model.safetensors")
    model, again = jr.load_model(str(source)), jr.load_model(str(tmp_path))
    assert model.arch.wrapped and again.arch == model.arch
    for leaf, values in model.leaves().items():
        np.testing.assert_array_equal(values, again.leaves()[leaf], err_msg=leaf)
    tensors["model.language_model.layers.2.self_attn.other.weight"] = one
    assert "model.layers.2.self_attn.other.weight" in names.unwrapped(model.arch, tensors)
