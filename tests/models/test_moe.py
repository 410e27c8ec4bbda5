"""Mixtures of experts: routing, ties, and the same sum by every route.

Letters: B batch row, T token, D residual width, E experts, J experts of one token, F width of one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints import lora
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import architecture
from jax_refusal.models.cache import Tokens, empty
from jax_refusal.models.moe import route, routed_mlp
from jax_refusal.models.spec import Moe, UnsupportedModel
from tests import tiny
from tests.models.cases import T, fields
from tests.models.test_families import cached, hf_everything, random_ids
from tests.tolerances import INVARIANCE, PARITY, assert_close

B, D, E, J, F = 2, 8, 5, 3, 6
NAMES = ["mixtral", "qwen3_moe"]
SPEC = Moe(experts=E, experts_per_token=J, width=F)


def weights(seed: int = 0) -> tuple[jax.Array, ...]:
    """Router [E, D], gate and up [E, D, F], down [E, F, D]."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((E, D), (E, D, F), (E, D, F), (E, F, D))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def named(kernels: Any) -> dict[str, jax.Array]:
    names = ("expert_gate", "expert_up", "expert_down")
    return dict(zip(names, kernels, strict=True))


def one_by_one(x: np.ndarray, shares: Any, experts: Any, kernels: Any) -> np.ndarray:
    """Each token through each of its experts, in a Python loop."""
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    out = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for share, e in zip(shares[b, t], experts[b, t], strict=True):
            hidden = x[b, t] @ gate[e]
            out[b, t] += share * ((hidden / (1 + np.exp(-hidden)) * (x[b, t] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("normalised", [True, False])
def test_each_token_goes_through_its_own_experts(normalised: bool) -> None:
    router, *kernels = weights()
    x = np.random.default_rng(1).normal(size=(B, 7, D)).astype(np.float32)
    shares, experts = (np.asarray(a) for a in route(jnp.asarray(x), router, J, normalised))
    assert all(len(set(token)) == J for token in experts.reshape(-1, J))
    total = shares.sum(-1)
    assert np.allclose(total, 1) if normalised else (total < 1).all()
    found = routed_mlp(jnp.asarray(x), shares, experts, named(kernels), SPEC)
    assert_close(found, one_by_one(x, shares, experts, kernels), PARITY)


def test_no_expert_is_too_full() -> None:
    """All tokens to the same experts: none is dropped."""
    router, *kernels = weights()
    x = np.repeat(np.random.default_rng(1).normal(size=(1, 1, D)).astype(np.float32), 40, 1)
    shares, experts = (np.asarray(a) for a in route(jnp.asarray(x), router, J, True))
    found = routed_mlp(jnp.asarray(x), shares, experts, named(kernels), SPEC)
    assert_close(found, one_by_one(x, shares, experts, kernels), PARITY)


def test_of_two_that_tie_the_lower_number_is_taken() -> None:
    shares, experts = route(jnp.ones((1, 2, D)), jnp.zeros((E, D)), J, True)
    np.testing.assert_array_equal(experts, np.broadcast_to(np.arange(J), (1, 2, J)))
    assert_close(shares, np.full((1, 2, J), 1 / J), PARITY)


@pytest.mark.parametrize("name", NAMES)
def test_ties_of_equal_experts(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Experts 0..3 are copies behind one router row, so that every choice is among ties; which of
    them is taken is left to each library, and the result is the same."""
    source = checkpoint(**fields(name))
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for tensor, values in tensors.items():
        if tensor.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight")):
            values[1:4] = values[0]
        for number in "123":
            if f".experts.{number}." in tensor:
                first = tensor.replace(f".experts.{number}.", ".experts.0.")
                tensors[tensor] = tensors[first].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    model = jr.load_model(str(tmp_path))
    ids = random_ids(model.arch.vocab)
    theirs, _ = hf_everything(tiny.hf_model(tmp_path), ids)
    assert_close(jr.logits(model, ids), theirs, PARITY)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_are_the_same_sum(name: str, checkpoint: Callable[..., Path]) -> None:
    model = jr.load_model(str(checkpoint(**fields(name))))
    ids = random_ids(model.arch.vocab)
    edit = jr.identity(model.arch.layers, model.arch.width)
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    cache, parts, start = empty(model.arch, B, T, model.dtype), [], 0
    for size in (20, 1, 1, 1, 1):
        piece = jax.tree.map(lambda x, s=start, n=size: x[:, s : s + n], tokens)
        logits, cache = cached(model, piece, edit, cache)
        parts.append(logits)
        start += size
    assert_close(jnp.concatenate(parts, 1), jr.logits(model, ids), INVARIANCE)


@pytest.mark.parametrize(("data", "model"), [(2, 4), (8, 1)])
def test_meshes_agree(data: int, model: int, checkpoint: Callable[..., Path]) -> None:
    path = str(checkpoint(**fields("qwen3_moe", moe_intermediate_size=24)))
    one = jr.load_model(path)
    ids = np.repeat(random_ids(one.arch.vocab), 4, 0)
    many = jr.load_model(path, mesh=jr.make_mesh(data, model))
    assert_close(jr.logits(many, ids), jr.logits(one, ids), INVARIANCE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"num_shared_experts": 1}, "unknown field num_shared_experts=1"),
    ],
)
def test_other_layouts_are_refused_by_name(changed: dict[str, Any], words: str) -> None:
    config = {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    arch = architecture(config)
    assert arch.specs[47].branches == (
        ("mlp_out", Moe(experts=128, experts_per_token=8, width=768)),
    )
    with pytest.raises(UnsupportedModel, match=words):
        architecture({**config, **changed})


@pytest.mark.parametrize("name", NAMES)
def test_experts_may_lie_fused(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As transformers stores them without `save_original_format`; they go back as they came."""
    source = checkpoint(**fields(name))
    tiny.hf_model(source).save_pretrained(str(tmp_path), save_original_format=False)
    theirs = load_file(tmp_path / "model.safetensors")
    assert any(values.ndim == 3 for values in theirs.values())
    model, apart = jr.load_model(str(tmp_path)), jr.load_model(str(source))
    for leaf, values in apart.leaves().items():
        np.testing.assert_array_equal(values, model.leaves()[leaf], err_msg=leaf)
    for tensor, values in convert.to_hugging_face(model):
        np.testing.assert_array_equal(values, theirs.pop(tensor), err_msg=tensor, strict=True)
    assert not theirs


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "gemma4_text_all_untied"])
def test_only_experts_that_are_named_one_by_one_may_lie_fused(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    arch = jr.load_model(str(checkpoint(**fields(name)))).arch
    found = convert.as_stored(arch, {"model.layers.0.mlp.experts.down_proj": None})
    assert (found.naming == FUSED_EXPERTS) == (name in NAMES)
    assert convert.as_stored(arch, {}) == arch


def test_no_adapter_of_experts(checkpoint: Callable[..., Path]) -> None:
    """PEFT adapts their projections in another way: it is not read as if there were one MLP."""
    model = jr.load_model(str(checkpoint(**fields("qwen3_moe"))))
    with pytest.raises(lora.AdapterError, match="'up_proj' is no projection"):
        lora.initial(model.arch, ("up_proj",), rank=2, alpha=1.0, key=jax.random.key(0))
