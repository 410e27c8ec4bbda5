"""A mixture of experts: a router sends each token to a few of E gated MLPs.

Letters: L layers, B batch row, T token, N tokens of all rows, D residual width, E experts,
J experts of one token, F width of an expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_refusal.models.architecture import Architecture
from jax_refusal.models.layers import PRECISION, linear


def axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """The leaves of a block with experts and their logical axes, before those of layers."""
    leaves: dict[str, tuple[str, ...]] = {
        "router": ("experts", "embed"),
        "expert_gate": ("experts", "embed", "mlp"),
        "expert_up": ("experts", "embed", "mlp"),
        "expert_down": ("experts", "mlp", "embed"),
    }
    if arch.expert_bias:
        leaves |= {
            "router_bias": ("experts",),
            "expert_gate_bias": ("experts", "mlp"),
            "expert_up_bias": ("experts", "mlp"),
            "expert_down_bias": ("experts", "embed"),
        }
    return leaves


def route(
    x: jax.Array,  # [B, T, D]
    router: jax.Array,  # [E, D]
    count: int,  # J
    normalised: bool,  # the shares of one token add up to 1
    bias: jax.Array | None = None,  # [E]
) -> tuple[jax.Array, jax.Array]:  # shares [B, T, J] float32, experts [B, T, J] int32
    """The experts of each token, by probability; of two that tie, the one with the lower number.

    Normalised shares are the softmax over the logits of the chosen experts alone.
    """
    logits = linear(x, router)
    if bias is not None:
        logits = logits + bias[None, None]
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
    biases: tuple[jax.Array, jax.Array, jax.Array] | None = None,  # [E, F], [E, F], [E, D]
    limit: float = 0.0,  # `Architecture.swiglu_limit`
) -> jax.Array:  # [B, T, D]
    """Every token through its own experts and no other, whichever tokens share the batch.

    The J copies of all tokens lie sorted by expert, so that each expert multiplies one run of
    rows. Nothing is dropped, and there is no capacity: prefill and decode are the same sum.
    """
    B, T, D = x.shape
    J = experts.shape[-1]
    order = jnp.argsort(experts.reshape(-1), stable=True)  # [N J]
    rows = jnp.zeros(len(gate), jnp.int32).at[experts.reshape(-1)].add(1)  # [E]

    owner = experts.reshape(-1)[order]  # [N J]

    def each(x: jax.Array, kernels: jax.Array, i: int) -> jax.Array:  # [N J, I] -> [N J, O]
        y = jax.lax.ragged_dot(x, kernels, rows, precision=PRECISION)
        return y if biases is None else y + biases[i][owner]

    copies = x.reshape(B * T, D)[order // J]
    gated, lifted = each(copies, gate, 0), each(copies, up, 1)
    if limit:
        gated, lifted = jnp.minimum(gated, limit), jnp.clip(lifted, -limit, limit) + 1
    out = each(activation(gated) * lifted, down, 2)
    out = out[jnp.argsort(order)].reshape(B, T, J, D) * shares[..., None]
    return out.sum(2).astype(x.dtype)
