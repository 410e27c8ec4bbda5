"""The same numbers by every route: cached, packed, padded, batched; and no token sees a later one.

Letters: B batch row, T token, D residual width, L layers, P post-instruction tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.edits import SITES, Edit
from jax_refusal.models.cache import PADDING, SHARED, Cache, Tokens, empty
from jax_refusal.models.decoder import Output, Transformer
from jax_refusal.models.drivers import SCAN, Driver, Scan, Unrolled
from jax_refusal.runtime import collect
from jax_refusal.runtime.batching import Prompts, fit_rows, pack
from jax_refusal.sites import Capture
from jax_refusal.study.scores import refusal_score
from jax_refusal.study.sweep import Sweep
from tests.models.cases import fields
from tests.tolerances import INVARIANCE, assert_close

WINDOW = 4  # tokens, so that even all layers together do not see a whole row of 24
REFUSAL_IDS = (43, 50)


MODELS = {
    "full": {},
    "window": {"architecture": "mistral", "sliding_window": WINDOW},
    "delta_net": fields("qwen3_next"),
    "mamba": fields("granitemoehybrid"),
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Transformer:
    """With unlimited attention, with a sliding window, and with states among attention."""
    return jr.load_model(str(checkpoint(**MODELS[request.param])))


def nothing(model: Transformer) -> Edit:
    return jr.identity(model.arch.layers, model.arch.width)


def some_edit(model: Transformer) -> Edit:
    direction = np.random.default_rng(5).normal(size=model.arch.width)
    return jr.ablate(direction, model.arch.layers)


def random_ids(model: Transformer, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(model.arch.vocab, size=shape).astype(np.int32)


@jax.jit
def cached(model: Transformer, tokens: Tokens, edit: Edit, cache: Cache) -> tuple[jax.Array, Cache]:
    apart = isinstance(cache.entries[0], tuple)
    drive = Unrolled(model.unrolled()) if apart else SCAN
    out = model(tokens, edit, cache=cache, drive=drive)
    assert out.cache is not None
    return model.unembed(out.x), out.cache


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unrolled"])
def test_cache_equals_no_cache(any_model: Transformer, unroll: bool) -> None:
    """Prefill in two pieces, then single tokens, under an edit."""
    B, T = 2, 20
    ids, edit = random_ids(any_model, B, T), some_edit(any_model)
    tokens = Tokens.padded(jnp.asarray(ids))
    cache, parts, start = empty(any_model.arch, B, T + 3, any_model.dtype), [], 0
    for size in (7, 5, *[1] * 8):
        piece = jax.tree.map(lambda x, s=start, n=size: x[:, s : s + n], tokens)
        logits, cache = cached(any_model, piece, edit, cache)
        parts.append(logits)
        start += size
        if unroll and size == 5:  # the prompt is read: what follows is decoding
            cache = cache.unrolled()
    assert int(cache.length) == T
    assert_close(jnp.concatenate(parts, 1), jr.logits(any_model, ids, edit=edit), INVARIANCE)


def sharing(model: Transformer, prefix: int, lengths: tuple[int, ...]) -> Prompts:
    """Random prompts with their first `prefix` tokens in common."""
    ids = [random_ids(model, n, seed=i).tolist() for i, n in enumerate(lengths)]
    return Prompts([ids[0][:prefix] + row[prefix:] for row in ids], prefix, positions=3)


def one_by_one(model: Transformer, prompts: Prompts, edit: Edit) -> np.ndarray:
    """Last-token logits of each prompt in a pass of its own; padded, so that one shape compiles."""
    rows = []
    for prompt in prompts.ids:
        ids, mask = np.zeros((2, 1, 32), np.int32)
        ids[0, : len(prompt)], mask[0, : len(prompt)] = prompt, 1
        rows.append(jr.logits(model, ids, mask, edit)[0, len(prompt) - 1])
    return np.stack(rows)


@pytest.mark.parametrize("prefix", [0, 9])
def test_packed_rows_equal_single_prompts(any_model: Transformer, prefix: int) -> None:
    prompts, edit = sharing(any_model, prefix, (21, 14, 30, 12, 25)), some_edit(any_model)
    (batch,) = pack(prompts, row_tokens=48)
    assert batch.prompt.shape[0] < len(prompts.ids), "nothing is packed"
    packed = collect.last_logits(any_model, prompts, edit, row_tokens=48)
    assert_close(packed, one_by_one(any_model, prompts, edit), INVARIANCE)


@pytest.mark.parametrize("asked", [[[0, 17], [19, 3]], [[], []]], ids=["two", "none"])
@pytest.mark.parametrize("sites", [("resid_pre",), (*SITES, "z")], ids=["inputs", "inside"])
@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unrolled"])
def test_only_what_is_asked(
    any_model: Transformer, asked: list[list[int]], sites: tuple[str, ...], unroll: bool
) -> None:
    """The stream of the tokens that are asked for, all that is captured, and a whole cache."""
    slots = jnp.array(asked, jnp.int32)
    capture = Capture(sites=sites, slots=jnp.array([[2, 18], [7, 7]]))
    ids, edit = jnp.asarray(random_ids(any_model, 2, 20)), some_edit(any_model)

    @partial(jax.jit, static_argnames="unroll")
    def run(model: Transformer, slots: jax.Array | None, unroll: bool) -> Output:
        cache = empty(model.arch, 2, 20, model.dtype)
        cache = cache.unrolled() if unroll else cache
        drive: Driver = Unrolled(model.unrolled()) if unroll else SCAN
        options = {"capture": capture, "cache": cache, "query_slots": slots, "drive": drive}
        return model(Tokens.padded(ids), edit, **options)

    some, whole = run(any_model, slots, unroll), run(any_model, None, unroll=False)
    assert some.x.shape == (2, slots.shape[1], any_model.arch.width)
    assert some.cache is not None and whole.cache is not None
    expected = jnp.take_along_axis(whole.x, slots[..., None], 1)
    pairs = [("stream", some.x, expected)]
    for entry, full_entry in zip(some.cache.entries, whole.cache.entries, strict=True):
        if isinstance(entry, tuple):
            entry = {name: jnp.stack([layer[name] for layer in entry]) for name in full_entry}
        pairs += [(name, entry[name], x) for name, x in full_entry.items()]
    for site, x in whole.captured.items():
        every = (some.captured[site], x) if isinstance(x, tuple) else ([some.captured[site]], [x])
        pairs += [(site, *each) for each in zip(*every, strict=True)]
    for what, found, full in pairs:
        if found.size:
            assert_close(found, full, INVARIANCE, what)


def test_what_a_span_captures(model: Transformer) -> None:
    """The layers that run as in a whole pass; zeros of those that do not."""
    ids, capture = jnp.asarray(random_ids(model, 2, 9)), Capture(sites=("mlp_out", "z"))
    tokens, edit = Tokens.padded(ids), some_edit(model)
    run = jax.jit(
        lambda model, x, drive: model.stream(x, tokens, edit, capture=capture, drive=drive)
    )
    x = model.embedded(ids)
    whole, first = run(model, x, SCAN), run(model, x, Scan((jnp.int32(0), jnp.int32(2))))
    rest = run(model, first.x, Scan((jnp.int32(2), jnp.int32(model.arch.layers))))
    assert_close(rest.x, whole.x, INVARIANCE)
    for site, every in whole.captured.items():
        assert not np.any(first.captured[site][2:]) and not np.any(rest.captured[site][:2])
        assert_close(first.captured[site] + rest.captured[site], every, INVARIANCE, site)


def test_rows_waste_little() -> None:
    """Every item once, no row too long, few slots left empty."""
    lengths = np.random.default_rng(0).integers(12, 30, 500).tolist()
    rows, length = fit_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= length <= 64
    assert len(rows) * length < 1.08 * sum(lengths)
    assert fit_rows([30, 30, 30], 64) == ([[0], [1], [2]], 32)
    assert fit_rows([32, 32], 64) == ([[0], [1]], 32)
    assert fit_rows([98, 3], 64) == ([[0], [1]], 100)


def test_each_part_of_the_mesh_gets_its_tokens() -> None:
    prompts = Prompts([[1] * 16 for _ in range(40)], prefix=0)
    assert [b.prompt.shape[0] for b in pack(prompts, row_tokens=16, batch_tokens=128)] == [8] * 5
    parts = pack(prompts, row_tokens=16, batch_tokens=128, multiple=2)
    assert [b.prompt.shape[0] for b in parts] == [14] * 3


@pytest.fixture(scope="module")
def jacobian() -> Callable[..., np.ndarray]:
    """|d logits[b, t] / d embedding[b, s]|, summed over V and D: [B, T, T]."""

    @jax.jit
    def run(model: Transformer, tokens: Tokens) -> jax.Array:
        x = model.embedded(tokens.ids)
        edit = jr.identity(model.arch.layers, model.arch.width)
        weights = jax.random.normal(jax.random.key(0), (model.arch.vocab,))

        def mixed(x: jax.Array) -> jax.Array:  # [T], rows do not mix
            logits = model.unembed(model.stream(x, tokens, edit).x)
            return jnp.einsum("btv,v->t", logits, weights)

        # Row by row: experts have no vmap, and on CPUs jaxlib 0.10.2 compiles that of a query
        # norm's gradient into another function.
        _, pullback = jax.vjp(mixed, x)
        rows = jax.lax.map(lambda row: jnp.abs(pullback(row)[0]).sum(-1), jnp.eye(x.shape[1]))
        return rows.swapaxes(0, 1)

    return lambda model, tokens: np.asarray(run(model, tokens))


def test_causality(any_model: Transformer, jacobian: Callable[..., np.ndarray]) -> None:
    B, T = 2, 24
    seen = jacobian(any_model, Tokens.padded(jnp.asarray(random_ids(any_model, B, T)))) > 0
    # Layer by layer, what lies a window further back is seen through the tokens between.
    windows = any_model.arch.family == "mistral"
    reach = any_model.arch.layers * (WINDOW - 1) if windows else T
    back = np.arange(T)[:, None] - np.arange(T)[None]
    expected = (back >= 0) & (back <= reach)
    np.testing.assert_array_equal(seen, np.broadcast_to(expected, seen.shape))


def test_segments_do_not_leak(any_model: Transformer, jacobian: Callable[..., np.ndarray]) -> None:
    """Packed prompts see themselves and what is shared; padding is seen by nobody."""
    T = 24
    segments = np.repeat([SHARED, 1, PADDING, 2, 3, PADDING], [4, 6, 2, 5, 4, 3])
    positions = np.concatenate([np.arange(n) + s for n, s in ((4, 0), (6, 4), (2, 0), (5, 4))])
    positions = np.concatenate([positions, np.arange(4) + 4, np.zeros(3, int)])
    tokens = Tokens(
        ids=jnp.asarray(random_ids(any_model, 2, T)),
        positions=jnp.tile(jnp.asarray(positions, jnp.int32), (2, 1)),
        segments=jnp.tile(jnp.asarray(segments, jnp.int32), (2, 1)),
    )
    seen = jacobian(any_model, tokens)[:, segments != PADDING] > 0
    one, other = segments[segments != PADDING, None], segments[None]
    expected = (one == other) | (other == SHARED)
    expected &= np.arange(T)[segments != PADDING, None] >= np.arange(T)[None]
    np.testing.assert_array_equal(seen, np.broadcast_to(expected, seen.shape))


def test_padding_anywhere(any_model: Transformer) -> None:
    """On the left, on the right, on both sides or in between; whatever token the padding is."""
    B, T, room = 3, 16, 24
    ids = random_ids(any_model, B, T)
    plain = jr.logits(any_model, ids)
    scattered = np.sort(np.random.default_rng(3).permutation(room)[:T])
    for slots in (np.arange(8, 24), np.arange(16), np.arange(3, 19), scattered):
        padded = random_ids(any_model, B, room, seed=9)
        padded[:, slots] = ids
        mask = np.zeros(padded.shape, bool)
        mask[:, slots] = True
        logits = jr.logits(any_model, padded, mask)[:, slots]
        assert_close(logits, plain, INVARIANCE, f"prompt in slots {slots}")


def test_batches_do_not_change_logits(any_model: Transformer) -> None:
    ids = random_ids(any_model, 5, 16)
    whole = jr.logits(any_model, ids)
    order = np.array([3, 0, 4, 2, 1])
    assert_close(jr.logits(any_model, ids[order]), whole[order], INVARIANCE, "order")
    alone = jnp.concatenate([jr.logits(any_model, ids[i : i + 1]) for i in range(5)])
    assert_close(alone, whole, INVARIANCE, "size")


def reordered(prompts: Prompts, order: list[int]) -> Prompts:
    return Prompts([prompts.ids[i] for i in order], prompts.prefix, prompts.positions)


SIZES = ({"row_tokens": 16, "batch_tokens": 64}, {"row_tokens": 96, "batch_tokens": 96})


def test_batches_do_not_change_means_and_scores(model: Transformer) -> None:
    """One prompt at a time, in some order, packed: the same means and scores, and by hand too."""
    prompts = sharing(model, 5, (21, 14, 30, 12, 25, 9, 17))
    ids = jnp.array(REFUSAL_IDS)

    def run(prompts: Prompts, **size: int) -> tuple[np.ndarray, np.ndarray]:
        means, scores = collect.mean_activations(
            model, prompts, nothing(model), score=refusal_score, score_params=ids, **size
        )
        assert scores is not None
        return means, scores

    means, scores = run(prompts)
    alone = refusal_score(jnp.asarray(one_by_one(model, prompts, nothing(model))), ids)
    assert_close(scores, alone, INVARIANCE, "one by one")
    for size in SIZES:
        other_means, other_scores = run(prompts, **size)
        assert_close(other_means, means, INVARIANCE, f"means, {size}")
        assert_close(other_scores, scores, INVARIANCE, f"scores, {size}")
    order = [4, 1, 6, 0, 2, 5, 3]
    other_means, other_scores = run(reordered(prompts, order))
    assert_close(other_means, means, INVARIANCE, "means, order")
    assert_close(other_scores, scores[order], INVARIANCE, "scores, order")
    singly = np.mean([run(reordered(prompts, [i]))[0] for i in range(len(order))], 0)
    assert_close(singly, means, INVARIANCE, "means, singly")


def test_batches_do_not_change_candidates(model: Transformer) -> None:
    """Bypass, induce and KL of candidates: rows of a row, chunks of chunks, the same scores."""
    harmful = sharing(model, 5, (21, 14, 30, 12))
    harmless = reordered(sharing(model, 5, (9, 17, 11, 28, 15)), [4, 3, 2, 1, 0])
    shape = (harmful.positions, model.arch.layers, model.arch.width)
    directions = np.random.default_rng(2).normal(size=shape)
    cells = [(0, 0), (2, 1), (1, 3), (2, 3), (0, 2)]

    def run(harmful: Prompts, harmless: Prompts, **size: int) -> list[list[float]]:
        sweep = Sweep(model, directions, harmful, harmless, REFUSAL_IDS, **size)
        return [sweep.bypass(cells), sweep.induce(cells), sweep.kl(cells)]

    scores = run(harmful, harmless)
    assert_close(run(harmful, harmless, **SIZES[0]), scores, INVARIANCE, "many small batches")
    order = [2, 0, 3, 1]
    assert_close(run(reordered(harmful, order), harmless), scores, INVARIANCE, "order")
