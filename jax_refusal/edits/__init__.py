"""Edits of the residual stream, as data: what they are, how they are built and combined."""

from jax_refusal.edits.build import (
    ablate,
    ablations,
    add,
    additions,
    affine,
    identity,
    unit_vector,
)
from jax_refusal.edits.combine import chain, num_rows, only, repeat, rows, take
from jax_refusal.edits.forms import (
    INSTRUCTION,
    KINDS,
    MARKED,
    POST_INSTRUCTION,
    REPLY,
    SITES,
    Affine,
    Chain,
    Edit,
    Transform,
    apply,
)

__all__ = [
    "INSTRUCTION",
    "KINDS",
    "MARKED",
    "POST_INSTRUCTION",
    "REPLY",
    "SITES",
    "Affine",
    "Chain",
    "Edit",
    "Transform",
    "ablate",
    "ablations",
    "add",
    "additions",
    "affine",
    "apply",
    "chain",
    "identity",
    "num_rows",
    "only",
    "repeat",
    "rows",
    "take",
    "unit_vector",
]
