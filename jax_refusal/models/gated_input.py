"""Inputs of a layer's own (Gemma 4 E2B, E4B): every token has a vector for every layer, made of its
id and of its embedding as it was before any edit; a gate that reads the stream lets it in.

Letters: B batch row, T token, Q token that is asked for, D residual width, L layers, W width of a
layer's own input.
"""

import jax
import jax.numpy as jnp

from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import ACTIVATIONS, linear, rms_norm, times
from jax_refusal.models.params import INSIDE, POST_NORM, READS, WRITES, Param
from jax_refusal.models.spec import Architecture, GatedInput


def params(spec: GatedInput, D: int) -> list[Param]:
    inner, stream = ("per_layer", spec.width), ("embed", D)
    return [
        Param("per_layer_gate", (inner, stream), READS, "per_layer_input_gate.weight"),
        Param("per_layer_out", (stream, inner), WRITES, "per_layer_projection.weight"),
        Param("per_layer_post_norm", (stream,), POST_NORM, "post_per_layer_input_norm.weight"),
    ]


def top_params(arch: Architecture) -> list[Param]:
    """What makes the inputs of all layers."""
    if arch.token_input is None:
        return []
    layers, inner = ("layers", arch.layers), ("per_layer", arch.token_input.width)
    return [
        Param(
            "per_layer_embed",
            (("per_layer_vocab", arch.token_input.vocab), layers, inner),
            INSIDE,
            "model.embed_tokens_per_layer.weight",
            "per_layer_vocab (layers per_layer)",
        ),
        Param(
            "per_layer_context",
            (layers, inner, ("embed", arch.width)),
            READS,
            "model.per_layer_model_projection.weight",
            "(layers per_layer) embed",
        ),
        Param("per_layer_norm", (inner,), INSIDE, "model.per_layer_projection_norm.weight"),
    ]


def inputs(
    p: Weights,
    arch: Architecture,
    ids: jax.Array,  # [B, T]
    x: jax.Array,  # [B, T, D] their embeddings
) -> jax.Array:  # [L, B, T, W]
    assert arch.token_input is not None
    context = times(linear(x, p["per_layer_context"]), arch.width**-0.5)
    context = rms_norm(context, p["per_layer_norm"], arch.norm_epsilon, arch.norm)
    # Rounded to the model's dtype before it multiplies, as the scale of the embedding is.
    token = p["per_layer_embed"][ids] * jnp.asarray(arch.token_input.width**0.5, x.dtype)
    return times(context + token, 2**-0.5).transpose(2, 0, 1, 3)


def gated_input(
    p: Weights, spec: GatedInput, x: jax.Array, ctx: Context, site: Site
) -> jax.Array:  # [B, Q, D]
    """What a layer takes of its own input, of the stream x [B, Q, D]."""
    with jax.named_scope("per_layer_input"):
        gate = ctx.linear(x, p["per_layer_gate"])
        out = ctx.linear(ACTIVATIONS[spec.activation](gate) * ctx.own_input, p["per_layer_out"])
        return ctx.normed(p, "per_layer_post_norm", out)
