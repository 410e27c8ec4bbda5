"""One decoder block: the residual arithmetic, attention and MLP.

Letters: B batch row, T token, Q token that is asked for, C context slot, D residual width, L
layers, H query heads, G key/value heads, K head width, W width of a layer's own input.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jax_refusal.models import experts, gemma4, kinds, layers
from jax_refusal.models.architecture import Architecture
from jax_refusal.sharding import constrain


class Block(nnx.Module):
    """One decoder block; in a model every leaf is stacked on L."""

    q: nnx.Param
    k: nnx.Param
    v: nnx.Param
    o: nnx.Param
    gate: nnx.Param  # one MLP, or experts behind a router
    up: nnx.Param
    down: nnx.Param
    router: nnx.Param
    expert_gate: nnx.Param
    expert_up: nnx.Param
    expert_down: nnx.Param
    attn_norm: nnx.Param  # norms and biases where the family has them
    mlp_norm: nnx.Param
    attn_post_norm: nnx.Param
    mlp_post_norm: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param
    o_bias: nnx.Param
    gate_bias: nnx.Param
    up_bias: nnx.Param
    down_bias: nnx.Param
    router_bias: nnx.Param
    expert_gate_bias: nnx.Param
    expert_up_bias: nnx.Param
    expert_down_bias: nnx.Param
    sinks: nnx.Param
    router_scale: nnx.Param  # an MLP beside the experts, and norms of each
    expert_scale: nnx.Param
    expert_norm: nnx.Param
    expert_post_norm: nnx.Param
    dense_post_norm: nnx.Param
    per_layer_gate: nnx.Param
    per_layer_out: nnx.Param
    per_layer_post_norm: nnx.Param
    scale: nnx.Param
    stacks: kinds.Stacks  # of this layer, in an unrolled model whose layers differ in shape

    def __init__(self, arch: Architecture, leaves: Mapping[str, Any], few_rows: bool = False):
        self.arch = arch
        self.few_rows = few_rows  # of what it is run on: see `layers.linear`
        for name, value in leaves.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        at: Callable[[str, jax.Array], jax.Array],
        attention: Callable[[jax.Array], jax.Array],
        mlp: Callable[[jax.Array], jax.Array],
        own: jax.Array | None = None,  # [B, T, W] of `per_layer_inputs`
        pick: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        """The residual arithmetic, written once. `at(site, x)` reads and edits the stream.

        `pick` takes the tokens, [B, T, ...] -> [B, Q, ...], whose stream is returned; attention
        returns what it found for these, and reads all.

        A gated input of the layer's own is one more write (see `gemma4`), and one more site.
        """
        pre, post = self.arch.pre_norm, self.arch.post_norm
        x = at("resid_pre", x)
        out = attention(self.normed(x, self.attn_norm) if pre else x)
        x = pick(x) + at("attn_out", self.normed(out, self.attn_post_norm) if post else out)
        out = mlp(self.normed(x, self.mlp_norm) if pre else x)
        if self.arch.expert_width:
            out = gemma4.with_experts(self, out, x)
        x = x + at("mlp_out", self.normed(out, self.mlp_post_norm) if post else out)
        if own is not None:
            x = x + at("per_layer_out", gemma4.gated_input(self, x, pick(own)))
        return x * self.scale[None, None] if self.arch.layer_scale else x

    def normed(self, x: jax.Array, scale: nnx.Param | jax.Array) -> jax.Array:
        return layers.rms_norm(x, scale[...], self.arch.norm_epsilon, self.arch.norm)

    def attention(
        self,
        x: jax.Array,  # [B, T, D]
        angles: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        pick: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:  # [B, Q, D]
        with jax.named_scope("attention"):
            q = self.linear(pick(x), self.q)
            k, v = self.linear(x, self.k), self.linear(x, self.v)
            if self.arch.qkv_bias:
                q, k = q + self.q_bias[None, None], k + self.k_bias[None, None]
                v = v + self.v_bias[None, None]
            if self.arch.qk_norm:
                q, k = self.normed(q, self.q_norm), self.normed(k, self.k_norm)
            q = constrain(q, "batch", None, "heads", "head_width")
            k, v = layers.rotate(k, angles).transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            mixed = attend(layers.rotate(q, jax.tree.map(pick, angles)), k, v)
            out = self.linear(mixed, self.o, inputs=2)
            return out + self.o_bias[None, None] if self.arch.out_bias else out

    def mlp(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        with jax.named_scope("mlp"):
            activation = layers.ACTIVATIONS[self.arch.activation]
            if self.arch.experts and not self.arch.expert_width:
                count, add_up = self.arch.experts_per_token, self.arch.shares_add_up
                router_bias = biases = None
                if self.arch.expert_bias:
                    router_bias, down_bias = self.router_bias[...], self.expert_down_bias[...]
                    biases = (self.expert_gate_bias[...], self.expert_up_bias[...], down_bias)
                chosen = experts.route(x, self.router[...], count, add_up, router_bias)
                kernels = (self.expert_gate[...], self.expert_up[...], self.expert_down[...])
                limit = self.arch.swiglu_limit
                return experts.routed_mlp(x, *chosen, *kernels, activation, biases, limit)
            gate, up = self.linear(x, self.gate), self.linear(x, self.up)
            if self.arch.mlp_bias:
                gate, up = gate + self.gate_bias[None, None], up + self.up_bias[None, None]
            out = self.linear(activation(gate) * up, self.down)
            return out + self.down_bias[None, None] if self.arch.mlp_bias else out

    def linear(self, x: jax.Array, kernel: nnx.Param, inputs: int = 1) -> jax.Array:
        return layers.linear(x, kernel[...], inputs, self.few_rows)
