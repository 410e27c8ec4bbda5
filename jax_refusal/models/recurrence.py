"""What mixers with a state share: who comes before whom, short convolutions, the recurrence itself.

Letters: B batch row, T token, C token of a chunk (i reads, j is read), H value heads, G key heads,
R value heads of a key head, N key width, P value width.

A state [N, P] for each value head fades and takes in one token after the other:
S <- exp(decay) S + k v^T, which a query reads as q S. In a row of packed prompts each begins with
the state behind the tokens that all of them share; padded tokens change nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_refusal.models.cache import PADDING, SHARED, Tokens
from jax_refusal.models.ops import einsum
from jax_refusal.sites import at_slots

CHUNK = 64  # tokens that are multiplied together; the state goes from chunk to chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Which tokens of a pass follow each other. Below 0 lie the tokens before the pass: -1 is the
    last of them."""

    real: jax.Array  # [B, T] bool, no padding
    segments: jax.Array  # [B, T], padding has that of the last real token before it
    previous: tuple[jax.Array, ...]  # [B, T] the token before, the one before that, and so on
    last: jax.Array  # [B, taps - 1] the last tokens of the row, in order

    @classmethod
    def of(cls, tokens: Tokens, taps: int) -> "Runs":
        real = tokens.segments != PADDING
        last = _last(real)
        segments = jnp.where(last < 0, PADDING, at_slots(tokens.segments, jnp.maximum(last, 0)))
        before, same = _before(last), segments == _before(segments)
        # The first token of a prompt comes behind what is shared.
        shared = jnp.where(segments == SHARED, -1, _last(tokens.segments == SHARED))
        one = jnp.where((before >= 0) & same, before, shared)

        def earlier(at: jax.Array) -> jax.Array:
            return jnp.where(at < 0, at - 1, at_slots(one, jnp.maximum(at, 0)))

        previous, ends = [one], [last[:, -1:]]
        for _ in range(taps - 2):
            previous.append(earlier(previous[-1]))
            ends.insert(0, earlier(ends[0]))
        ends = jnp.concatenate(ends, 1)
        return cls(real=real, segments=segments, previous=tuple(previous), last=ends)


def _last(flags: jax.Array) -> jax.Array:  # [B, T] bool -> [B, T], at or before each; -1 is none
    return jax.lax.cummax(jnp.where(flags, jnp.arange(flags.shape[1])[None], -1), axis=1)


def _before(x: jax.Array) -> jax.Array:  # [B, T], moved on by one token
    return jnp.pad(x, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]


def convolve(
    x: jax.Array,  # [B, T, ...]
    kernel: jax.Array,  # [..., taps], the token's own last
    runs: Runs,
    tail: jax.Array | None,  # [B, taps - 1, ...], of the tokens before; None is zeros
    bias: jax.Array | None = None,  # [...]
) -> tuple[jax.Array, jax.Array]:  # [B, T, ...], the new tail
    """Each channel's own causal convolution along a prompt. Sums are in float32."""
    taps = kernel.shape[-1]
    if tail is None:
        tail = jnp.zeros((x.shape[0], taps - 1, *x.shape[2:]), x.dtype)
    whole = jnp.concatenate([tail.astype(x.dtype), x], 1)
    seen = [x, *(at_slots(whole, at + taps - 1) for at in runs.previous[: taps - 1])]
    out = jnp.zeros(x.shape, jnp.float32)
    for back, each in enumerate(seen):
        weight = kernel[None, None, ..., -1 - back]
        out += each.astype(jnp.float32) * weight.astype(jnp.float32)
    if bias is not None:
        out += bias[None, None].astype(jnp.float32)
    return out.astype(x.dtype), at_slots(whole, runs.last[:, 1 - taps :] + taps - 1)


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
    start = jnp.zeros((B, G, R, N, P)) if state is None else state.reshape(B, G, R, N, P)
    out, end = _step(arrays, runs.real, start) if T == 1 else _chunks(arrays, runs, start)
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
    carry = state, state, jnp.full(runs.real.shape[0], PADDING)
    (state, _, _), out = jax.lax.scan(_chunk, carry, scanned)
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(*out.shape[:3], count * size, -1)[:, :, :, :T], state


def _chunk(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    scanned: list[jax.Array],
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """One chunk. Carried are a state and whose it is [B], and the state in which prompts begin.

    What fades between two tokens is what the reader sees of the tokens between: its own prompt's,
    and what is shared.
    """
    (state, base, owner), (q, k, v, decay, *beta, real, segments) = carry, scanned
    size = real.shape[1]
    shared = real & (segments == SHARED)
    seen = (segments[:, :, None] == segments[:, None, :]) | shared[:, None, :]
    seen &= real[:, None, :] & jnp.tril(jnp.ones((1, size, size), bool))  # [B, C, C]
    since = einsum("bij,bgrj->bgri", seen.astype(jnp.float32), decay)  # the chunk began
    between = since[..., :, None] - since[..., None, :]
    fades = jnp.exp(jnp.where(seen[:, None, None], between, -jnp.inf))  # [B, G, R, C, C]
    follows = (segments == owner[:, None])[:, None, None, :, None]

    def carried(x: jax.Array) -> jax.Array:  # [B, G, C, N] -> [B, G, R, C, P]
        """What x reads of the tokens in front of this chunk."""
        own, fresh = (einsum("bgin,bgrnp->bgrip", x, each) for each in (state, base))
        return jnp.where(follows, own, fresh) * jnp.exp(since)[..., None]

    if beta:
        share = beta[0][..., None]
        overlap = einsum("bgin,bgjn->bgij", k, k)[:, :, None] * fades * share
        v = jax.lax.linalg.triangular_solve(
            overlap, (v - carried(k)) * share, left_side=True, lower=True, unit_diagonal=True
        )
    weights = einsum("bgin,bgjn->bgij", q, k)[:, :, None] * fades
    out = carried(q) + einsum("bgrij,bgrjp->bgrip", weights, v)

    def behind(start: jax.Array, total: jax.Array, fades: jax.Array) -> jax.Array:
        """The state at the end, of what fades by `total` and of tokens that fade by `fades`."""
        new = einsum("bgjn,bgrjp->bgrnp", k, v * fades[..., None])
        return start * jnp.exp(total)[..., None, None] + new

    start = jnp.where(_wide(segments[:, -1] == owner, state), state, base)
    end = behind(start, since[..., -1], fades[..., -1, :])
    total = jnp.where(shared[:, None, None], decay, 0).sum(-1)
    left = jnp.where(shared[:, None, None], total[..., None] - since, -jnp.inf)
    return (end, behind(base, total, jnp.exp(left)), segments[:, -1]), out


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B] against an array that leads with B."""
    return x.reshape(-1, *[1] * (like.ndim - 1))
