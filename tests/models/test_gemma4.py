"""Gemma 4: what it writes to the stream, layers of several shapes, and checkpoints as they lie.

Letters: B batch row, T token, D residual width, L layers, W width of a layer's own input.
"""

import dataclasses
import json
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
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints import lora
from jax_refusal.families.registry import architecture
from jax_refusal.models import gated_input
from jax_refusal.models.cache import Tokens, empty
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture, LayerSpec, MlpAndMoe, phases, slots
from jax_refusal.runtime.batching import Prompts
from jax_refusal.study.orthogonalize import writers
from jax_refusal.study.scores import refusal_score
from jax_refusal.study.sweep import Sweep
from tests import tiny
from tests.models.cases import fields
from tests.models.modules import one_layer
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
    tokens = Tokens.padded(jnp.asarray(ids.numpy()))
    ours = gated_input.inputs(model.weights(), model.arch, tokens.ids, model.embedded(tokens.ids))
    assert_close(ours, own.permute(2, 0, 1, 3), PARITY, "inputs")
    x = torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(0))
    for number in range(L):
        theirs = hf.layers[number]
        gate = theirs.act_fn(theirs.per_layer_input_gate(x)) * own[:, :, number]
        written = theirs.post_per_layer_input_norm(theirs.per_layer_projection(gate))
        found = one_layer(model, number, tokens).branch(jnp.asarray(x.numpy()), 1)
        assert_close(found, written, PARITY, f"layer {number}")


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


def test_an_edit_of_ones_own_sees_both_writes(model: Transformer) -> None:
    """A `Transform` is called for the fourth write too."""
    seen = []

    def look(params: Any, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
        seen.append(site)
        return x

    ids = random_ids(model.arch.vocab)
    edit = jr.Transform(function=look, params=None)
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    jax.eval_shape(partial(model.stream, model.embedded(tokens.ids)), tokens, edit)
    assert seen == ["resid_pre", "attn_out", "mlp_out", "per_layer_out"] * 5  # bodies compiled


# Layers of several shapes


def widened(arch: Architecture, width: int) -> Architecture:
    """The same with a wider MLP in layers that read another's keys."""

    def spec(layer: LayerSpec) -> LayerSpec:
        if layer.mixer.kv_source is None:
            return layer
        (site, both), *others = layer.branches
        assert isinstance(both, MlpAndMoe)
        wide = dataclasses.replace(both, mlp=dataclasses.replace(both.mlp, width=width))
        return dataclasses.replace(layer, branches=((site, wide), *others))

    return dataclasses.replace(arch, specs=tuple(map(spec, arch.specs)))


def test_nothing_is_padded(model: Transformer) -> None:
    """Layers of one shape are stacked, and the cache has what the layers with own keys remember."""
    arch = model.arch
    assert [spec.mixer.kv_source for spec in arch.specs] == [None, None, None, 2, 2, 1]
    assert [slot.layers for slot in slots(arch)] == [(0,), (1,), (2,), (3, 4), (5,)]
    shapes = {path: leaf.shape for path, leaf in model.leaves().items()}
    assert shapes["blocks.0.q"] == (1, 4, 8, D) and shapes["blocks.1.q"] == (1, 4, 16, D)
    assert shapes["blocks.3.q"] == (2, 4, 8, D) and shapes["blocks.4.q"] == (1, 4, 16, D)
    assert shapes["blocks.0.k"] == (1, 2, 8, D) and shapes["blocks.1.k"] == (1, 1, 16, D)
    assert "blocks.0.v" in shapes and not {"blocks.1.v", "blocks.3.k", "blocks.4.k"} & set(shapes)
    wide = {path: leaf.shape for path, leaf in leaves(widened(arch, 96)).items()}
    assert wide["blocks.0.down"] == (1, D, 48) and wide["blocks.3.down"] == (2, D, 96)
    remembered = [
        {n: x.shape for n, x in e.items()} for e in empty(arch, 2, 7, model.dtype).entries
    ]
    local = {"k": (1, 2, 2, 8, 7), "v": (1, 2, 2, 7, 8)}
    assert remembered == [local, {"k": (1, 2, 1, 16, 7), "v": (1, 2, 1, 7, 16)}, local, {}, {}]


def test_a_pattern_is_scanned_by_its_period(path: Path) -> None:
    """Five local layers and a global one, again and again; keys are shared from some layer on."""
    local, full = "sliding_attention", "full_attention"
    config = {
        **json.loads((path / "config.json").read_text()),
        "layer_types": ([local] * 4 + [full]) * 7,
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 20,
    }
    config.pop("per_layer_config", None)
    arch = architecture(config)
    assert [(len(phase.slots), phase.repeats) for phase in phases(arch)] == [(5, 3), (5, 4)]
    assert [slot.layers for slot in slots(arch)][4:6] == [(4, 9, 14), (15, 20, 25, 30)]
    assert arch.specs[15].mixer.kv_source == 13 and arch.specs[19].mixer.kv_source == 14


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
    names = ("o", "down", "expert_down", "per_layer_out")
    expected = {f"{slot.name}.{name}" for slot in slots(model.arch) for name in names}
    assert set(writers(model.arch)) == {"embed", *expected}


def test_an_adapter_of_layers_of_several_shapes_is_peft_s(
    model: Transformer, path: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "o_proj", "down_proj", "per_layer_input_gate"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(tiny.hf_model(path), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ids = random_ids(model.arch.vocab)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    adapted = jr.load_model(str(path), adapter=str(tmp_path))
    assert_close(jr.logits(adapted, ids), expected, PARITY)
    assert largest(jr.logits(model, ids) - expected) > 0.1 * largest(expected)
    read, made = lora.read(str(tmp_path), model.arch), jax.random.key(0)
    fresh = lora.initial(model.arch, tuple(targets), rank=3, alpha=6.0, key=made)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, read)


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
    assert "model.layers.2.self_attn.other.weight" in convert.unwrapped(model.arch, tensors)
