"""Model families, one file each (or close kin together). A file registers what it holds; adding one
is writing it and naming it here."""

from jax_refusal.families import (
    exaone,
    gemma,
    gemma4,
    gpt_oss,
    granite,
    llama,
    mistral,
    olmo,
    phi,
    qwen,
    qwen1,
    qwen3_next,
    refused,
    seed_oss,
    smollm3,
)

__all__ = [
    "exaone",
    "gemma",
    "gemma4",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "phi",
    "qwen",
    "qwen1",
    "qwen3_next",
    "refused",
    "seed_oss",
    "smollm3",
]
