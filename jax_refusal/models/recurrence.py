"""What mixers with a state share: where prompts begin, short convolutions, the recurrence itself.

Letters: B batch row, T token, C token of a chunk (i reads, j is read), H value heads, G key heads, R
value heads of a key head, N key width, P value width.

A state [N, P] for each value head fades and takes in one token after the other:
S <- exp(decay) S + k v^T, which a query reads as q S. In a row of packed prompts each begins with
the state behind the tokens in front of all of them; padded tokens change nothing.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jax_refusal.capture import at_slots
from jax_refusal.models.cache import PADDING, Tokens
from jax_refusal.models.ops import einsum

CHUNK = 64  # tokens that are multiplied together; the state goes from chunk to chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Which tokens of a pass follow each other."""

    real: jax.Array  # [B, T] bool, no padding
    segments: jax.Array  # [B, T], padding has that of the last real token before it
    offset: jax.Array  # [B, T] tokens since the first of its segment

    @classmethod
    def of(cls, tokens: Tokens) -> "Runs":
        real = tokens.segments != PADDING
        at = jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape)
        last = jax.lax.cummax(jnp.where(real, at, -1), axis=1)
        filled = jnp.where(last < 0, PADDING, at_slots(tokens.segments, jnp.maximum(last, 0)))
        before = jnp.pad(filled, [(0, 0), (1, 0)], constant_values=PADDING)[:, :-1]
        first = jax.lax.cummax(jnp.where(filled != before, at, 0), axis=1)
        return cls(real=real, segments=filled, offset=at - first)


def convolve(
    x: jax.Array,  # [B, T, ...]
    kernel: jax.Array,  # [..., taps], the token's own last
    runs: Runs,
    tail: jax.Array | None,  # [B, taps - 1, ...], of the tokens before; None is zeros
    bias: jax.Array | None = None,  # [...]
) -> tuple[jax.Array, jax.Array]:  # [B, T, ...], the new tail
    """Each channel's own causal convolution, within prompts; the first tokens of a prompt reach
    into the tail. Sums are in float32."""
    T, taps = x.shape[1], kernel.shape[-1]
    wide = tuple(range(2, x.ndim))
    x = jnp.where(jnp.expand_dims(runs.real, wide), x, 0)
    weights = [kernel[..., i].astype(jnp.float32) for i in range(taps)]
    offset = jnp.expand_dims(runs.offset, wide)
    out = x.astype(jnp.float32) * weights[-1]
    for back in range(1, min(taps, T)):
        earlier = jnp.pad(x, [(0, 0), (back, 0), *[(0, 0)] * len(wide)])[:, :T]
        out += jnp.where(offset >= back, earlier, 0).astype(jnp.float32) * weights[-1 - back]
    if tail is None:
        tail = jnp.zeros((x.shape[0], taps - 1, *x.shape[2:]), x.dtype)
    else:
        for first in range(min(taps - 1, T)):  # of tokens since a prompt began
            reached = zip(range(first, taps - 1), weights, strict=False)
            before = sum(tail[:, i].astype(jnp.float32) * weight for i, weight in reached)
            out += jnp.where(offset == first, jnp.asarray(before)[:, None], 0)
    if bias is not None:
        out += bias.astype(jnp.float32)
    return out.astype(x.dtype), _tail(x, tail, runs)


def _tail(x: jax.Array, tail: jax.Array, runs: Runs) -> jax.Array:
    """What a convolution of the tokens to come sees of x, behind the old tail."""
    T, kept = x.shape[1], tail.shape[1]
    at = jnp.where(runs.real, jnp.arange(T), -1)
    last = at.max(1)[:, None]  # [B, 1]
    own = jnp.where(last < 0, 0, at_slots(runs.offset, jnp.maximum(last, 0)) + 1)
    back = jnp.arange(kept)[None, ::-1]  # tokens before the last one
    where = jnp.where(back < own, kept + last - back, kept - 1 - back + own)
    return at_slots(jnp.concatenate([tail.astype(x.dtype), x], 1), where)


def recur(
    q: jax.Array,  # [B, T, G, N]
    k: jax.Array,  # [B, T, G, N]
    v: jax.Array,  # [B, T, H, P]
    decay: jax.Array,  # [B, T, H], log of what a token leaves of the state
    runs: Runs,
    state: jax.Array | None,  # [B, H, N, P] behind the tokens before; None is zeros
    beta: jax.Array | None = None,  # [B, T, H], see below
) -> tuple[jax.Array, jax.Array]:  # [B, T, H, P], the state behind the last token; float32
    """The recurrence over all tokens. With `beta` it is the delta rule: a token takes that share of
    what its key reads out of the state, and puts the same share of v in."""
    (B, T, G, N), (H, P) = k.shape, v.shape[2:]
    R = H // G
    grouped = [
        q.swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.reshape(B, T, G, R, P).transpose(0, 2, 3, 1, 4),
        *(x.reshape(B, T, G, R).transpose(0, 2, 3, 1) for x in (decay, beta) if x is not None),
    ]
    arrays = [x.astype(jnp.float32) for x in grouped]  # [B, G, T, N] and [B, G, R, T, ...]
    base = None if state is None else state.reshape(B, G, R, N, P)
    start = jnp.zeros((B, G, R, N, P)) if base is None else base
    if T == 1:
        out, end = _step(arrays, runs.real, start)
    else:
        out, end = _chunks(arrays, runs, start, base)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, P), end.reshape(B, H, N, P)


def _step(
    arrays: list[jax.Array], real: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence for one token, as `_chunks` has its arguments."""
    q, k, v, decay, *beta = arrays
    faded = state * jnp.exp(decay)[..., None]
    if beta:
        v = (v - einsum("bgin,bgrnp->bgrip", k, faded)) * beta[0][..., None]
    new = faded + einsum("bgjn,bgrjp->bgrnp", k, v)
    return einsum("bgin,bgrnp->bgrip", q, new), jnp.where(_wide(real[:, 0], new), new, state)


def _chunks(
    arrays: list[jax.Array],  # q, k [B, G, T, N], v [B, G, R, T, P], decay, and beta [B, G, R, T]
    runs: Runs,
    state: jax.Array,  # [B, G, R, N, P]
    base: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # [B, G, R, T, P], [B, G, R, N, P]
    """The recurrence for many tokens: products within a chunk, a scan over chunks."""
    T = runs.real.shape[1]
    count = -(-T // CHUNK)
    size = -(-T // count)

    def split(x: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
        """Along the tokens, as the first axis; padded behind."""
        x = jnp.pad(x, [(0, (count * size - T) * (i == axis)) for i in range(x.ndim)], mode)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    axes = [2, 2, 3, 3, 3]
    scanned = [split(x, axis) for x, axis in zip(arrays, axes, strict=False)]
    scanned += [split(runs.real, 1), split(runs.segments, 1, "edge")]
    carry = state, jnp.full(runs.real.shape[0], PADDING)
    (state, _), out = jax.lax.scan(partial(_chunk, base), carry, scanned)
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(*out.shape[:3], count * size, -1)[:, :, :, :T], state


def _chunk(
    base: jax.Array | None,  # [B, G, R, N, P], where a prompt begins; None is zeros
    carry: tuple[jax.Array, jax.Array],  # the state, and whose it is [B]
    scanned: list[jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One chunk. Of the decays between two tokens only those of their own prompt count."""
    (state, owner), (q, k, v, decay, *beta, real, segments) = carry, scanned
    size = real.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
    seen &= jnp.tril(jnp.ones((size, size), bool))  # [B, C, C]
    since = einsum("bij,bgrj->bgri", seen.astype(jnp.float32), decay)  # the prompt or chunk began
    between = since[..., :, None] - since[..., None, :]
    fades = jnp.exp(jnp.where(seen[:, None, None], between, -jnp.inf))  # [B, G, R, C, C]
    follows = (segments == owner[:, None])[:, None, None, :, None]

    def carried(x: jax.Array) -> jax.Array:  # [B, G, C, N] -> [B, G, R, C, P]
        """What x reads in the state in front of its token's part of this chunk."""
        fresh = 0.0 if base is None else einsum("bgin,bgrnp->bgrip", x, base)
        read = jnp.where(follows, einsum("bgin,bgrnp->bgrip", x, state), fresh)
        return read * jnp.exp(since)[..., None]

    if beta:
        share = beta[0][..., None]
        overlap = einsum("bgin,bgjn->bgij", k, k)[:, :, None] * fades * share
        v = jax.lax.linalg.triangular_solve(
            overlap, (v - carried(k)) * share, left_side=True, lower=True, unit_diagonal=True
        )
    weights = einsum("bgin,bgjn->bgij", q, k)[:, :, None] * fades
    out = carried(q) + einsum("bgrij,bgrjp->bgrip", weights, v)
    faded = v * fades[..., -1, :, None]
    fresh = jnp.zeros_like(state) if base is None else base
    start = jnp.where(_wide(segments[:, -1] == owner, state), state, fresh)
    end = start * jnp.exp(since[..., -1])[..., None, None]
    return (end + einsum("bgjn,bgrjp->bgrnp", k, faded), segments[:, -1]), out


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B] against an array that leads with B."""
    return x.reshape(-1, *[1] * (like.ndim - 1))
