"""The pieces of a decoder block, as functions of arrays.

Letters: B batch row, T token, C context token (key or value), D residual width, H query heads,
G key/value heads, K head width, F MLP width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.models.families import Rope

# A float32 model is computed in float32 everywhere: TPUs would otherwise multiply in bfloat16.
PRECISION = jax.lax.Precision.HIGHEST

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu}


def einsum(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, x, y, precision=PRECISION)


def rms_norm(
    x: jax.Array,  # [B, T, D]
    scale: jax.Array,  # [D]
    epsilon: float,
) -> jax.Array:  # [B, T, D]
    """Root-mean-square norm, in float32, scaled after the cast as Hugging Face does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + epsilon)
    return scale[None, None] * normed.astype(x.dtype)


def rope_frequencies(rope: Rope, width: int) -> np.ndarray:  # [K / 2], radians per token
    """Rotary frequencies, with the linear and the Llama-3 scaling."""
    frequencies = 1.0 / rope.base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        # Wavelengths (tokens per turn) beyond the original context are stretched by `factor`,
        # those well inside it are kept, and those between are blended.
        turns = rope.original_context * frequencies / (2 * np.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(blend, 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies.astype(np.float32)


def rope_angles(
    positions: jax.Array,  # [B, T]
    rope: Rope,
    width: int,
) -> tuple[jax.Array, jax.Array]:  # cos, sin [B, T, 1, K / 2], float32
    frequencies = rope_frequencies(rope, width)[None, None, None]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: jax.Array,  # [B, T, H or G, K]
    angles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Rotary position embedding on the two halves of each head (the Hugging Face layout)."""
    cos, sin = (a.astype(x.dtype) for a in angles)
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def dot_product_attention(
    q: jax.Array,  # [B, T, H, K]
    k: jax.Array,  # [B, G, K, C]
    v: jax.Array,  # [B, G, C, K]
    allowed: jax.Array,  # [B, T, C] bool
) -> jax.Array:  # [B, T, H, K]
    """Grouped-query attention; the softmax is in float32.

    The queries of a group share one product with its keys, and both products have their operands
    as a batch of plain matrices: other orders of the axes cost a CPU half as much again.
    """
    B, T, H, K = q.shape
    G, C = k.shape[1], k.shape[3]
    q = q.swapaxes(1, 2).reshape(B, G, H // G * T, K)
    scores = einsum("bgtk,bgkc->bgtc", q, k) * K**-0.5
    scores = scores.astype(jnp.float32).reshape(B, H, T, C)
    scores = jnp.where(allowed[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, -1).astype(q.dtype).reshape(B, G, H // G * T, C)
    mixed = einsum("bgtc,bgck->bgtk", weights, v)
    return mixed.reshape(B, H, T, K).swapaxes(1, 2)


def gated_mlp(
    x: jax.Array,  # [B, T, D]
    gate: jax.Array,  # [D, F]
    up: jax.Array,  # [D, F]
    down: jax.Array,  # [F, D]
    activation: Callable[[jax.Array], jax.Array],
    biases: tuple[jax.Array, jax.Array, jax.Array] | None = None,  # [F], [F], [D]
) -> jax.Array:  # [B, T, D]
    def affine(x, kernel, i):
        y = einsum("bti,io->bto", x, kernel)
        return y if biases is None else y + biases[i][None, None]

    return affine(activation(affine(x, gate, 0)) * affine(x, up, 1), down, 2)
