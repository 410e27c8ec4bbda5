"""The library for a notebook: the stages as functions of a model and a chat, without configs.

Letters: B batch row, T token, V vocabulary, P post-instruction tokens, L layers, D residual width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_refusal.config import (
    BATCH_TOKENS,
    DISCOVERY_TOKENS,
    ComputeConfig,
    GenerateConfig,
    SelectionConfig,
)
from jax_refusal.data.chat import Chat
from jax_refusal.data.prompts import KINDS, SPLITS, builtin
from jax_refusal.edits import Edit, identity
from jax_refusal.fields import check_fields
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime import captures, collect
from jax_refusal.runtime import generate as generation
from jax_refusal.runtime.batching import Prompts
from jax_refusal.sharding import mesh_of
from jax_refusal.study import selection, sweep
from jax_refusal.study.refusal_tokens import discover
from jax_refusal.study.scores import TokenError

SLOTS = ("post_instruction", "last", "all")


@jax.jit
def _logits(model: Transformer, tokens: Tokens, edit: Edit) -> jax.Array:
    return model.unembed(model(tokens, edit).x)


def logits(
    model: Transformer,
    tokens: jax.Array | np.ndarray,  # [B, T] token ids
    mask: jax.Array | np.ndarray | None = None,  # [B, T] true at real tokens; padding on any side
    edit: Edit | None = None,
    *,
    marked: jax.Array | np.ndarray | None = None,  # [B, T] tokens for `only(edit, "marked")`
) -> jax.Array:  # [B, T, V] float32
    """Next-token logits at every position; those at padding mean nothing.

    Where `marked` is given, all tokens are of the prompt for an edit that asks (see `only`).

    Raises ValueError for a row that is longer than the model's context.
    """
    ids = jax.numpy.asarray(tokens, jax.numpy.int32)
    longest = ids.shape[1] if mask is None else int(np.asarray(mask, bool).sum(-1).max())
    if longest > model.arch.context:
        raise ValueError(
            f"A row of {longest} tokens exceeds the model's context of {model.arch.context} tokens."
        )
    with jax.set_mesh(mesh_of(model)):
        return _logits(model, Tokens.padded(ids, mask, marked), _or_identity(edit, model))


def mean_activations(
    model: Transformer,
    chat: Chat,
    instructions: Sequence[str],
    *,
    edit: Edit | None = None,  # one row
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:  # [P, L, D] float64
    """Mean residual stream entering each block, at each post-instruction token (paper eq. 1)."""
    check_fields(ComputeConfig, batch_tokens=batch_tokens)
    prompts = Prompts.encoded(chat, instructions, model.arch)
    means, _ = collect.mean_activations(
        model, prompts, _or_identity(edit, model), batch_tokens=batch_tokens
    )
    return means


def builtin_instructions(kind: str, split: str = "train") -> list[str]:
    """The instructions that ship: kind "harmful" or "harmless", split "train", "val" or "test"."""
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(
            f"kind={kind!r}, split={split!r}: allowed are {list(KINDS)} and {list(SPLITS)}."
        )
    return [instruction.text for instruction in builtin(kind)[split]]


def capture(
    model: Transformer,
    chat: Chat,
    instructions: Sequence[str],
    sites: Sequence[str] = ("resid_pre",),
    *,
    slots: str = "post_instruction",  # or "last", or "all" tokens of a prompt
    reduce: str = "none",  # or "mean", "outer", "project"
    directions: np.ndarray | None = None,  # [M, D] of what is captured, for "project"
    edit: Edit | None = None,  # one row
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """What arrives at sites of every layer, before its edit; reduced while the model runs.

    sites: of the residual stream "resid_pre", "attn_out", "mlp_out", "per_layer_out"; inside of
    layers "z" (what heads found, before the output projection), "pattern" (attention), "keys",
    "values", "hidden" (of the MLP); see `jax_refusal.sites`.
    Returns site -> array: "none" [prompts, P, L, ...], "mean" over prompts [P, L, ...], "outer"
    means of outer products [P, L, ..., D, D], "project" coordinates [prompts, P, L, ..., M], with
    P the slots of a prompt; see `runtime.captures.capture` for prompts and layers that differ.
    """
    check_fields(ComputeConfig, batch_tokens=batch_tokens)
    prompts = Prompts.encoded(chat, instructions, model.arch)
    if slots not in SLOTS:
        raise ValueError(f"slots={slots!r}; allowed are {list(SLOTS)}.")
    if slots == "last":
        prompts = dataclasses.replace(prompts, positions=1)
    if slots == "all":
        prompts = dataclasses.replace(prompts, prefix=0)
    return captures.capture(
        model,
        prompts,
        _or_identity(edit, model),
        sites,
        every_token=slots == "all",
        reduce=reduce,
        directions=directions,
        batch_tokens=batch_tokens,
    )


def select(
    model: Transformer,
    chat: Chat,
    directions: np.ndarray,  # [P, L, D] from `difference`
    harmful: Sequence[str],  # validation instructions
    harmless: Sequence[str],
    refusal_ids: Sequence[int] | None = None,  # first tokens of a refusal; None: as it refuses
    *,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune_layers: float = 0.2,
    full_grid: bool = False,
    fallback: str = "error",
    batch_tokens: int = BATCH_TOKENS,
) -> selection.Selection:
    """The paper's choice among all candidates: `.position .layer .direction .table`.

    Refusal tokens are found from the model's replies to these instructions unless they are given.
    Raises SelectionError where none passes and fallback is not "least_bad", TokenError where no
    reply is a refusal and no tokens are given, ConfigError for values that are not allowed.
    """
    check_fields(ComputeConfig, batch_tokens=batch_tokens)
    check_fields(
        SelectionConfig,
        kl_threshold=kl_threshold,
        induce_threshold=induce_threshold,
        prune_layers=prune_layers,
        full_grid=full_grid,
        fallback=fallback,
    )
    if refusal_ids is None:
        texts = {"harmful": list(harmful), "harmless": list(harmless)}
        found = discover(model, chat, texts, max_new_tokens=DISCOVERY_TOKENS)
        if not found:
            raise TokenError(
                f"None of {len(texts['harmful'])} replies to harmful instructions is a refusal, so "
                "that no refusal token can be found. Name them in refusal_ids."
            )
        refusal_ids = [token.token_id for token in found]
    scorer = sweep.Sweep(
        model,
        directions,
        Prompts.encoded(chat, harmful, model.arch),
        Prompts.encoded(chat, harmless, model.arch),
        refusal_ids,
        batch_tokens=batch_tokens,
    )
    rule = selection.Rule(model.arch.layers, kl_threshold, induce_threshold, prune_layers)
    return selection.select(directions, scorer, rule, full_grid=full_grid, fallback=fallback)


def generate(
    model: Transformer,
    chat: Chat,
    instructions: Sequence[str],
    edit: Edit | None = None,  # one row, one for every instruction, or as row_edit says
    max_new_tokens: int = 64,
    *,
    row_edit: Sequence[int] | None = None,  # which of the edit's rows each instruction is run with
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """A reply to each instruction; greedy unless temperature > 0.

    Rows whose replies have ended take in the instructions that wait: all conditions of an
    experiment may be one call, with their edits in `rows` and `row_edit` saying which is whose.
    Raises ConfigError for numbers that are not allowed.
    """
    check_fields(
        GenerateConfig,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    replies = generation.generate(
        model,
        Prompts.encoded(chat, instructions, model.arch),
        _or_identity(edit, model),
        stop_ids=chat.stop_ids,
        max_new_tokens=max_new_tokens,
        row_edit=row_edit,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    return [chat.decode(ids) for ids in replies]


def _or_identity(edit: Edit | None, model: Transformer) -> Edit:
    return identity(model.arch.layers, model.arch.width) if edit is None else edit
