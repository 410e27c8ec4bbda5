"""What Gemma 4 has in a layer beside attention and MLP, and where that meets the residual stream.

Letters: B batch row, T token, D residual width, L layers, W width of a layer's own input.

- An MLP and experts side by side (26B-A4B), each with a norm of its own; their sum passes the norm
  behind the MLP and is the one write `mlp_out`.
- Inputs for each layer (E2B, E4B): every token has a vector [W] for every layer, made of its id and
  of its embedding as it was before any edit. A gate that reads the stream behind the MLP turns it
  into one more write, the fourth of a layer beside embedding, attention and MLP, at the site
  `per_layer_out`.
- A number that the whole stream is multiplied by at the end of a layer. It keeps directions, so an
  ablation stays one; what was added at layer l has been scaled by all layers from l on in the end.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_refusal.models import experts, layers
from jax_refusal.models.architecture import Architecture

if TYPE_CHECKING:
    from jax_refusal.models.block import Block
    from jax_refusal.models.transformer import Transformer


def block_axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """The leaves of each layer, by name."""
    found: dict[str, tuple[str, ...]] = {}
    if arch.expert_width:
        found |= {
            "gate": ("mlp", "embed"),
            "up": ("mlp", "embed"),
            "down": ("embed", "mlp"),
            "expert_gate": ("experts", "embed", "expert_mlp"),
            "expert_up": ("experts", "embed", "expert_mlp"),
            "expert_down": ("experts", "expert_mlp", "embed"),
            "router_scale": ("embed",),
            "expert_scale": ("experts",),
            "expert_norm": ("embed",),
            "expert_post_norm": ("embed",),
            "dense_post_norm": ("embed",),
        }
    if arch.per_layer_width:
        found |= {
            "per_layer_gate": ("per_layer", "embed"),
            "per_layer_out": ("embed", "per_layer"),
            "per_layer_post_norm": ("embed",),
        }
    if arch.layer_scale:
        found |= {"scale": ("scalar",)}
    return found


def top_axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """The leaves that belong to no single layer."""
    if not arch.per_layer_width:
        return {}
    return {
        "per_layer_embed": ("per_layer_vocab", "layers", "per_layer"),
        "per_layer_context": ("layers", "per_layer", "embed"),
        "per_layer_norm": ("per_layer",),
    }


def sizes(arch: Architecture) -> dict[str, int]:
    """The lengths of the logical axes that are here and nowhere else."""
    return {
        "expert_mlp": arch.expert_width,
        "per_layer": arch.per_layer_width,
        "per_layer_vocab": arch.per_layer_vocab,
        "scalar": 1,
    }


def with_experts(
    block: "Block",
    dense: jax.Array,  # [B, T, D] what the MLP made of the normed stream
    x: jax.Array,  # [B, T, D] the stream
) -> jax.Array:  # [B, T, D]
    arch = block.arch
    with jax.named_scope("experts"):
        read = block.normed(x, jnp.ones(arch.width, x.dtype)) * block.router_scale[None, None]
        read = _times(read, arch.width**-0.5)
        count, add_up = arch.experts_per_token, arch.shares_add_up
        shares, chosen = experts.route(read, block.router[...], count, add_up)
        shares = shares * block.expert_scale[...].astype(jnp.float32)[chosen]
        kernels = (block.expert_gate[...], block.expert_up[...], block.expert_down[...])
        read = block.normed(x, block.expert_norm)
        activation = layers.ACTIVATIONS[arch.activation]
        out = experts.routed_mlp(read, shares, chosen, *kernels, activation)
        return block.normed(dense, block.dense_post_norm) + block.normed(
            out, block.expert_post_norm
        )


def per_layer_inputs(
    model: "Transformer",
    ids: jax.Array,  # [B, T]
) -> jax.Array:  # [L, B, T, W]
    arch, x = model.arch, model.embedded(ids)
    context = layers.linear(x, model.per_layer_context[...])
    context = _times(context, arch.width**-0.5)
    context = layers.rms_norm(context, model.per_layer_norm[...], arch.norm_epsilon, arch.norm)
    # Rounded to the model's dtype before it multiplies, as the scale of the embedding is.
    token = model.per_layer_embed[...][ids] * jnp.asarray(arch.per_layer_width**0.5, x.dtype)
    return _times(context + token, 2**-0.5).transpose(2, 0, 1, 3)


def gated_input(
    block: "Block",
    x: jax.Array,  # [B, T, D] the stream
    own: jax.Array,  # [B, T, W] of `per_layer_inputs`
) -> jax.Array:  # [B, T, D]
    with jax.named_scope("per_layer_input"):
        gate = block.linear(x, block.per_layer_gate)
        gated = layers.ACTIVATIONS[block.arch.activation](gate) * own
        out = block.linear(gated, block.per_layer_out)
        return block.normed(out, block.per_layer_post_norm)


def _times(x: jax.Array, factor: float) -> jax.Array:
    """The factor is not rounded to the dtype of x; the product is."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
