"""The arithmetic that mixers and branches share, as functions of arrays.

Letters: B batch row, T token, D residual width, I inputs and O outputs of a projection.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

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


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap), which stays between -cap and cap; x itself for cap = 0."""
    return jnp.tanh(x / cap) * cap if cap else x


def accelerated() -> bool:
    """Whether what is traced is for a GPU or a TPU: for the mesh that is set, which may be one of
    another machine, or the default device."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return (device.platform if device is not None else jax.default_backend()) != "cpu"


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


def times(x: jax.Array, factor: float) -> jax.Array:
    """The factor is not rounded to the dtype of x; the product is."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
