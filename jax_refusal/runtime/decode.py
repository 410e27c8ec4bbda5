"""Continuous batching: one program prefills prompts into free rows, one takes steps until enough
rows are free again. They are compiled for the numbers of rows, slots and edits, whatever the
prompts and edits are; the first also for each of the few lengths that prompts are padded to.

Letters: B batch row, T prompt token, N prefix tokens, W slots for new tokens, V vocabulary, J
requests prefilled at once, R edit rows.

New tokens lie in a ring of W slots behind the prompts': all rows write one slot at the same step,
whenever each of them began. What a row's last request left there is no part of what it may see, and
a reply of at most W tokens never meets itself.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_refusal.edits import REPLY, Edit, take
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import Cache, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import Driver
from jax_refusal.models.ops import accelerated
from jax_refusal.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; arrays, so that changing them compiles nothing.

    A row's noise depends on the seed, its prompt's number in the job and how many tokens it has:
    not on the batch it is in.
    """

    temperature: jax.Array  # 0 is greedy
    key: jax.Array

    def choose(
        self,
        logits: jax.Array,  # [B, V]
        number: jax.Array,  # [B] the prompt's
        count: jax.Array,  # [B] new tokens before this one
    ) -> jax.Array:  # [B] int32
        def noise_key(number: jax.Array, count: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(self.key, number), count)

        def sample() -> jax.Array:
            keys = jax.vmap(noise_key)(number, count)
            return jax.vmap(jax.random.categorical)(keys, logits / self.temperature)

        greedy = partial(largest, logits)
        return jax.lax.cond(self.temperature > 0, sample, greedy).astype(jnp.int32)


def largest(logits: jax.Array) -> jax.Array:  # [B, V] -> [B]
    """`argmax` of logits without NaN, on a CPU in two steps: it takes maxima of groups many at a
    time, but looks for where they are one by one, for 96 rows a twelfth of a decode step."""
    size = 1 if accelerated() else math.gcd(logits.shape[-1], 256)
    if size == 1:
        return jnp.argmax(logits, -1)
    groups = logits.reshape(len(logits), -1, size)
    group = jnp.argmax(groups.max(-1), -1)
    own = jnp.take_along_axis(groups, group[:, None, None], 1)[:, 0]
    return group * size + jnp.argmax(own, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for all replies of a job."""

    stop_ids: jax.Array
    limit: jax.Array  # int32, new tokens at most
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """Replies under way. A row that is finished keeps its reply until the next request comes."""

    number: jax.Array  # [B] the prompt's, which its noise depends on
    edit: jax.Array  # [B] which of the job's edits
    prompt: jax.Array  # [B] tokens of the prompt
    token: jax.Array  # [B] the last new token
    count: jax.Array  # [B] new tokens, a stop token included
    finished: jax.Array  # [B] bool
    ids: jax.Array  # [B, W] new tokens, in the ring
    first: jax.Array  # [B] slot of the ring with the first of them
    cache: Cache  # N + T + W slots
    step: jax.Array  # int32, steps taken so far

    def each(self, change: Callable[..., Any]) -> "Replies":
        """change(array, *its logical axes) of every array that has rows."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cache, step = fields.pop("cache"), fields.pop("step")
        rows = {name: change(x, *("batch", None)[: x.ndim]) for name, x in fields.items()}
        return Replies(**rows, cache=cache.each(change), step=step)

    def placed(self) -> "Replies":
        """Each row with its cache on the mesh's data axis: one program serves every call."""
        return self.each(constrain)


@partial(jax.jit, static_argnames=("rows", "slots", "capacity", "unrolled"))
def empty(model: Transformer, *, rows: int, slots: int, capacity: int, unrolled: bool) -> Replies:
    """All rows free; `slots` for prompts with their prefix, `capacity` for new tokens."""

    none = partial(jnp.zeros, rows, jnp.int32)
    cache = caches.empty(model.arch, rows, slots + capacity, model.dtype)
    free = Replies(
        number=none(),
        edit=none(),
        prompt=none() + 1,  # so that the position of a free row's token is one too: 0
        token=none(),
        count=none(),
        finished=jnp.ones(rows, bool),
        ids=jnp.zeros((rows, capacity), jnp.int32),
        first=none(),
        cache=cache.unrolled() if unrolled else cache,
        step=jnp.int32(0),
    )
    return free.placed()


@partial(jax.jit, donate_argnames=("replies",))
def prefill(
    model: Transformer,
    replies: Replies,
    tokens: Tokens,  # [J, T], left-padded
    number: jax.Array,  # [J]
    edits: Edit,  # [R]
    edit: jax.Array,  # [J] which of them
    prefix: Cache | None,  # N tokens, of some rows
    prefix_row: jax.Array,  # [J] which of them
    rows: jax.Array,  # [J] those that they get; B and more: nowhere
    rules: Rules,
) -> Replies:
    """Runs prompts, chooses the first token of their replies, and puts them in free rows."""
    requests, slots = tokens.ids.shape
    if prefix is None:
        cache = caches.empty(model.arch, requests, slots, model.dtype)
    else:
        cache = prefix.take(prefix_row).grow(slots)
    out = model(tokens, take(edits, edit), cache=cache)
    assert out.cache is not None
    logits = model.unembed(out.x[:, -1:])[:, 0]
    token = rules.sampling.choose(logits, number, jnp.zeros(requests, jnp.int32))
    slot = (replies.step - 1) % replies.ids.shape[1]

    def put(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    replies = dataclasses.replace(
        replies,
        number=put(replies.number, number),
        edit=put(replies.edit, edit),
        prompt=put(replies.prompt, tokens.positions[:, -1] + 1),
        token=put(replies.token, token),
        count=put(replies.count, 1),
        finished=put(replies.finished, jnp.isin(token, rules.stop_ids) | (rules.limit <= 1)),
        ids=replies.ids.at[rows, slot].set(token, mode="drop"),
        first=put(replies.first, slot),
        cache=replies.cache.put(rows, out.cache),
    )
    return replies.placed()


@partial(jax.jit, donate_argnames=("replies",))
def advance(
    model: Transformer,
    drive: Driver,
    replies: Replies,
    edits: Edit,  # [R]
    target: jax.Array,  # int32
    rules: Rules,
) -> Replies:
    """Steps of one token for every row, until no more than `target` replies are under way."""
    size, capacity = replies.ids.shape
    start = replies.cache.positions.shape[1] - capacity
    edit = take(edits, replies.edit)

    def running(replies: Replies) -> jax.Array:
        return (~replies.finished).sum() > target

    def advanced(replies: Replies) -> Replies:
        slot = replies.step % capacity
        one = Tokens(
            ids=replies.token[:, None],
            positions=(replies.prompt + replies.count - 1)[:, None],
            segments=jnp.ones((size, 1), jnp.int32),
            lengths=replies.prompt[:, None],
            kinds=jnp.full((size, 1), REPLY, jnp.int32),
        )
        cache = dataclasses.replace(replies.cache, length=start + slot)
        out = model(one, edit, cache=cache, drive=drive)
        logits = model.unembed(out.x)[:, 0]
        token = rules.sampling.choose(logits, replies.number, replies.count)
        count = replies.count + ~replies.finished
        stopped = jnp.isin(token, rules.stop_ids) | (count >= rules.limit)
        here = jax.lax.dynamic_slice(replies.ids, (0, slot), (size, 1))
        new = jnp.where(replies.finished[:, None], here, token[:, None])
        return dataclasses.replace(
            replies,
            token=token,
            count=count,
            finished=replies.finished | stopped,
            ids=jax.lax.dynamic_update_slice(replies.ids, new, (0, slot)),
            cache=out.cache,
            step=replies.step + 1,
        )

    return jax.lax.while_loop(running, advanced, replies).placed()
