"""One layer: a mixer, then branches; each is a site of the residual stream.

Letters: B batch row, T token, Q token that is asked for, D residual width.
"""

import jax

from jax_refusal.models import attention, delta_net, gated_input, mamba, mlp, moe
from jax_refusal.models.cache import Memory
from jax_refusal.models.context import Context, Site, Weights
from jax_refusal.models.ops import times
from jax_refusal.models.params import INSIDE, POST_NORM, READS, Param
from jax_refusal.models.spec import (
    Architecture,
    Attention,
    DeltaNet,
    GatedInput,
    LayerSpec,
    Mamba2,
    Mlp,
    MlpAndMoe,
    Moe,
)

# Spec -> what it declares, what it computes. A new mixer or branch is its file, and a row here.
MIXERS = {
    Attention: (attention.params, attention.attention),
    DeltaNet: (delta_net.params, delta_net.delta_net),
    Mamba2: (mamba.params, mamba.mamba),
}
BRANCHES = {
    Mlp: (mlp.params, mlp.mlp),
    Moe: (moe.params, moe.moe),
    MlpAndMoe: (moe.side_by_side_params, moe.mlp_and_moe),
    GatedInput: (gated_input.params, gated_input.gated_input),
}


def params(spec: LayerSpec, arch: Architecture) -> list[Param]:
    """Every leaf of a layer."""
    D, stream = arch.width, (("embed", arch.width),)
    found = [*MIXERS[type(spec.mixer)][0](spec.mixer, D)]
    for _, branch in spec.branches:
        found += BRANCHES[type(branch)][0](branch, D)
    if spec.pre_norm:
        file = "input_layernorm.weight"
        found.append(Param("attn_norm", stream, READS, file, gguf="attn_norm.weight"))
        file = "post_attention_layernorm.weight"
        found.append(Param("mlp_norm", stream, READS, file, gguf="ffn_norm.weight"))
    if spec.post_norm:
        file, gguf = "post_attention_layernorm.weight", "post_attention_norm.weight"
        found.append(Param("attn_post_norm", stream, POST_NORM, file, gguf=gguf))
        file, gguf = "post_feedforward_layernorm.weight", "post_ffw_norm.weight"
        found.append(Param("mlp_post_norm", stream, POST_NORM, file, gguf=gguf))
    if spec.scale:
        found.append(Param("scale", (("scalar", 1),), INSIDE, "layer_scalar"))
    return found


def block(
    p: Weights,
    spec: LayerSpec,
    x: jax.Array,  # [B, T, D]
    ctx: Context,
    site: Site,
    memory: Memory,
) -> tuple[jax.Array, Memory]:  # [B, Q, D]
    """The residual arithmetic, written once. `site(name, x)` captures and edits the stream.

    A number that the stream is multiplied by at the end of a layer keeps directions, so that an
    ablation stays one; what was added at layer l is scaled by all layers from l on.
    """
    mixer = MIXERS[type(spec.mixer)][1]

    def written(x: jax.Array) -> jax.Array:
        return x if spec.write_scale == 1.0 else times(x, spec.write_scale)

    x = site("resid_pre", x)
    out, memory = mixer(p, spec.mixer, ctx.normed(p, "attn_norm", x), ctx, site, memory)
    x = ctx.last(x) + site("attn_out", written(ctx.normed(p, "attn_post_norm", out)))
    for name, branch in spec.branches:
        x = x + site(name, written(BRANCHES[type(branch)][1](p, branch, x, ctx, site)))
    return (x * p["scale"][None, None] if spec.scale else x), memory
