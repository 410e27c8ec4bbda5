"""What the tests of edits share: sizes of the tiny model, and edits at a site and in the model.

Letters: B batch row, T token, D residual width, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_refusal as jr
from jax_refusal import edits
from jax_refusal.edits import INSTRUCTION, POST_INSTRUCTION, REPLY, Affine, Edit
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Output, Transformer
from jax_refusal.sites import Capture

L, D = 4, 64  # of the tiny model
B, T = 3, 12
SITES = edits.SITES[:3]  # of a Llama
ARRIVALS = [(layer, site) for layer in range(L) for site in SITES]  # in the order of the stream
# Of the tokens of each row, as a template of one head and a reply of some would have them.
KINDS = np.repeat([INSTRUCTION, POST_INSTRUCTION, REPLY], [6, 2, 4])[None].repeat(B, 0)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def at(edit: Edit, layer: int, site: str, x: jax.Array, kinds: Any = None) -> jax.Array:
    """The edit at one layer and site, outside of a model."""
    return edits.apply(edit, x, kinds, num_layers=L, layer=layer, site=site)


@jax.jit
def run(model: Transformer, ids: jax.Array, edit: Edit, kinds: Any = KINDS) -> Output:
    """The stream, and what arrives at every site before its edit."""
    everywhere, all_real = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape), ids >= 0
    tokens = Tokens(
        ids=ids,
        positions=everywhere,
        segments=all_real.astype(jnp.int32),
        kinds=jnp.asarray(kinds)[: len(ids)],
    )
    return model(tokens, edit, capture=Capture(sites=SITES))


def three_edits() -> list[Affine]:
    """Nothing, an ablation, an addition."""
    addition = jr.add(3 * random(D, seed=2), L, layer=1, coefficient=-1.0)
    return [jr.identity(L, D), jr.ablate(random(D, seed=1), L), addition]


def assert_same(one: Any, other: Any) -> None:
    """Pytrees of equal arrays."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


# The user's own edits, as functions of the stream.


def ablate_by_hand(params: jax.Array, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
    unit = params / jnp.linalg.norm(params)
    return x - jnp.einsum("btd,d->bt", x, unit)[..., None] * unit[None, None]


def add_by_hand(params: dict, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
    here = (layer == params["layer"]) & (site == "resid_pre")
    return jnp.where(here, x + params["vector"][None, None], x)


def ablation_by_hand() -> jr.Transform:
    """The second of `three_edits`."""
    return jr.Transform(function=ablate_by_hand, params=jnp.asarray(random(D, seed=1)))


def addition_by_hand() -> jr.Transform:
    """The third of `three_edits`."""
    params = {"layer": jnp.int32(1), "vector": jnp.asarray(-3 * random(D, seed=2))}
    return jr.Transform(function=add_by_hand, params=params)
