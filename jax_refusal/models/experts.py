"""A mixture of experts: a router sends each token to a few of E gated MLPs.

Letters: B batch row, T token, N tokens of all rows, D residual width, E experts, J experts of one
token, F width of an expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_refusal.models.layers import PRECISION, einsum


def route(
    x: jax.Array,  # [B, T, D]
    router: jax.Array,  # [D, E]
    count: int,  # J
    normalised: bool,  # the shares of one token add up to 1
) -> tuple[jax.Array, jax.Array]:  # shares [B, T, J] float32, experts [B, T, J] int32
    """The experts of each token, by probability; of two that tie, the one with the lower number."""
    logits = einsum("btd,de->bte", x, router)
    shares, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), -1), count)
    if normalised:
        shares = shares / shares.sum(-1, keepdims=True)
    return shares, experts


def routed_mlp(
    x: jax.Array,  # [B, T, D]
    shares: jax.Array,  # [B, T, J]
    experts: jax.Array,  # [B, T, J]
    gate: jax.Array,  # [E, D, F]
    up: jax.Array,  # [E, D, F]
    down: jax.Array,  # [E, F, D]
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:  # [B, T, D]
    """Every token through its own experts and no other, whichever tokens share the batch.

    The J copies of all tokens lie sorted by expert, so that each expert multiplies one run of
    rows. Nothing is dropped, and there is no capacity: prefill and decode are the same sum.
    """
    B, T, D = x.shape
    J = experts.shape[-1]
    order = jnp.argsort(experts.reshape(-1), stable=True)  # [N J]
    rows = jnp.zeros(len(gate), jnp.int32).at[experts.reshape(-1)].add(1)  # [E]

    def each(x: jax.Array, kernels: jax.Array) -> jax.Array:  # [N J, I], [E, I, O] -> [N J, O]
        return jax.lax.ragged_dot(x, kernels, rows, precision=PRECISION)

    copies = x.reshape(B * T, D)[order // J]
    out = each(activation(each(copies, gate)) * each(copies, up), down)
    out = out[jnp.argsort(order)].reshape(B, T, J, D) * shares[..., None]
    return out.sum(2).astype(x.dtype)
