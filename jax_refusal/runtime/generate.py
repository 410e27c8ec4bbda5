"""Replies: one prefill and a while_loop of single-token steps, with a different edit on every row.

Letters: B batch row, T token, N prefix tokens, V vocabulary, R edit rows (1 or B).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import interventions, sharding
from jax_refusal.interventions import Intervention
from jax_refusal.models import cache as caches
from jax_refusal.models.block import Block
from jax_refusal.models.cache import Cache, Tokens
from jax_refusal.models.families import Architecture
from jax_refusal.models.transformer import Transformer
from jax_refusal.runtime.batching import Prompts, bucket, by_length, left_padded, place
from jax_refusal.runtime.collect import Progress, mesh_of, shared_prefix, silent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; arrays, so that changing them compiles nothing.

    A row's noise depends on the seed, its own number and the step alone: not on the batch it is in.
    """

    temperature: jax.Array  # 0 is greedy
    key: jax.Array
    row: jax.Array  # [B] the prompt's number in its job

    def choose(self, logits: jax.Array, step: jax.Array) -> jax.Array:  # [B, V] -> [B] int32
        def sample() -> jax.Array:
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(self.key, row), step))
            return jax.vmap(jax.random.categorical)(keys(self.row), logits / self.temperature)

        greedy = partial(jnp.argmax, logits, -1)
        return jax.lax.cond(self.temperature > 0, sample, greedy).astype(jnp.int32)


# Once for all batches of a job: single layers are a copy of the weights.
_unrolled = jax.jit(Transformer.unrolled)


@partial(jax.jit, static_argnames=("room",))
def _generate(
    model: Transformer,
    blocks: tuple[Block, ...] | None,  # steps run over these single layers instead of a scan
    tokens: Tokens,  # [B, T], left-padded
    edit: Intervention,
    prefix: Cache | None,  # R or 1 rows of N tokens
    stop_ids: jax.Array,
    sampling: Sampling,
    limit: jax.Array,  # int32, new tokens at most
    finished: jax.Array,  # [B] rows that only fill up the batch
    *,
    room: int,  # slots for new tokens, at least `limit`
) -> tuple[jax.Array, jax.Array]:  # ids [B, room], lengths [B] (stop token included)
    rows, slots = tokens.ids.shape
    if prefix is None:
        cache = caches.empty(model.arch, rows, slots + room, model.dtype)
    else:
        cache = prefix.repeat(rows // prefix.positions.shape[0]).grow(slots + room)
    out = model(tokens, edit, cache=cache)
    assert out.cache is not None
    cache = out.cache if blocks is None else out.cache.unrolled()
    first = sampling.choose(model.unembed(out.x[:, -1:])[:, 0], jnp.int32(0))

    def running(state):
        step, _, _, finished, _, _ = state
        return (step < limit) & ~jnp.all(finished)

    def advance(state):
        step, token, position, finished, ids, cache = state
        # Position of the new token in its own row: the last prompt token's, plus one and the step.
        one = Tokens(
            ids=token[:, None],
            positions=(position + step)[:, None],
            segments=jnp.ones((rows, 1), jnp.int32),
            lengths=position[:, None],
        )
        ids = jax.lax.dynamic_update_slice(ids, jnp.where(finished, -1, token)[:, None], (0, step))
        finished = finished | jnp.isin(token, stop_ids)
        out = model(one, edit, cache=cache, blocks=blocks)
        token = sampling.choose(model.unembed(out.x)[:, 0], step + 1)
        return step + 1, token, position, finished, ids, out.cache

    ids = jnp.full((rows, room), -1, jnp.int32)
    state = (jnp.int32(0), first, tokens.positions[:, -1] + 1, finished, ids, cache)
    ids = jax.lax.while_loop(running, advance, state)[4]
    return ids, (ids >= 0).sum(-1)


class ContextError(ValueError):
    """A prompt and its reply are longer than the model's context."""


def check_room(prompts: Prompts, max_new_tokens: int, arch: Architecture) -> None:
    longest = max(map(len, prompts.ids))
    if longest + max_new_tokens > arch.context:
        raise ContextError(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"context of {arch.context} tokens. Allow at most {max(0, arch.context - longest)} new "
            "tokens, or shorten the prompts."
        )


def generate(
    model: Transformer,
    prompts: Prompts,
    edit: Intervention,  # one row, or one for every prompt
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = silent,
    title: str = "generate",
) -> list[list[int]]:
    """New token ids of each prompt, in order; a reply's stop token is left out.

    Prompts of about equal length share a batch; the last batch is filled up, so few shapes compile.
    Raises ContextError where a prompt and its reply would not fit the model's context.
    """
    check_room(prompts, max_new_tokens, model.arch)
    prompts = prompts.for_rows_of(max(map(len, prompts.ids)), model.arch)
    if edit.unit.shape[0] not in (1, len(prompts.ids)):
        raise ValueError(
            f"The edit has {edit.unit.shape[0]} rows for {len(prompts.ids)} prompts; it needs one, "
            "or one for every prompt."
        )
    mesh = mesh_of(model)
    data = mesh.shape["data"]
    # Batches of one size, the last as full as the others; a single one of one of few sizes.
    batches = -(-len(prompts.ids) // batch_size)
    size = -(-len(prompts.ids) // batches)
    size = min(batch_size, bucket(size, least=1)) if batches == 1 else size
    size = -(-size // data) * data
    replies: list[list[int]] = [[] for _ in prompts.ids]
    with jax.set_mesh(mesh):
        # Where steps of few rows wait for memory: see `unrolled`.
        blocks = _unrolled(model) if mesh.devices.flat[0].platform == "cpu" else None
        one_row = edit.unit.shape[0] == 1
        prefix = shared_prefix(model, prompts, edit) if one_row else None
        for members in progress(list(by_length(prompts, size)), title):
            # The batch is filled up with its own first prompt, finished from the start.
            filled = np.concatenate([members, np.repeat(members[:1], size - len(members))])
            parts = [prompts.ids[i][prompts.prefix :] for i in filled]
            tokens = left_padded(parts, prompts.prefix, bucket(max(map(len, parts))))
            own = interventions.take(edit, filled)
            ids, lengths = _generate(
                model,
                blocks,
                place(tokens, mesh),
                own,
                prefix if one_row else shared_prefix(model, prompts, own, size),
                jnp.array(stop_ids, jnp.int32),
                Sampling(
                    temperature=jnp.float32(temperature),
                    key=jax.random.key(seed),
                    row=sharding.place(filled.astype(np.int32), mesh, "batch"),
                ),
                jnp.int32(max_new_tokens),
                sharding.place(np.arange(size) >= len(members), mesh, "batch"),
                room=bucket(max_new_tokens),
            )
            ids, lengths = np.asarray(ids), np.asarray(lengths)
            for row, prompt in enumerate(members):
                reply = ids[row, : lengths[row]].tolist()
                replies[prompt] = reply[:-1] if reply and reply[-1] in stop_ids else reply
    return replies
