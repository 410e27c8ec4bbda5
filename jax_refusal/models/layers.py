"""The pieces of a decoder block, as functions of arrays.

Letters: B batch row, T token, C context token (key or value), D residual width, H query heads,
G key/value heads, K head width, W rotated channels of a head, F MLP width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jax_refusal.models.architecture import Rope
from jax_refusal.models.rope import frequencies, frequencies_by_length

# A float32 model is computed in float32 everywhere: TPUs would otherwise multiply in bfloat16.
PRECISION = jax.lax.Precision.HIGHEST

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

# What a norm does with its weights: the normed input in float32, the weights, the input's dtype.
NORMS: dict[str, Callable[[jax.Array, jax.Array, jnp.dtype], jax.Array]] = {
    "plain": lambda normed, scale, dtype: scale * normed.astype(dtype),
    "scale_in_float32": lambda normed, scale, dtype: (scale * normed).astype(dtype),
    # Weights are stored as their distance from 1.
    "one_plus": lambda normed, scale, dtype: ((1.0 + scale.astype(jnp.float32)) * normed).astype(
        dtype
    ),
}


def einsum(pattern: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, x, y, precision=PRECISION)


def rms_norm(
    x: jax.Array,  # [B, T, ...]
    scale: jax.Array,  # [D], [K], or [H or G, K]: the axes of x that are normed together
    epsilon: float,
    kind: str = "plain",
) -> jax.Array:
    """Root-mean-square norm, in float32; `kind` says how the weights come in."""
    x32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axes, keepdims=True) + epsilon)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return NORMS[kind](normed, scale, x.dtype)


def rope_angles(
    positions: jax.Array,  # [B, T]
    rope: Rope,
    width: int,  # W
    lengths: jax.Array | None = None,  # [B, T] tokens of the whole prompt, for prompt_ntk
) -> tuple[jax.Array, jax.Array]:  # cos, sin [B, T, 1, W / 2], float32
    turns = frequencies(rope, width)[None, None, None]
    if rope.kind == "prompt_ntk":
        assert lengths is not None
        each = jnp.asarray(frequencies_by_length(rope, width))
        borders = rope.original_context * 2 ** jnp.arange(len(each) - 1)
        turns = each[(lengths[..., None] > borders[None, None]).sum(-1)][:, :, None]
    turn = positions[..., None, None].astype(jnp.float32) * turns
    return jnp.cos(turn) * rope.attention_factor, jnp.sin(turn) * rope.attention_factor


def rotate(
    x: jax.Array,  # [B, T, H or G, K]
    angles: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Rotary position embedding on the two halves of each head (the Hugging Face layout).

    Where there are angles for the first W channels of a head only, the others stay as they are.
    """
    cos, sin = (a.astype(x.dtype) for a in angles)
    width = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :width], 2, -1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x.shape[-1]:
        parts.append(x[..., width:])
    return jnp.concatenate(parts, -1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap), which stays between -cap and cap; x itself for cap = 0."""
    return jnp.tanh(x / cap) * cap if cap else x


def accelerated() -> bool:
    """Whether the default device is a GPU or a TPU."""
    return jax.default_backend() != "cpu"


def dot_product_attention(
    q: jax.Array,  # [B, T, H, K]
    k: jax.Array,  # [B, G, K, C]
    v: jax.Array,  # [B, G, C, K]
    allowed: jax.Array,  # [B, T, C] bool
    scale: float,
    cap: float = 0.0,
    sinks: jax.Array | None = None,  # [H]
) -> jax.Array:  # [B, T, H, K]
    """Grouped-query attention; the softmax is in float32.

    A sink is one more score in its head's softmax, with nothing to read behind it.

    GPUs and TPUs run JAX's own, which knows neither caps nor sinks. Here the queries of a group
    share one product with its keys, and both products have their operands as a batch of plain
    matrices: other orders of the axes cost a CPU half as much again.
    """
    if accelerated() and not cap and sinks is None:
        k, v = k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)
        with jax.default_matmul_precision(PRECISION.name.lower()):  # it takes no argument for that
            return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None], scale=scale)
    B, T, H, K = q.shape
    G, C = k.shape[1], k.shape[3]
    q = q.swapaxes(1, 2).reshape(B, G, H // G * T, K)
    scores = soft_cap(einsum("bgtk,bgkc->bgtc", q, k) * scale, cap)
    scores = scores.astype(jnp.float32).reshape(B, H, T, C)
    scores = jnp.where(allowed[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, -1)
    if sinks is not None:  # what it leaves of each row: e^s / (e^s + e^sink), s the log of its sum
        total = jax.nn.logsumexp(scores, -1, keepdims=True)
        weights *= jax.nn.sigmoid(total - sinks.astype(jnp.float32)[None, :, None, None])
    weights = weights.astype(q.dtype).reshape(B, G, H // G * T, C)
    mixed = einsum("bgtc,bgck->bgtk", weights, v)
    return mixed.reshape(B, H, T, K).swapaxes(1, 2)


def linear(
    x: jax.Array,  # [B, T, *I]
    kernel: jax.Array,  # [*O, *I]
    inputs: int = 1,  # how many axes I has
    few_rows: bool = False,
) -> jax.Array:  # [B, T, *O]
    """A projection.

    For few rows the kernel is the left factor and x the right one, its inputs first, and the
    product reads the kernel once as it lies: on a CPU 2 to 3 times as fast for 4 to 32 rows, and
    still no slower for 96. The barriers keep XLA from folding the two transpositions into the
    product, which would make it the slow one again.
    """
    mine = tuple(range(x.ndim - inputs, x.ndim))
    theirs = tuple(range(kernel.ndim - inputs, kernel.ndim))
    if not few_rows:
        return jax.lax.dot_general(x, kernel, ((mine, theirs), ((), ())), precision=PRECISION)
    x = jax.lax.optimization_barrier(jnp.moveaxis(x, mine, tuple(range(inputs))))
    out = jax.lax.dot_general(
        kernel, x, ((theirs, tuple(range(inputs))), ((), ())), precision=PRECISION
    )
    return jnp.moveaxis(jax.lax.optimization_barrier(out), (-2, -1), (0, 1))


def query_growth(
    positions: jax.Array,  # [B, T]
    growth: float,
    period: int,  # tokens
) -> jax.Array:  # [B, T, 1, 1]
    """How much longer queries are far from the start, so that attention stays as sharp there."""
    return 1 + growth * jnp.log1p(positions // period)[..., None, None].astype(jnp.float32)


def query_log(
    positions: jax.Array,  # [B, T]
    base: int,  # tokens
) -> jax.Array:  # [B, T, 1, 1]
    """Log-n attention: 1 up to `base` tokens, then the logarithm of how many there are, by it."""
    log = jnp.log1p(positions[..., None, None].astype(jnp.float32))
    return jnp.maximum(log / jnp.log(jnp.float32(base)), 1.0)
