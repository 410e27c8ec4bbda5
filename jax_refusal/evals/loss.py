"""Cross-entropy of given replies: what an edit costs where it should cost nothing (paper, 4.3).

Letters: B packed rows, Q reply tokens of a row.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jax_refusal.edits import Edit
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts, fit_rows, place, prefix_tokens
from jax_refusal.runtime.pairs import cross_entropy, pack_pairs, reply_logits
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of, to_host


@jax.jit
def _cross_entropy(model, edit, prefix, batch):  # -> [B, Q] nats
    return cross_entropy(reply_logits(model, edit, prefix, batch), batch)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean nats per reply token over all replies, and each reply's sum and length."""

    nats: float
    sums: np.ndarray  # nats of each reply
    tokens: np.ndarray  # number of tokens of each reply


def reply_loss(
    model: Transformer,
    prompts: Prompts,
    replies: Sequence[Sequence[int]],  # token ids, one reply for each prompt, none empty
    edit: Edit,  # one row
    *,
    row_tokens: int = 64,
    rows: int = 4,
    progress: Progress = silent,
    title: str = "loss",
) -> Loss:
    """Cross-entropy of the replies under the model with an edit, prompt tokens not counted."""
    if len(replies) != len(prompts.ids) or not all(len(reply) for reply in replies):
        raise ValueError(
            f"{len(prompts.ids)} prompts need as many replies, none empty; given {len(replies)}."
        )
    longest = max(len(ids) + len(reply) for ids, reply in zip(prompts.ids, replies, strict=True))
    prompts = prompts.for_rows_of(longest, model.arch)
    pairs = [
        (ids[prompts.prefix :], reply) for ids, reply in zip(prompts.ids, replies, strict=True)
    ]
    lengths = [len(prompt) + len(reply) for prompt, reply in pairs]
    if longest > model.arch.context:
        raise ValueError(
            f"A prompt and its reply have {longest} tokens and the model's context "
            f"{model.arch.context}. Shorten the reply."
        )
    packed, length = fit_rows(lengths, row_tokens)
    mesh = mesh_of(model)
    rows = -(-min(rows, len(packed)) // mesh.shape["data"]) * mesh.shape["data"]
    sums, tokens = np.zeros(len(replies)), np.array([len(reply) for reply in replies])
    with jax.set_mesh(mesh):
        prefix = place(prefix_tokens(prompts, 1), mesh) if prompts.prefix else None
        for start in progress(range(0, len(packed), rows), title):
            members = packed[start : start + rows]
            members += [[] for _ in range(rows - len(members))]
            batch = pack_pairs([[pairs[i] for i in row] for row in members], prompts, length)
            nats = to_host(_cross_entropy(model, edit, prefix, batch)).astype(np.float64)
            for r, row in enumerate(members):
                for number, i in enumerate(row):
                    sums[i] = nats[r, batch.pair[r] == number].sum()
    return Loss(float(sums.sum() / tokens.sum()), sums, tokens)
