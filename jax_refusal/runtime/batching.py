"""Prompts into arrays of few shapes: packed rows for scoring, left-padded rows for generation.

Letters: B batch row, T token, X prompts in a row, P post-instruction tokens, N prefix tokens. All
prompts of a chat template begin with the same N tokens (system turn, header): they are computed
once and left out of the rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.data.chat import Chat, ChatError, common_prefix
from jax_refusal.edits import INSTRUCTION, POST_INSTRUCTION
from jax_refusal.models.cache import PADDING, SHARED, Tokens
from jax_refusal.models.spec import Architecture

# Row lengths that are tried are multiples of ROW_STEP tokens, and no more than about TRIALS.
ROW_STEP, TRIALS = 4, 16


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Encoded prompts, with what they share."""

    ids: list[list[int]]
    prefix: int  # N, leading tokens that all of them share; every prompt is longer
    positions: int = 1  # P, post-instruction tokens at the end of each: those that are read

    @classmethod
    def encoded(
        cls, chat: Chat, instructions: Sequence[str], arch: Architecture | None = None
    ) -> "Prompts":
        """Raises ChatError for a prompt that cannot be used, or (with arch) not by this model."""
        ids = chat.encode(instructions)
        if arch is not None:
            _check_fit(ids, arch)
        # The template's own share, not these prompts': the same N in every job compiles once.
        prefix = common_prefix([*chat.encode(("A", "Why?", "7")), *ids])
        positions = len(chat.post_instruction)
        suffix = list(chat.post_instruction)
        for instruction, prompt in zip(instructions, ids, strict=True):
            if prompt[-positions:] != suffix:
                raise ChatError(
                    f"The prompt of {instruction[:40]!r} does not end in the template's tokens "
                    f"{suffix}; its text runs into the template."
                )
        prompts = cls(ids, min(prefix, min(map(len, ids)) - positions), positions)
        return prompts if arch is None else prompts.for_rows_of(max(map(len, ids)), arch)

    def for_rows_of(self, tokens: int, arch: Architecture) -> "Prompts":
        """The same, sharing nothing where a row of so many tokens changes how it starts."""
        return dataclasses.replace(self, prefix=0) if tokens > arch.prefix_reusable_until else self


def _check_fit(prompts: Sequence[Sequence[int]], arch: Architecture) -> None:
    largest, longest = max(map(max, prompts)), max(map(len, prompts))
    if largest >= arch.vocab:
        raise ChatError(
            f"The tokenizer gives token {largest} and the model has {arch.vocab} tokens: they do "
            "not belong together. Use the tokenizer that came with the weights."
        )
    if longest > arch.context:
        raise ChatError(
            f"A prompt has {longest} tokens and the model's context {arch.context}. Shorten it."
        )


@dataclasses.dataclass(frozen=True)
class Packed:
    """One batch of packed rows; `prompt[b, x]` says which prompt lies there, -1 none."""

    tokens: Tokens  # [B, T]
    slots: np.ndarray  # [B, X, P] int32, the slots of a prompt's last P tokens
    prompt: np.ndarray  # [B, X] int32

    @property
    def valid(self) -> np.ndarray:  # [B, X] bool
        return self.prompt >= 0


def prefix_tokens(prompts: Prompts, rows: int) -> Tokens:
    """The shared tokens, for `rows` edits at once: [rows, N]."""
    ids = np.array(prompts.ids[0][: prompts.prefix], np.int32)
    return host_tokens(
        ids=np.tile(ids, (rows, 1)),
        positions=np.tile(np.arange(len(ids), dtype=np.int32), (rows, 1)),
        segments=np.full((rows, len(ids)), SHARED, np.int32),
        kinds=np.full((rows, len(ids)), INSTRUCTION, np.int32),
    )


def pack(
    prompts: Prompts,
    *,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    multiple: int = 1,
) -> list[Packed]:
    """Packs prompts (without their shared prefix) into rows of one length, batches of one shape.

    row_tokens: most tokens of a row, unless a prompt is longer.
    multiple: parts of the mesh's data axis; each gets as many rows, of batch_tokens at most.
    """
    parts = [ids[prompts.prefix :] for ids in prompts.ids]
    bins, length = fit_rows([len(part) for part in parts], row_tokens)
    per_batch = max(1, batch_tokens // length) * multiple
    per_batch = min(per_batch, -(-len(bins) // multiple) * multiple)
    # Batches of one shape, the last as full as the others.
    count = -(-len(bins) // per_batch)
    per_batch = -(-len(bins) // count // multiple) * multiple
    most = max(map(len, bins))
    batches = []
    for start in range(0, len(bins), per_batch):
        shape = (per_batch, length)
        ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segments = np.full(shape, PADDING, np.int32)
        kinds = np.full(shape, INSTRUCTION, np.int32)
        slots = np.zeros((per_batch, most, prompts.positions), np.int32)
        prompt = np.full((per_batch, most), -1, np.int32)
        for row, members in enumerate(bins[start : start + per_batch]):
            end = 0
            for x, index in enumerate(members):
                part = parts[index]
                here = slice(end, end := end + len(part))
                ids[row, here] = part
                positions[row, here] = np.arange(len(part)) + prompts.prefix
                segments[row, here] = x + 1
                slots[row, x] = np.arange(end - prompts.positions, end)
                kinds[row, slots[row, x]] = POST_INSTRUCTION
                prompt[row, x] = index
        tokens = host_tokens(ids, positions, segments, kinds)
        batches.append(Packed(tokens, slots, prompt))
    return batches


def left_padded(
    parts: Sequence[Sequence[int]],  # prompts without their shared prefix
    prompts: Prompts,
    length: int,
) -> Tokens:
    """One prompt a row, ending in the last slot: [B, length]; positions count from the prefix."""
    shape = (len(parts), length)
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments = np.full(shape, PADDING, np.int32)
    for row, part in enumerate(parts):
        here = slice(length - len(part), length)
        ids[row, here] = part
        positions[row, here] = np.arange(len(part)) + prompts.prefix
        segments[row, here] = 1
    kinds = np.full(shape, INSTRUCTION, np.int32)
    kinds[:, length - prompts.positions :] = POST_INSTRUCTION
    return host_tokens(ids, positions, segments, kinds)


def pools(lengths: Sequence[int], least: int = 64) -> list[np.ndarray]:
    """Indices of prompts, longest first, in groups that fit slots of one number: up to `least`
    tokens, up to twice as many, and so on."""
    order = np.argsort([-length for length in lengths], kind="stable")
    doublings = np.array([max(0, (lengths[i] - 1) // least).bit_length() for i in order])
    return [order[doublings == d] for d in sorted(set(doublings.tolist()), reverse=True)]


def bucket(size: int, least: int = 16) -> int:
    """The next of a few sizes (16, 24, 32, 48, 64, 96, ...), so that few shapes are compiled."""
    power = least
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def place(tokens: Tokens, mesh: Mesh) -> Tokens:
    """Rows shared out over the mesh's data axis."""
    return jax.tree.map(lambda x: sharding.place(x, mesh, "batch", None), tokens)


def host_tokens(ids: Any, positions: Any, segments: Any, kinds: Any) -> Tokens:
    """Numpy arrays as Tokens: `place` puts them on a mesh before they are used."""
    return Tokens(ids=ids, positions=positions, segments=segments, kinds=kinds)


def fit_rows(lengths: Sequence[int], row_tokens: int) -> tuple[list[list[int]], int]:
    """Which items share a row, and the row length: of some lengths up to row_tokens (or the longest
    item) the one at which rows have the fewest slots in all, the shorter one of two."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least = -(-lengths[order[0]] // ROW_STEP) * ROW_STEP
    step = max(ROW_STEP, (row_tokens - least) // TRIALS // ROW_STEP * ROW_STEP)
    tried = range(least, max(least, row_tokens) + 1, step)
    found = ((_best_fit(lengths, order, length), length) for length in tried)
    return min(found, key=lambda fit: (len(fit[0]) * fit[1], fit[1]))


def _best_fit(
    lengths: Sequence[int],
    order: Sequence[int],  # items, longest first
    capacity: int,
) -> list[list[int]]:
    """Best-fit decreasing: item indices of each bin."""
    bins: list[list[int]] = []
    with_spare: list[list[int]] = [[] for _ in range(capacity + 1)]  # which bins have how much left
    for item in order:
        length = lengths[item]
        spare = next((left for left in range(length, capacity) if with_spare[left]), capacity)
        if spare == capacity:
            with_spare[capacity].append(len(bins))
            bins.append([])
        bin = with_spare[spare].pop()
        bins[bin].append(item)
        with_spare[spare - length].append(bin)
    return bins
