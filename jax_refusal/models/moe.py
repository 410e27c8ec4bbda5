"""A mixture of experts: a router sends each token to a few of E gated MLPs.

Letters: B batch row, T token, N tokens of all rows, D residual width, E experts, J experts of one
token, F width of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_refusal.models import mlp as dense
from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import ACTIVATIONS, PRECISION, linear, times
from jax_refusal.models.params import INSIDE, POST_NORM, READS, WRITES, Param
from jax_refusal.models.spec import Mlp, MlpAndMoe, Moe


def params(spec: Moe, D: int) -> list[Param]:
    E, F, stream = ("experts", spec.experts), ("expert_mlp", spec.width), ("embed", D)
    file = "mlp.experts.{expert}."
    found = [
        Param("router", (E, stream), READS, "mlp.gate.weight"),
        Param("expert_gate", (E, stream, F), READS, f"{file}gate_proj.weight", "expert_mlp embed"),
        Param("expert_up", (E, stream, F), READS, f"{file}up_proj.weight", "expert_mlp embed"),
        Param("expert_down", (E, F, stream), WRITES, f"{file}down_proj.weight", "embed expert_mlp"),
    ]
    if spec.bias:
        found += [
            Param("router_bias", (E,), INSIDE, "mlp.router.bias"),
            Param("expert_gate_bias", (E, F), INSIDE, "mlp.experts.gate_up_proj_bias"),
            Param("expert_up_bias", (E, F), INSIDE, "mlp.experts.gate_up_proj_bias"),
            Param("expert_down_bias", (E, stream), WRITES, "mlp.experts.down_proj_bias"),
        ]
    if spec.shared_width:
        found += [
            dataclasses.replace(
                param,
                name=f"shared_{param.name}",
                hf=param.hf.replace("mlp.", "mlp.shared_expert."),
                gguf="",
            )
            for param in dense.params(_shared(spec), D)
        ]
    if spec.shared_gate:
        gate = (("scalar", 1), stream)
        found.append(Param("shared_share", gate, READS, "mlp.shared_expert_gate.weight"))
    return found


def _shared(spec: Moe) -> Mlp:
    """The expert that every token goes through."""
    return Mlp(width=spec.shared_width, activation=spec.activation)


def side_by_side_params(spec: MlpAndMoe, D: int) -> list[Param]:
    E, stream = ("experts", spec.moe.experts), (("embed", D),)
    return [
        *dense.params(spec.mlp, D),
        *params(spec.moe, D),
        Param("router_scale", stream, READS, "router.scale"),
        Param("expert_scale", (E,), INSIDE, "router.per_expert_scale"),
        Param("expert_norm", stream, READS, "pre_feedforward_layernorm_2.weight"),
        Param("expert_post_norm", stream, POST_NORM, "post_feedforward_layernorm_2.weight"),
        Param("dense_post_norm", stream, POST_NORM, "post_feedforward_layernorm_1.weight"),
    ]


def moe(p: Weights, spec: Moe, x: jax.Array, ctx: Context, site: Site) -> jax.Array:
    """What the experts write, of the stream x [B, T, D]."""
    with jax.named_scope("mlp"):
        x = ctx.normed(p, "mlp_norm", x)
        shares, chosen = route(
            x, p["router"], spec.experts_per_token, spec.norm_topk_prob, p.get("router_bias")
        )
        out = routed_mlp(x, shares, chosen, p, spec)
        if spec.shared_width:
            own = {name: p[f"shared_{name}"] for name in ("gate", "up", "down")}
            every = dense.gated(own, _shared(spec), x, ctx, site)
            if spec.shared_gate:
                every = every * jax.nn.sigmoid(ctx.linear(x, p["shared_share"]))
            out = out + every
        return ctx.normed(p, "mlp_post_norm", out)


def mlp_and_moe(p: Weights, spec: MlpAndMoe, x: jax.Array, ctx: Context, site: Site) -> jax.Array:
    """What an MLP and experts write together, of the stream x [B, T, D]."""
    with jax.named_scope("mlp"):
        out = dense.gated(p, spec.mlp, ctx.normed(p, "mlp_norm", x), ctx, site)
    with jax.named_scope("experts"):
        D, chosen_of = x.shape[-1], spec.moe.experts_per_token
        read = ctx.norm(x, jnp.ones(D, x.dtype)) * p["router_scale"][None, None]
        read = times(read, D**-0.5)
        shares, chosen = route(read, p["router"], chosen_of, spec.moe.norm_topk_prob)
        shares = shares * p["expert_scale"].astype(jnp.float32)[chosen]
        routed = routed_mlp(ctx.normed(p, "expert_norm", x), shares, chosen, p, spec.moe)
        routed = ctx.normed(p, "expert_post_norm", routed)
    return ctx.normed(p, "mlp_post_norm", ctx.normed(p, "dense_post_norm", out) + routed)


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
    p: Weights,  # expert_gate and expert_up [E, D, F], expert_down [E, F, D], and their biases
    spec: Moe,
) -> jax.Array:  # [B, T, D]
    """Every token through its own experts and no other, whichever tokens share the batch.

    The J copies of all tokens lie sorted by expert, so that each expert multiplies one run of
    rows. Nothing is dropped, and there is no capacity: prefill and decode are the same sum.
    """
    B, T, D = x.shape
    J = experts.shape[-1]
    order = jnp.argsort(experts.reshape(-1), stable=True)  # [N J]
    rows = jnp.zeros(spec.experts, jnp.int32).at[experts.reshape(-1)].add(1)  # [E]
    owner = experts.reshape(-1)[order]  # [N J]

    def each(x: jax.Array, name: str) -> jax.Array:  # [N J, I] -> [N J, O]
        # The TPU's kernel takes no precision beside bfloat16, where it would say nothing anyway.
        precision = PRECISION if x.dtype == jnp.float32 else None
        y = jax.lax.ragged_dot(x, p[name], rows, precision=precision)
        return y + p[f"{name}_bias"][owner] if spec.bias else y

    copies = x.reshape(B * T, D)[order // J]
    gate, up = each(copies, "expert_gate"), each(copies, "expert_up")
    if spec.swiglu_limit:
        gate = jnp.minimum(gate, spec.swiglu_limit)
        up = jnp.clip(up, -spec.swiglu_limit, spec.swiglu_limit) + 1
    out = each(ACTIVATIONS[spec.activation](gate) * up, "expert_down")
    out = out[jnp.argsort(order)].reshape(B, T, J, D) * shares[..., None]
    return out.sum(2).astype(x.dtype)
