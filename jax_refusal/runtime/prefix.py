"""The tokens that all prompts share, run once: their keys and values, for every row to read.

Letters: R edit rows (1, or one for every batch row), N prefix tokens.
"""

import jax

from jax_refusal.edits import Edit
from jax_refusal.models import cache
from jax_refusal.models.cache import Cache, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts, place, prefix_tokens
from jax_refusal.sharding import mesh_of


@jax.jit
def prefix_cache(model: Transformer, tokens: Tokens, edit: Edit) -> Cache:
    """Keys and values of the shared prefix, one row for each edit; tokens [R, N]."""
    rows, slots = tokens.ids.shape
    filled = model(tokens, edit, cache=cache.empty(model.arch, rows, slots, model.dtype)).cache
    assert filled is not None
    return filled


def shared_prefix(model: Transformer, prompts: Prompts, edit: Edit, rows: int = 1) -> Cache | None:
    """The prefix of these prompts under an edit of `rows` rows; None where nothing is shared."""
    if not prompts.prefix:
        return None
    return prefix_cache(model, place(prefix_tokens(prompts, rows), mesh_of(model)), edit)
