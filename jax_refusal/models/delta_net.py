"""Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5).

Letters: B batch row, T token, Q token that is asked for, D residual width, H value heads, G key
heads, R value heads of a key head, N key width, P value width.
"""

import jax
import jax.numpy as jnp

from jax_refusal.models.cache import Memory
from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import rms_norm
from jax_refusal.models.params import INSIDE, READS, WRITES, Param
from jax_refusal.models.recurrence import convolve, recur
from jax_refusal.models.spec import DeltaNet


def params(spec: DeltaNet, D: int) -> list[Param]:
    heads, width = ("key_heads", spec.key_heads), ("key_width", spec.key_width)
    group, taps = ("value_heads", spec.heads // spec.key_heads), ("taps", spec.taps)
    stream, value = ("embed", D), ("value_width", spec.value_width)
    keys, values, scalars = (heads, width), (heads, group, value), (heads, group)
    # What one key head has of queries, keys, values and gates follows each other.
    in_keys, in_values = "(key_heads | key_width)", "(key_heads | value_heads value_width)"
    of_keys, of_values = "(key_heads key_width)", "(key_heads value_heads value_width)"

    def projection(name: str, axes: tuple, file: str, layout: str) -> Param:
        file = f"linear_attn.in_proj_{file}.weight"
        return Param(f"delta_{name}", (*axes, stream), READS, file, f"{layout} embed")

    def kernel(name: str, axes: tuple, layout: str) -> Param:
        file = "linear_attn.conv1d.weight"
        return Param(f"conv_{name}", (*axes, taps), INSIDE, file, f"{layout} () taps")

    def inner(name: str, axes: tuple, file: str, layout: str) -> Param:
        return Param(f"delta_{name}", axes, INSIDE, f"linear_attn.{file}", layout)

    out = f"embed {of_values}"
    return [
        projection("q", keys, "qkvz", in_keys),
        projection("k", keys, "qkvz", in_keys),
        projection("v", values, "qkvz", in_values),
        projection("z", values, "qkvz", in_values),
        projection("beta", scalars, "ba", "(key_heads | value_heads)"),
        projection("decay", scalars, "ba", "(key_heads | value_heads)"),
        kernel("q", keys, of_keys),
        kernel("k", keys, of_keys),
        kernel("v", values, of_values),
        inner("decay_bias", scalars, "dt_bias", "(key_heads value_heads)"),
        inner("log_rate", scalars, "A_log", "(key_heads value_heads)"),
        inner("norm", (value,), "norm.weight", "value_width"),
        Param("delta_out", (stream, *values), WRITES, "linear_attn.out_proj.weight", out),
    ]


def delta_net(
    p: Weights,
    spec: DeltaNet,
    x: jax.Array,  # [B, T, D], normed
    ctx: Context,
    site: Site,
    memory: Memory,
) -> tuple[jax.Array, Memory]:  # [B, Q, D]
    with jax.named_scope("delta_net"):
        before, runs = memory.before(), ctx.shared.recurrent
        streams, kept = {}, {}
        for name in "qkv":
            read, kernel = ctx.linear(x, p[f"delta_{name}"]), p[f"conv_{name}"]
            if name == "v":
                read, kernel = _flat(read), kernel.reshape(spec.heads, *kernel.shape[2:])
            tail = before.get(f"{name}_tail")
            mixed, kept[f"{name}_tail"] = convolve(read, kernel, runs, tail)
            streams[name] = jax.nn.silu(mixed)
        q, k = _unit(streams["q"]) * spec.key_width**-0.5, _unit(streams["k"])
        beta = jax.nn.sigmoid(ctx.linear(x, p["delta_beta"]))
        rest = ctx.linear(x, p["delta_decay"]).astype(jnp.float32)
        rest = jax.nn.softplus(rest + p["delta_decay_bias"][None, None].astype(jnp.float32))
        decay = -jnp.exp(p["delta_log_rate"][None, None].astype(jnp.float32)) * rest
        out, kept["state"] = recur(
            q, k, streams["v"], _heads(decay), runs, before.get("state"), _heads(beta)
        )
        gate = _flat(ctx.linear(ctx.last(x), p["delta_z"])).astype(jnp.float32)
        out = ctx.last(out).astype(x.dtype)
        normed = rms_norm(out, p["delta_norm"], ctx.shared.arch.norm_epsilon)
        z = site("z", (normed * jax.nn.silu(gate)).astype(x.dtype))
        z = z.reshape(*z.shape[:2], spec.key_heads, -1, spec.value_width)
        return ctx.linear(z, p["delta_out"], inputs=3), memory.replace(**kept)


def _flat(x: jax.Array) -> jax.Array:  # [B, T, G, R, P] -> [B, T, H, P]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _heads(x: jax.Array) -> jax.Array:  # [B, T, G, R] -> [B, T, H]
    return x.reshape(*x.shape[:2], -1)


def _unit(x: jax.Array) -> jax.Array:  # [B, T, G, N], float32
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
