"""gpt-oss module by module: sinks, the router and its ties, clamped experts; and their tensors.

Letters: B batch row, T token, D residual width, H query heads, K head width, E experts, J experts
of one token, F width of one.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import export, lora
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.models import moe
from jax_refusal.models.attention import dot_product_attention
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import Moe
from tests import tiny
from tests.models.cases import T, fields
from tests.models.modules import blank, one_layer
from tests.models.test_families import hf_everything, random_ids
from tests.tolerances import INVARIANCE, PARITY, ROUNDING, assert_close, largest

NAME = "gpt_oss"
Checkpoint = Callable[..., Path]


def changed(source: Path, folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a checkpoint with its tensors edited in place."""
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def test_modules(checkpoint: Checkpoint) -> None:
    """Each module fed with what Hugging Face's was fed with, layer by layer."""
    path = checkpoint(**fields(NAME))
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    seen: dict[str, list[Any]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, []).append((given, out))

        return hook

    for block in hf.model.layers:
        for name in ("input_layernorm", "self_attn", "mlp"):
            getattr(block, name).register_forward_hook(record(name), with_kwargs=True)
        block.mlp.router.register_forward_hook(record("router"), with_kwargs=True)
    hf(torch.tensor(random_ids(model.arch.vocab)))
    for number in range(model.arch.layers):
        own = one_layer(model, number, blank(2, T))
        (norm_in, norm), (attn_in, attn), (mlp_in, mlp), (router_in, router) = (
            seen[name][number] for name in ("input_layernorm", "self_attn", "mlp", "router")
        )
        ours = own.ctx.norm(jnp.asarray(norm_in.numpy()), own.p["attn_norm"])
        assert_close(ours, norm, PARITY, f"norm of layer {number}")
        ours = own.mixer(jnp.asarray(attn_in.numpy()))
        assert_close(ours, attn[0], PARITY, f"attention of layer {number}")
        ours = own.branch(jnp.asarray(mlp_in.numpy()))
        assert_close(ours, mlp[0], PARITY, f"experts of layer {number}")
        x = jnp.asarray(router_in.numpy())[None]
        shares, chosen = moe.route(x, own.p["router"], 3, True, own.p["router_bias"])
        np.testing.assert_array_equal(chosen[0], router[2])
        assert_close(shares[0], router[1], PARITY, f"router of layer {number}")
        up = np.einsum("btd,edf->btef", mlp_in, own.p["expert_up"])
        limit = own.spec.branches[0][1].swiglu_limit
        assert (np.abs(up) > limit).mean() > 0.1, "the clamp does not bite"


@pytest.mark.parametrize("sink", [-1e4, 3.0])
def test_sinks_take_attention(sink: float, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Parity with other sinks too, and the logits are far from those of the usual ones."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            if name.endswith("sinks"):
                values[:] = sink

    source = checkpoint(**fields(NAME))
    model = jr.load_model(str(changed(source, tmp_path, edit)))
    ids = random_ids(model.arch.vocab)
    theirs, _ = hf_everything(tiny.hf_model(tmp_path), ids)
    ours = jr.logits(model, ids)
    assert_close(ours, theirs, PARITY)
    assert largest(ours - jr.logits(jr.load_model(str(source)), ids)) > 0.01 * largest(ours)
    if sink < 0:  # as if there were none
        leaves, specs = model.leaves(), model.arch.specs
        plain = [dataclasses.replace(s.mixer, sinks=False) for s in specs]
        pairs = zip(specs, plain, strict=True)
        specs = tuple(dataclasses.replace(spec, mixer=mixer) for spec, mixer in pairs)
        arch = dataclasses.replace(model.arch, specs=specs)
        without = Transformer(arch, {k: v for k, v in leaves.items() if k != "blocks.0.sinks"})
        assert_close(jr.logits(without, ids), ours, ROUNDING)


def test_a_sink_is_one_more_score() -> None:
    """Against the softmax over scores and sink written out; a row that sees nothing is 0."""
    B, H, G, K, C = 2, 4, 2, 3, 5
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, C, H, K))
    k = jax.random.normal(keys[1], (B, G, K, C))
    v = jax.random.normal(keys[2], (B, G, C, K))
    sinks = jnp.array([-2.0, 0.0, 1.0, 80.0])
    allowed = jnp.broadcast_to(jnp.tril(jnp.ones((C, C), bool)), (B, C, C)).at[1, 2].set(False)
    ours = np.asarray(dot_product_attention(q, k, v, allowed, 0.5, sinks=sinks))
    q, k, v, sinks, allowed = map(np.asarray, (q, k, v, sinks, allowed))
    for b, t, h in np.ndindex(B, C, H):
        seen = np.flatnonzero(allowed[b, t])
        scores = 0.5 * q[b, t, h] @ k[b, h // 2][:, seen]
        whole = np.exp(np.array([*scores, sinks[h]], np.float64))
        mixed = (whole[:-1] / whole.sum()) @ v[b, h // 2, seen]
        assert_close(ours[b, t, h], mixed, PARITY, f"{b}, {t}, {h}")


CLAMPED = Moe(
    experts=1,
    experts_per_token=1,
    width=1,
    activation="quick_gelu",
    bias=True,
    swiglu_limit=7.0,
)


def test_the_clamp_in_numbers() -> None:
    """One expert of width 1: gate to 7, up within +-7, then (up + 1) gate sigmoid(1.702 gate)."""
    x = jnp.array([[[1.0]]])
    shares, chosen = jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1), jnp.int32)
    for gate, up, used in (
        (2.0, 3.0, (2.0, 3.0)),
        (9.0, 3.0, (7.0, 3.0)),
        (-9.0, 3.0, (-9.0, 3.0)),
        (2.0, 9.0, (2.0, 7.0)),
        (2.0, -9.0, (2.0, -7.0)),
    ):
        kernels = {"gate": (gate - 0.5, 0.5), "up": (up + 0.25, -0.25), "down": (2.0, 10.0)}
        p = {f"expert_{name}": jnp.full((1, 1, 1), w) for name, (w, _) in kernels.items()}
        p |= {f"expert_{name}_bias": jnp.full((1, 1), b) for name, (_, b) in kernels.items()}
        found = moe.routed_mlp(x, shares, chosen, p, CLAMPED)
        g, u = used
        expected = 2.0 * (u + 1) * g / (1 + np.exp(-1.702 * g)) + 10.0
        assert_close(found, [[[expected]]], PARITY, f"gate {gate}, up {up}")


def test_ties_of_equal_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Experts 0..3 are copies behind one router row, so that every choice is among ties."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            if ".experts." in name or ".router." in name:
                values[1:4] = values[0]

    model = jr.load_model(str(changed(checkpoint(**fields(NAME)), tmp_path, edit)))
    ids = random_ids(model.arch.vocab)
    theirs, _ = hf_everything(tiny.hf_model(tmp_path), ids)
    assert_close(jr.logits(model, ids), theirs, PARITY)


def test_a_part_of_an_interleaved_tensor(checkpoint: Checkpoint) -> None:
    """Gates at even places and ups at odd ones, whatever part is asked for."""
    path = checkpoint(**fields(NAME))
    model, theirs = jr.load_model(str(path)), load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(model.leaves()["blocks.0.expert_gate"][1], theirs[name][..., ::2])
    np.testing.assert_array_equal(model.leaves()["blocks.0.expert_up"][1], theirs[name][..., 1::2])
    part = (slice(2, 4), slice(0, 7), slice(3, 20))
    np.testing.assert_array_equal(convert.stored(model)[name][part], theirs[name][part])


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("model.layers.2.self_attn.sinks", None, r"missing model.layers.2.self_attn.sinks \(4,\)"),
        ("model.layers.2.self_attn.sinks", np.ones(3, np.float32), r"has shape \(3,\), not \(4,\)"),
        ("model.layers.0.mlp.router.bias", None, r"missing model.layers.0.mlp.router.bias \(6,\)"),
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            np.ones((6, 96, 32), np.float32),
            r"gate_up_proj has shape \(6, 96, 32\), not \(6, 32, 96\)",
        ),
        (
            "model.layers.0.mlp.experts.down_proj_bias",
            np.ones((6, 31), np.float32),
            r"down_proj_bias has shape \(6, 31\), not \(6, 32\)",
        ),
        ("model.layers.0.mlp.bias", np.ones(1, np.float32), r"unused model.layers.0.mlp.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, values: np.ndarray | None, words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = values

    folder = changed(checkpoint(**fields(NAME)), tmp_path, edit)
    with pytest.raises(ConversionError, match=words):
        jr.load_model(str(folder))


def test_meshes_agree(checkpoint: Checkpoint) -> None:
    path = str(checkpoint(**fields(NAME)))
    one, many = jr.load_model(path), jr.load_model(path, mesh=jr.make_mesh(2, 4))
    ids = random_ids(one.arch.vocab)
    assert_close(jr.logits(many, ids), jr.logits(one, ids), INVARIANCE)


def test_an_adapter_of_attention_alone(checkpoint: Checkpoint) -> None:
    arch = jr.load_model(str(checkpoint(**fields(NAME)))).arch
    key = jax.random.key(0)
    assert lora.initial(arch, ("q_proj", "o_proj"), rank=2, alpha=1.0, key=key).a
    with pytest.raises(lora.AdapterError, match="'down_proj' is no projection"):
        lora.initial(arch, ("down_proj",), rank=2, alpha=1.0, key=key)


def test_the_config_written_back_is_the_same_model(checkpoint: Checkpoint) -> None:
    source = checkpoint(**fields(NAME))
    original = json.loads((source / "config.json").read_text())
    arch = jr.load_model(str(source)).arch
    assert export.config(arch, original, "float32") == original
