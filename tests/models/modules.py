"""One layer of a model by itself, for tests that feed it what another library's was fed with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import jax_refusal as jr
from jax_refusal.models import block
from jax_refusal.models.cache import Memory, Tokens
from jax_refusal.models.context import Context, Pass, Site, Weights
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import LayerSpec, place
from jax_refusal.sites import NOTHING


class Layer(NamedTuple):
    p: Weights
    spec: LayerSpec
    ctx: Context
    site: Site

    def mixer(self, x: jax.Array) -> jax.Array:
        """What the mixer makes of x [B, T, D], which its norm has passed."""
        memory = Memory(entry={}, index=None, past={}, start=jnp.int32(0))
        mix = block.MIXERS[type(self.spec.mixer)][1]
        return mix(self.p, self.spec.mixer, x, self.ctx, self.site, memory)[0]

    def branch(self, x: jax.Array, number: int = 0, norms: bool = False) -> jax.Array:
        """What a branch makes of x [B, T, D]; without its own norms unless asked."""
        _, spec = self.spec.branches[number]
        run = block.BRANCHES[type(spec)][1]
        own = self.p if norms else {n: w for n, w in self.p.items() if not n.startswith("mlp_")}
        return run(own, spec, x, self.ctx, self.site)


def every(x: jax.Array) -> jax.Array:
    return x


def one_layer(model: Transformer, number: int, tokens: Tokens) -> Layer:
    """A layer of the model as it is run in a pass over whole rows of tokens."""
    arch, edit = model.arch, jr.identity(model.arch.layers, model.arch.width)
    slot, index = place(arch, number)
    own = jax.tree.map(lambda a: a[index], model.layer_data(tokens, edit)[slot])
    shared = Pass.of(arch, tokens, None, None, few_rows=False)
    ctx = Context(shared=shared, fields=own.fields, inputs=own.inputs, last=every)
    site = Site(edit=edit, layer=own.edit, capture=NOTHING, kinds=None, last=every)
    return Layer(own.weights, arch.specs[number], ctx, site)


def blank(batch: int, length: int) -> Tokens:
    return Tokens.padded(jnp.zeros((batch, length), jnp.int32))
