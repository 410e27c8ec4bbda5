"""Mamba-2, a state-space model whose state fades by one number for each head (Granite 4).

Letters: B batch row, T token, Q token that is asked for, D residual width, H heads, G groups of
heads, N state width, P head width. In the terms of `recurrence`, what is put into the state is a
value, where it is put a key (the literature's B), and where it is read a query (its C).
"""

import jax
import jax.numpy as jnp

from jax_refusal.models.cache import Memory
from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import rms_norm
from jax_refusal.models.params import INSIDE, READS, WRITES, Param
from jax_refusal.models.recurrence import convolve, recur
from jax_refusal.models.spec import Mamba2


def params(spec: Mamba2, D: int) -> list[Param]:
    heads, width = ("state_heads", spec.heads), ("value_width", spec.value_width)
    groups, state = ("key_heads", spec.key_heads), ("key_width", spec.key_width)
    stream, taps = ("embed", D), ("taps", spec.taps)
    values, keys = (heads, width), (groups, state)
    of_values, of_keys = "(state_heads value_width)", "(key_heads key_width)"

    def projection(name: str, axes: tuple, layout: str) -> Param:
        file = "mamba.in_proj.weight"
        return Param(f"ssm_{name}", (*axes, stream), READS, file, f"{layout} embed")

    def kernel(name: str, axes: tuple, layout: str) -> Param:
        file = "mamba.conv1d.weight"
        return Param(f"conv_{name}", (*axes, taps), INSIDE, file, f"{layout} () taps")

    def inner(name: str, axes: tuple, file: str, layout: str) -> Param:
        return Param(name, axes, INSIDE, f"mamba.{file}", layout)

    parts = [("v", values, of_values), ("k", keys, of_keys), ("q", keys, of_keys)]
    found = [projection("gate", values, of_values), *(projection(*part) for part in parts)]
    found += [projection("step", (heads,), "state_heads"), *(kernel(*part) for part in parts)]
    if spec.conv_bias:
        found += [inner(f"conv_{n}_bias", axes, "conv1d.bias", of) for n, axes, of in parts]
    return [
        *found,
        inner("ssm_step_bias", (heads,), "dt_bias", "state_heads"),
        inner("ssm_log_rate", (heads,), "A_log", "state_heads"),
        inner("ssm_skip", (heads,), "D", "state_heads"),
        inner("ssm_norm", values, "norm.weight", of_values),
        Param("ssm_out", (stream, *values), WRITES, "mamba.out_proj.weight", f"embed {of_values}"),
    ]


def mamba(
    p: Weights,
    spec: Mamba2,
    x: jax.Array,  # [B, T, D], normed
    ctx: Context,
    site: Site,
    memory: Memory,
) -> tuple[jax.Array, Memory]:  # [B, Q, D]
    with jax.named_scope("mamba"):
        before, runs = memory.before(), ctx.shared.recurrent
        streams, kept = {}, {}
        for name in "vkq":
            read, tail = ctx.linear(x, p[f"ssm_{name}"]), before.get(f"{name}_tail")
            bias = p.get(f"conv_{name}_bias")
            mixed, kept[f"{name}_tail"] = convolve(read, p[f"conv_{name}"], runs, tail, bias)
            streams[name] = jax.nn.silu(mixed)
        step = jax.nn.softplus(ctx.linear(x, p["ssm_step"]) + p["ssm_step_bias"][None, None])
        step, values = step.astype(jnp.float32), streams["v"].astype(jnp.float32)
        decay = -jnp.exp(p["ssm_log_rate"][None, None].astype(jnp.float32)) * step
        out, kept["state"] = recur(
            streams["q"],
            streams["k"],
            values * step[..., None],
            decay,
            runs,
            before.get("state"),
        )
        out = ctx.last(out + p["ssm_skip"][None, None, :, None].astype(jnp.float32) * values)
        gate = ctx.linear(ctx.last(x), p["ssm_gate"]).astype(jnp.float32)
        normed = _group_norm(out * jax.nn.silu(gate), spec, ctx.shared.arch.norm_epsilon)
        z = site("z", (p["ssm_norm"][None, None].astype(jnp.float32) * normed).astype(x.dtype))
        return ctx.linear(z, p["ssm_out"], inputs=2), memory.replace(**kept)


def _group_norm(x: jax.Array, spec: Mamba2, epsilon: float) -> jax.Array:  # [B, Q, H, P], float32
    """Of all channels of a group together, without weights."""
    groups = x.reshape(*x.shape[:2], spec.key_heads, -1)
    return rms_norm(groups, jnp.ones(groups.shape[-1]), epsilon).reshape(x.shape)
