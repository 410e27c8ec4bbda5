"""Refusal directions of chat models, in pure JAX (Arditi et al. 2024).

The study in a notebook:

    import jax_refusal as jr
    model, chat = jr.load_model(source), jr.load_chat(source)
    harmful = jr.mean_activations(model, chat, harmful_instructions)
    harmless = jr.mean_activations(model, chat, harmless_instructions)
    directions = jr.difference(harmful, harmless)
    chosen = jr.select(model, chat, directions, harmful_val, harmless_val, refusal_ids)
    edit = jr.ablate(chosen.direction, model.arch.layers)
    jr.generate(model, chat, instructions, edit)
"""

from jax_refusal.api import (
    builtin_instructions,
    capture,
    generate,
    logits,
    mean_activations,
    select,
)
from jax_refusal.checkpoints.loading import load_model
from jax_refusal.checkpoints.sources import SMOLLM2
from jax_refusal.data.chat import load_chat
from jax_refusal.edits import (
    Affine,
    Chain,
    Transform,
    ablate,
    add,
    affine,
    chain,
    identity,
    only,
    repeat,
    rows,
)
from jax_refusal.sharding import make_mesh
from jax_refusal.study.directions import cosine, difference, read_direction
from jax_refusal.study.orthogonalize import bake_addition, orthogonalize

__all__ = [
    "SMOLLM2",
    "Affine",
    "Chain",
    "Transform",
    "ablate",
    "add",
    "affine",
    "bake_addition",
    "builtin_instructions",
    "capture",
    "chain",
    "cosine",
    "difference",
    "generate",
    "identity",
    "load_chat",
    "load_model",
    "logits",
    "make_mesh",
    "mean_activations",
    "only",
    "orthogonalize",
    "read_direction",
    "repeat",
    "rows",
    "select",
]
