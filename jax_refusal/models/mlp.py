"""The gated MLP of a layer.

Letters: B batch row, Q token that is asked for, D residual width, F MLP width.
"""

import jax

from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import ACTIVATIONS
from jax_refusal.models.params import INSIDE, READS, WRITES, Param
from jax_refusal.models.spec import Mlp


def params(spec: Mlp, D: int) -> list[Param]:
    inner, stream = ("mlp", spec.width), ("embed", D)
    found = [
        Param("gate", (inner, stream), READS, "mlp.gate_proj.weight", gguf="ffn_gate.weight"),
        Param("up", (inner, stream), READS, "mlp.up_proj.weight", gguf="ffn_up.weight"),
        Param("down", (stream, inner), WRITES, "mlp.down_proj.weight", gguf="ffn_down.weight"),
    ]
    if spec.bias:
        found += [
            Param("gate_bias", (inner,), INSIDE, "mlp.gate_proj.bias"),
            Param("up_bias", (inner,), INSIDE, "mlp.up_proj.bias"),
            Param("down_bias", (stream,), WRITES, "mlp.down_proj.bias"),
        ]
    return found


def gated(p: Weights, spec: Mlp, x: jax.Array, ctx: Context, site: Site) -> jax.Array:
    """The MLP between its norms: x [B, Q, D] -> [B, Q, D]."""
    gate, up = ctx.linear(x, p["gate"]), ctx.linear(x, p["up"])
    if spec.bias:
        gate, up = gate + p["gate_bias"][None, None], up + p["up_bias"][None, None]
    hidden = site("hidden", ACTIVATIONS[spec.activation](gate) * up)
    out = ctx.linear(hidden, p["down"])
    return out + p["down_bias"][None, None] if spec.bias else out


def mlp(p: Weights, spec: Mlp, x: jax.Array, ctx: Context, site: Site) -> jax.Array:
    """What the MLP writes, of the stream x [B, Q, D]."""
    with jax.named_scope("mlp"):
        out = gated(p, spec, ctx.normed(p, "mlp_norm", x), ctx, site)
        return ctx.normed(p, "mlp_post_norm", out)
