"""Rows of replies that come and go: one program admits prompts to free rows, one takes steps until
enough rows are free again. They are compiled for the numbers of rows, slots and edits, whatever the
prompts and edits are; the first also for each of the few lengths that prompts are padded to.

Letters: B batch row, T prompt token, C slot of the cache, N prefix tokens, S new-token slots, V
vocabulary, G admitted prompts, R edit rows.

New tokens lie in a ring of S slots behind the prompts': all rows write one slot at the same step,
whenever each of them began. What a row's last guest left there is no part of what it may see, and
a reply of at most S tokens never meets itself.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from jax_refusal import edits as interventions
from jax_refusal.edits import Intervention
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
class Rows:
    """Replies under way. A row that is finished keeps its reply until the next guest comes."""

    number: jax.Array  # [B] the prompt's, which its noise depends on
    edit: jax.Array  # [B] which of the job's edits
    prompt: jax.Array  # [B] tokens of the prompt
    token: jax.Array  # [B] the last new token
    count: jax.Array  # [B] new tokens, a stop token included
    finished: jax.Array  # [B] bool
    ids: jax.Array  # [B, S] new tokens, in the ring
    first: jax.Array  # [B] slot of the ring with the first of them
    cache: Cache  # N + T + S slots
    step: jax.Array  # int32, steps taken so far


def _placed(rows: Rows) -> Rows:
    """Each row with its cache on the mesh's data axis, so that one program serves every call."""

    def pinned(x: jax.Array) -> jax.Array:
        return constrain(x, *("batch", None)[: x.ndim])

    fields = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    cache, step = fields.pop("cache"), fields.pop("step")
    return Rows(**{k: pinned(x) for k, x in fields.items()}, cache=cache.placed(), step=step)


@partial(jax.jit, static_argnames=("rows", "slots", "room", "unrolled"))
def empty(model: Transformer, *, rows: int, slots: int, room: int, unrolled: bool) -> Rows:
    """All rows free; `slots` for prompts with their prefix, `room` for new tokens."""

    none = partial(jnp.zeros, rows, jnp.int32)
    cache = caches.empty(model.arch, rows, slots + room, model.dtype)
    free = Rows(
        number=none(),
        edit=none(),
        prompt=none() + 1,  # so that the position of a free row's token is one too: 0
        token=none(),
        count=none(),
        finished=jnp.ones(rows, bool),
        ids=jnp.zeros((rows, room), jnp.int32),
        first=none(),
        cache=cache.unrolled() if unrolled else cache,
        step=jnp.int32(0),
    )
    return _placed(free)


@partial(jax.jit, donate_argnames=("rows",))
def admit(
    model: Transformer,
    rows: Rows,
    tokens: Tokens,  # [G, T], left-padded
    number: jax.Array,  # [G]
    edits: Intervention,  # [R]
    edit: jax.Array,  # [G] which of them
    prefix: Cache | None,  # N tokens, of some rows
    prefix_row: jax.Array,  # [G] which of them
    places: jax.Array,  # [G] the rows they get; B and more: nowhere
    rules: Rules,
) -> Rows:
    """Runs prompts, chooses the first token of their replies, and puts them in free rows."""
    guests, slots = tokens.ids.shape
    if prefix is None:
        cache = caches.empty(model.arch, guests, slots, model.dtype)
    else:
        cache = prefix.take(prefix_row).grow(slots)
    out = model(tokens, interventions.take(edits, edit), cache=cache)
    assert out.cache is not None
    logits = model.unembed(out.x[:, -1:])[:, 0]
    token = rules.sampling.choose(logits, number, jnp.zeros(guests, jnp.int32))
    slot = (rows.step - 1) % rows.ids.shape[1]

    def put(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
        return old.at[places].set(new, mode="drop")

    rows = dataclasses.replace(
        rows,
        number=put(rows.number, number),
        edit=put(rows.edit, edit),
        prompt=put(rows.prompt, tokens.positions[:, -1] + 1),
        token=put(rows.token, token),
        count=put(rows.count, 1),
        finished=put(rows.finished, jnp.isin(token, rules.stop_ids) | (rules.limit <= 1)),
        ids=rows.ids.at[places, slot].set(token, mode="drop"),
        first=put(rows.first, slot),
        cache=rows.cache.put(places, out.cache),
    )
    return _placed(rows)


@partial(jax.jit, donate_argnames=("rows",))
def advance(
    model: Transformer,
    drive: Driver,
    rows: Rows,
    edits: Intervention,  # [R]
    target: jax.Array,  # int32
    rules: Rules,
) -> Rows:
    """Steps of one token for every row, until no more than `target` replies are under way."""
    size, room = rows.ids.shape
    start = rows.cache.positions.shape[1] - room
    edit = interventions.take(edits, rows.edit)

    def running(rows: Rows) -> jax.Array:
        return (~rows.finished).sum() > target

    def advanced(rows: Rows) -> Rows:
        slot = rows.step % room
        one = Tokens(
            ids=rows.token[:, None],
            positions=(rows.prompt + rows.count - 1)[:, None],
            segments=jnp.ones((size, 1), jnp.int32),
            lengths=rows.prompt[:, None],
        )
        cache = dataclasses.replace(rows.cache, length=start + slot)
        out = model(one, edit, cache=cache, drive=drive)
        logits = model.unembed(out.x)[:, 0]
        token = rules.sampling.choose(logits, rows.number, rows.count)
        count = rows.count + ~rows.finished
        stopped = jnp.isin(token, rules.stop_ids) | (count >= rules.limit)
        here = jax.lax.dynamic_slice(rows.ids, (0, slot), (size, 1))
        new = jnp.where(rows.finished[:, None], here, token[:, None])
        return dataclasses.replace(
            rows,
            token=token,
            count=count,
            finished=rows.finished | stopped,
            ids=jax.lax.dynamic_update_slice(rows.ids, new, (0, slot)),
            cache=out.cache,
            step=rows.step + 1,
        )

    return _placed(jax.lax.while_loop(running, advanced, rows))
