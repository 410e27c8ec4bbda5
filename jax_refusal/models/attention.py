"""Softmax attention: grouped queries, sliding windows, shared keys, caps and sinks.

Letters: B batch row, T token, Q token that is asked for, C context slot, D residual width, H query
heads, G key/value heads, K head width.
"""

import jax
import jax.numpy as jnp

from jax_refusal.models.cache import Entry, Memory
from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import PRECISION, accelerated, einsum, soft_cap
from jax_refusal.models.params import INSIDE, READS, WRITES, Param
from jax_refusal.models.rope import rotate
from jax_refusal.models.spec import Attention
from jax_refusal.sharding import constrain


def params(spec: Attention, D: int) -> list[Param]:
    heads, kv_heads = ("heads", spec.heads), ("kv_heads", spec.kv_heads)
    width, stream = ("head_width", spec.head_width), ("embed", D)
    q, kv = (heads, width), (kv_heads, width)
    in_q, in_kv = "(heads head_width)", "(kv_heads head_width)"
    own, values = spec.kv_source is None, spec.kv_source is None and not spec.keys_are_values

    def projection(name: str, axes: tuple, layout: str, gguf: str) -> Param:
        file = f"self_attn.{name[0]}_proj.weight"
        return Param(name, (*axes, stream), READS, file, f"{layout} embed", gguf)

    def inner(name: str, file: str, axes: tuple, layout: str, gguf: str = "") -> Param:
        return Param(name, axes, INSIDE, f"self_attn.{file}", layout, gguf)

    # A head's queries and its gate follow each other in one tensor.
    queries = ("q", "q_gate") if spec.gate else ("q",)
    of_q = "(heads | head_width)" if spec.gate else in_q
    found = [projection(name, q, of_q, "attn_q.weight") for name in queries]
    found += [projection("k", kv, in_kv, "attn_k.weight")] * own
    found += [projection("v", kv, in_kv, "attn_v.weight")] * values
    file, layout = "self_attn.o_proj.weight", "embed (heads head_width)"
    found.append(Param("o", (stream, *q), WRITES, file, layout, "attn_output.weight"))
    if spec.qkv_bias:
        found += [inner(f"{n}_bias", "q_proj.bias", q, of_q, "attn_q.bias") for n in queries]
        found += [inner("k_bias", "k_proj.bias", kv, in_kv, "attn_k.bias")] * own
        found += [inner("v_bias", "v_proj.bias", kv, in_kv, "attn_v.bias")] * values
    if spec.out_bias:
        found.append(
            Param("o_bias", (stream,), WRITES, "self_attn.o_proj.bias", gguf="attn_output.bias")
        )
    if spec.qk_norm:
        whole = spec.qk_norm == "projection"
        normed_q, normed_k = (q, kv) if whole else ((width,), (width,))
        names = (in_q, in_kv) if whole else ("head_width", "head_width")
        found += [inner("q_norm", "q_norm.weight", normed_q, names[0], "attn_q_norm.weight")]
        found += [inner("k_norm", "k_norm.weight", normed_k, names[1], "attn_k_norm.weight")] * own
    if spec.sinks:
        found.append(inner("sinks", "sinks", (heads,), "heads"))
    return found


def attention(
    p: Weights,
    spec: Attention,
    x: jax.Array,  # [B, T, D], normed
    ctx: Context,
    site: Site,
    memory: Memory,
) -> tuple[jax.Array, Memory]:  # [B, Q, D]
    with jax.named_scope("attention"):
        q = _biased(p, "q", ctx.linear(ctx.last(x), p["q"]))
        if spec.kv_source is None:
            memory, context = memory.extend(**_keys_and_values(p, spec, x, ctx, site))
        else:
            context = memory.read()
        q = ctx.normed(p, "q_norm", q)
        angles = jax.tree.map(ctx.last, ctx.angles(spec.rope))
        q = rotate(constrain(q, "batch", None, "heads", "head_width"), angles)
        if ctx.shared.query_scale is not None:
            q = q * ctx.last(ctx.shared.query_scale).astype(q.dtype)
        z = _attend(p, spec, q, context, ctx.allowed(spec.window), site)
        if spec.gate:
            gate = _biased(p, "q_gate", ctx.linear(ctx.last(x), p["q_gate"]))
            z = z * jax.nn.sigmoid(gate)
        z = site("z", z)
        out = ctx.linear(z, p["o"], inputs=2)
        return (out + p["o_bias"][None, None] if spec.out_bias else out), memory


def _keys_and_values(p: Weights, spec: Attention, x: jax.Array, ctx: Context, site: Site) -> Entry:
    """What the context has of tokens x [B, T, D]: keys [B, G, K, T] and values [B, G, T, K]."""
    k = v = _biased(p, "k", ctx.linear(x, p["k"]))
    if not spec.keys_are_values:
        v = _biased(p, "v", ctx.linear(x, p["v"]))
    k = site("keys", rotate(ctx.normed(p, "k_norm", k), ctx.angles(spec.rope)))
    if spec.value_norm:
        v = ctx.norm(v, jnp.ones(v.shape[-1], v.dtype))
    return {"k": k.transpose(0, 2, 3, 1), "v": site("values", v).swapaxes(1, 2)}


def _biased(p: Weights, name: str, x: jax.Array) -> jax.Array:
    bias = p.get(f"{name}_bias")
    return x if bias is None else x + bias[None, None]


def _attend(
    p: Weights,
    spec: Attention,
    q: jax.Array,  # [B, Q, H, K]
    context: Entry,
    allowed: jax.Array,  # [B, Q, C]
    site: Site,
) -> jax.Array:  # [B, Q, H, K]
    options = (allowed, spec.score_scale, spec.score_cap, p.get("sinks"))
    if not site.wants("pattern"):
        return dot_product_attention(q, context["k"], context["v"], *options)
    weights = pattern(q, context["k"], *options)
    site("pattern", weights.swapaxes(1, 2))
    return mixed(weights, context["v"], q.dtype)


def dot_product_attention(
    q: jax.Array,  # [B, Q, H, K]
    k: jax.Array,  # [B, G, K, C]
    v: jax.Array,  # [B, G, C, K]
    allowed: jax.Array,  # [B, Q, C] bool
    scale: float,
    cap: float = 0.0,
    sinks: jax.Array | None = None,  # [H]
) -> jax.Array:  # [B, Q, H, K]
    """Grouped-query attention. GPUs and TPUs run JAX's own, which knows neither caps nor sinks."""
    if accelerated() and not cap and sinks is None:
        k, v = k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)
        with jax.default_matmul_precision(PRECISION.name.lower()):  # it takes no argument for that
            return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None], scale=scale)
    return mixed(pattern(q, k, allowed, scale, cap, sinks), v, q.dtype)


def pattern(
    q: jax.Array,  # [B, Q, H, K]
    k: jax.Array,  # [B, G, K, C]
    allowed: jax.Array,  # [B, Q, C] bool
    scale: float,
    cap: float = 0.0,
    sinks: jax.Array | None = None,  # [H]
) -> jax.Array:  # [B, H, Q, C] float32
    """How much each query attends to each slot; the softmax is in float32.

    A sink is one more score in its head's softmax, with nothing to read behind it. The queries of
    a group share one product with its keys, as operands that are a batch of plain matrices: other
    orders of the axes cost a CPU half as much again.
    """
    B, Q, H, K = q.shape
    G, C = k.shape[1], k.shape[3]
    q = q.swapaxes(1, 2).reshape(B, G, H // G * Q, K)
    scores = soft_cap(einsum("bgqk,bgkc->bgqc", q, k) * scale, cap)
    scores = scores.astype(jnp.float32).reshape(B, H, Q, C)
    scores = jnp.where(allowed[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, -1)
    if sinks is not None:  # what it leaves of each row: e^s / (e^s + e^sink), s the log of its sum
        total = jax.nn.logsumexp(scores, -1, keepdims=True)
        weights *= jax.nn.sigmoid(total - sinks.astype(jnp.float32)[None, :, None, None])
    return weights


def mixed(
    weights: jax.Array,  # [B, H, Q, C]
    v: jax.Array,  # [B, G, C, K]
    dtype: jnp.dtype,
) -> jax.Array:  # [B, Q, H, K]
    """The values that each head attends to."""
    B, H, Q, C = weights.shape
    G, K = v.shape[1], v.shape[3]
    weights = weights.astype(dtype).reshape(B, G, H // G * Q, C)
    return einsum("bgqc,bgck->bgqk", weights, v).reshape(B, H, Q, K).swapaxes(1, 2)
