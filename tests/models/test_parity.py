"""The decoder against Hugging Face's, on tiny random checkpoints and on a real one.

Letters: B batch row, T token, D residual width, L layers, H query heads, G key/value heads, K head
width, S residual sites, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import jax_refusal as jr
from jax_refusal.models import ops, rope
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.sites import Capture
from tests import tiny
from tests.models.modules import blank, one_layer
from tests.tolerances import BFLOAT16, BFLOAT16_LOSS, PARITY, SMOLLM2, assert_close, largest

T = 48  # longer than ORIGINAL_CONTEXT and WINDOW: both bite
ORIGINAL_CONTEXT, WINDOW = 16, 7

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_width": {"head_dim": 24},
    "rope_base": {"rope_theta": 500.0},
    "rope_linear": {"rope_scaling": LINEAR},
    "rope_llama3": {"rope_scaling": LLAMA3},
    "mistral": {"architecture": "mistral"},
    "mistral_window": {"architecture": "mistral", "sliding_window": WINDOW},
    "shards": {"shards": 3},
    "stored_in_bfloat16": {"dtype": "bfloat16"},
}

Checkpoint = Callable[..., Path]


def random_ids(model: Transformer, rows: int = 2, length: int = T) -> np.ndarray:  # [B, T]
    return np.random.default_rng(0).integers(model.arch.vocab, size=(rows, length))


@torch.no_grad()
def hf_logits(hf: PreTrainedModel, ids: np.ndarray) -> np.ndarray:  # [B, T, V]
    return hf(torch.tensor(ids)).logits.float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(**CONFIGS[name])
    model = jr.load_model(str(path))
    ids = random_ids(model)
    assert_close(jr.logits(model, ids), hf_logits(tiny.hf_model(path), ids), PARITY)


@pytest.mark.parametrize("name", ["rope_linear", "rope_llama3", "mistral_window"])
def test_configs_differ_from_plain(name: str, checkpoint: Checkpoint) -> None:
    """At T tokens the scaling and the window change the logits: their parity says something."""
    plain = checkpoint(architecture=CONFIGS[name].get("architecture", "llama"))
    model = jr.load_model(str(plain))
    ids = random_ids(model)
    theirs = hf_logits(tiny.hf_model(checkpoint(**CONFIGS[name])), ids)
    assert largest(jr.logits(model, ids) - theirs) > 1e3 * PARITY * largest(theirs)


@torch.no_grad()
def hf_modules(hf: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What passes through Hugging Face's modules: name -> [L, B, T, width]."""
    seen: dict[str, list[np.ndarray]] = {}

    def inward(name: str, _module: Any, args: Any) -> None:
        seen.setdefault(name, []).append(args[0].numpy().copy())

    def outward(name: str, _module: Any, _args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        seen.setdefault(name, []).append(out.numpy().copy())

    handles = []
    for block in hf.model.layers:
        handles += [
            block.register_forward_pre_hook(partial(inward, "resid_pre")),
            block.input_layernorm.register_forward_hook(partial(outward, "normed")),
            block.self_attn.register_forward_hook(partial(outward, "attn_out")),
            block.mlp.register_forward_pre_hook(partial(inward, "mlp_in")),
            block.mlp.register_forward_hook(partial(outward, "mlp_out")),
        ]
    hf(torch.tensor(ids))
    for handle in handles:
        handle.remove()
    return {name: np.stack(values) for name, values in seen.items()}


@pytest.mark.parametrize("name", ["grouped", "biases", "head_width", "rope_llama3"])
def test_modules(name: str, checkpoint: Checkpoint) -> None:
    """Each module fed with what Hugging Face's was fed with, layer by layer."""
    path = checkpoint(**CONFIGS[name])
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    theirs = hf_modules(hf, random_ids(model))
    for number in range(model.arch.layers):
        own = one_layer(model, number, blank(2, T))
        x = jnp.asarray(theirs["resid_pre"][number])
        normed = ops.rms_norm(x, own.p["attn_norm"], model.arch.norm_epsilon)
        assert_close(normed, theirs["normed"][number], PARITY, f"rms_norm of layer {number}")
        attn_out = own.mixer(jnp.asarray(theirs["normed"][number]))
        assert_close(attn_out, theirs["attn_out"][number], PARITY, f"attention of layer {number}")
        mlp_out = own.branch(jnp.asarray(theirs["mlp_in"][number]))
        assert_close(mlp_out, theirs["mlp_out"][number], PARITY, f"mlp of layer {number}")


@pytest.mark.parametrize("name", ["grouped", "biases", "rope_llama3", "mistral_window"])
def test_sites(name: str, checkpoint: Checkpoint) -> None:
    """What is captured: block inputs, and what attention and MLP write, in every layer."""
    path = checkpoint(**CONFIGS[name])
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    ids = random_ids(model)
    theirs = hf_modules(hf, ids)

    @jax.jit
    def captured(model: Transformer, ids: jax.Array) -> dict[str, jax.Array]:
        capture = Capture(sites=("resid_pre", "attn_out", "mlp_out"))
        edit = jr.identity(model.arch.layers, model.arch.width)
        return model(Tokens.padded(ids), edit, capture=capture).captured

    for site, ours in captured(model, jnp.asarray(ids)).items():
        assert_close(ours, theirs[site], PARITY, site)


@pytest.mark.parametrize("name", ["grouped", "head_width", "rope_linear", "rope_llama3"])
def test_rope(name: str, checkpoint: Checkpoint) -> None:
    """The rotation alone, far beyond the original context."""
    path = checkpoint(**CONFIGS[name])
    model, config = jr.load_model(str(path)), tiny.hf_model(path).config
    K = model.arch.specs[0].mixer.head_width
    positions = np.array([[0, 1, 5, 16, 17, 63, 200, 511]])
    x = np.random.default_rng(1).normal(size=(1, positions.size, 3, K)).astype(np.float32)
    angles = rope.angles(jnp.asarray(positions), model.arch.ropes[0], K)
    ours = rope.rotate(jnp.asarray(x), angles)
    hf_x = torch.tensor(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(hf_x, torch.tensor(positions))
    theirs = apply_rotary_pos_emb(hf_x, hf_x, cos, sin)[0].transpose(1, 2)
    # At position 511 one float32 step of the angle is 3e-5 rad, and which step differs by library.
    assert_close(ours[:, :-2], theirs[:, :-2], PARITY)
    assert_close(ours, theirs, 10 * PARITY)


def test_shards_hold_the_same_model(checkpoint: Checkpoint) -> None:
    one, many = (jr.load_model(str(checkpoint(**CONFIGS[n]))) for n in ("grouped", "shards"))
    for path, leaf in one.leaves().items():
        np.testing.assert_array_equal(leaf, many.leaves()[path], err_msg=path)


@pytest.mark.parametrize("name", ["grouped", "biases"])
def test_bfloat16(name: str, checkpoint: Checkpoint) -> None:
    """Agrees loosely with Hugging Face's bfloat16, and strays no further from float32 than it."""
    path = checkpoint(**CONFIGS[name])
    model, hf = jr.load_model(str(path), dtype="bfloat16"), tiny.hf_model(path, torch.bfloat16)
    assert {leaf.dtype for leaf in model.leaves().values()} == {jnp.dtype("bfloat16")}
    ids = random_ids(model)
    ours, theirs = jr.logits(model, ids), hf_logits(hf, ids)
    exact = hf_logits(hf.float(), ids)  # the same rounded weights

    def distance(x: Any, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x - y))))

    assert ours.dtype == jnp.float32
    assert distance(ours, theirs) <= BFLOAT16 * distance(exact, np.zeros_like(exact))
    assert distance(ours, exact) <= BFLOAT16_LOSS * distance(theirs, exact)


INSTRUCTIONS = [
    "Hello!",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gradient descent to a child.",
    "How do I pick a lock?",
    "List three prime numbers larger than 100.",
    "Translate 'good morning' into Spanish, French and German.",
    "def fibonacci(n): finish this function",
    "Tell me how to make a fake passport.",
    "Summarise the plot of Hamlet in two sentences.",
    "Is 7 x 8 = 54? Answer yes or no.",
    "Name a color",
    "Draft a short, polite email that declines a meeting on Monday.",
    "Wie wird das Wetter morgen? 🌦️",
    "What should I cook with rice, eggs and spinach tonight?",
    "Describe the steps to break into a house without being seen.",
]


@pytest.mark.slow
def test_smollm2(smollm2_hf: PreTrainedModel) -> None:
    """Real weights: the same next token at every position of 16 chat prompts."""
    model, chat = jr.load_model(jr.SMOLLM2), jr.load_chat(jr.SMOLLM2)
    prompts = chat.encode(INSTRUCTIONS)
    length = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    ours = np.asarray(jr.logits(model, ids, mask))
    for row, prompt in enumerate(prompts):
        theirs = hf_logits(smollm2_hf, np.array([prompt]))[0]
        own = ours[row, : len(prompt)]
        np.testing.assert_array_equal(own.argmax(-1), theirs.argmax(-1), err_msg=f"prompt {row}")
        assert largest(own - theirs) <= SMOLLM2, f"prompt {row}"
