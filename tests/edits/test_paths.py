"""Every path takes every edit: replies, packed scoring, means, candidates' passes, loss, training.

What is expected comes from passes of one prompt each over all its tokens: no cache, no shared
prefix, no packing. Letters: B batch row, T token, D residual width, L layers, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.edits import INSTRUCTION, POST_INSTRUCTION, REPLY, Edit
from jax_refusal.evals.loss import reply_loss
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN
from jax_refusal.runtime import collect
from jax_refusal.runtime import generate as generation
from jax_refusal.runtime.batching import Prompts, pack, prefix_tokens
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.pairs import pack_pairs, paired_stream
from jax_refusal.sites import Capture
from jax_refusal.study import passes
from jax_refusal.study.sweep import Sweep
from tests.edits.common import D, L, ablation_by_hand, addition_by_hand, random
from tests.tolerances import INVARIANCE, MEANS, assert_close, largest

NEW_TOKENS, SLOTS = 6, 64
TEXTS = ["Say river", "Name some kinds of bread, and again", "Hide the train", "Why is it so?"]
REPLIES = [[7, 9, 30], [11], [5, 300, 8, 8, 41], [12, 13]]

EDITS: dict[str, Edit] = {
    "transform": jr.chain(ablation_by_hand(), addition_by_hand()),
    "rank 3": jr.ablate(random(3, D, seed=4), L),
    "affine": jr.affine(random(D, seed=3), L, target=0.3, coefficient=-0.1),
    "chain": jr.chain(jr.ablate(random(D, seed=1), L), jr.add(3 * random(D), L, layer=2)),
    "prompt": jr.only(jr.add(3 * random(D, seed=2), L, layer=1), "prompt"),
    "reply": jr.only(jr.add(3 * random(D, seed=2), L, layer=1), "reply"),
    "post_instruction": jr.only(jr.ablate(random(D, seed=1), L), "post_instruction"),
    "transform at replies": jr.only(addition_by_hand(), "reply"),
}


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> Prompts:
    prompts = Prompts.encoded(chat, TEXTS)
    assert prompts.prefix and prompts.positions > 1
    return prompts


@jax.jit
def whole_pass(
    model: Transformer, ids: jax.Array, count: jax.Array, kinds: jax.Array, edit: Edit
) -> tuple[jax.Array, jax.Array]:  # logits [T, V], and what enters each layer [L, T, D]
    slots = jnp.arange(SLOTS)[None]
    real = (slots < count).astype(jnp.int32)
    tokens = Tokens(ids=ids[None], positions=slots, segments=real, kinds=kinds[None])
    out = model(tokens, edit, capture=Capture(sites=("resid_pre",), slots=slots))
    return model.unembed(out.x)[0], out.captured["resid_pre"][:, 0]


def alone(
    model: Transformer, prompts: Prompts, prompt: list[int], reply: list[int], edit: Edit
) -> tuple[np.ndarray, np.ndarray]:
    """`whole_pass` of a prompt and its reply, without what it is padded with."""
    P, count = prompts.positions, len(prompt) + len(reply)
    kinds = [INSTRUCTION] * (len(prompt) - P) + [POST_INSTRUCTION] * P + [REPLY] * len(reply)
    ids, of = np.zeros((2, SLOTS), np.int32)
    ids[:count], of[:count] = [*prompt, *reply], kinds
    logits, stream = whole_pass(model, ids, np.int32(count), of, edit)
    return np.asarray(logits)[:count], np.asarray(stream)[:, :count]


def greedy(model: Transformer, prompts: Prompts, prompt: list[int], edit: Edit) -> list[int]:
    reply: list[int] = []
    for _ in range(NEW_TOKENS):
        logits, _ = alone(model, prompts, prompt, reply, edit)
        reply.append(int(logits[-1].argmax()))
    return reply


OPTIONS: dict[str, Any] = {"stop_ids": (), "max_new_tokens": NEW_TOKENS, "batch_size": 2}


@pytest.mark.parametrize("name", EDITS)
def test_replies(name: str, model: Transformer, prompts: Prompts) -> None:
    """Token by token as by whole forward passes."""
    found = generate(model, prompts, EDITS[name], **OPTIONS)
    expected = [greedy(model, prompts, ids, EDITS[name]) for ids in prompts.ids]
    assert found == expected
    assert found != generate(model, prompts, jr.identity(L, D), **OPTIONS), "it changes no reply"


@pytest.mark.parametrize("scan", [False, True])
def test_replies_under_all_edits_at_once(
    scan: bool, model: Transformer, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job whose rows take turns; by a scan over layers too, as accelerators step."""
    if scan:
        monkeypatch.setattr(generation, "driver", lambda model: SCAN)
    row_edit = [i % len(EDITS) for i in range(2 * len(EDITS))]
    many = Prompts([prompts.ids[i % 4] for i in row_edit], prompts.prefix, prompts.positions)
    found = generate(model, many, jr.rows(*EDITS.values()), row_edit=row_edit, **OPTIONS)
    for ids, which, reply in zip(many.ids, row_edit, found, strict=True):
        assert reply == greedy(model, prompts, ids, list(EDITS.values())[which]), which


def test_replies_on_a_mesh(tiny_dir: Path, model: Transformer, prompts: Prompts) -> None:
    sharded, many = jr.load_model(str(tiny_dir), mesh=jr.make_mesh(2, 2)), jr.rows(*EDITS.values())
    for row_edit in ([0, 4, 2, 7], [5, 3, 1, 6]):
        found = generate(sharded, prompts, many, row_edit=row_edit, **OPTIONS)
        for ids, which, reply in zip(prompts.ids, row_edit, found, strict=True):
            assert reply == greedy(model, prompts, ids, list(EDITS.values())[which]), which


@pytest.mark.parametrize("name", EDITS)
def test_packed_prompts(name: str, model: Transformer, prompts: Prompts) -> None:
    """Last-token logits and mean activations."""
    each = [alone(model, prompts, ids, [], EDITS[name]) for ids in prompts.ids]
    packed = collect.last_logits(model, prompts, EDITS[name], row_tokens=48)
    assert_close(packed, np.stack([logits[-1] for logits, _ in each]), INVARIANCE)
    means, _ = collect.mean_activations(model, prompts, EDITS[name], row_tokens=48)
    expected = np.mean([stream[:, -prompts.positions :] for _, stream in each], 0).swapaxes(0, 1)
    assert_close(means, expected, MEANS)


@pytest.mark.parametrize("name", EDITS)
def test_loss(name: str, model: Transformer, prompts: Prompts) -> None:
    """Nats of each reply; an edit of replies alone shows from a reply's second token on."""
    loss = reply_loss(model, prompts, REPLIES, EDITS[name], rows=2, row_tokens=48)
    expected = []
    for ids, reply in zip(prompts.ids, REPLIES, strict=True):
        logits, _ = alone(model, prompts, ids, reply, EDITS[name])
        nats = -jax.nn.log_softmax(logits[len(ids) - 1 : -1])
        expected.append(float(sum(nats[i, token] for i, token in enumerate(reply))))
    assert_close(loss.sums, expected, INVARIANCE)
    plain = reply_loss(model, prompts, REPLIES, jr.identity(L, D), rows=2, row_tokens=48)
    changed = np.abs(loss.sums - plain.sums) > 10 * INVARIANCE * largest(plain.sums)
    assert changed[[0, 2, 3]].all() and changed[1] == ("repl" not in name)


def test_passes_over_candidates(model: Transformer, prompts: Prompts) -> None:
    """All edits are candidates of one forward, each with its own prefix."""
    scorer = Sweep(model, np.ones((1, L, D)), prompts, prompts, [3], row_tokens=48)
    (rows,) = scorer.harmful
    (batch,) = pack(prompts, row_tokens=48)
    edit = jr.rows(*EDITS.values())

    @jax.jit
    def last(model: Transformer, rows: passes.Rows, edit: Edit) -> jax.Array:
        streams = passes._tiled(passes.embedded(model, rows), len(EDITS))
        return passes._last_logits(model, streams, rows, edit, len(EDITS))

    found = np.asarray(last(model, rows, edit))  # [C, Y, X, V]
    for candidate, own in enumerate(EDITS.values()):
        for place in np.argwhere(batch.valid):
            ids = prompts.ids[batch.prompt[tuple(place)]]
            logits, _ = alone(model, prompts, ids, [], own)
            assert_close(found[(candidate, *place)], logits[-1], INVARIANCE)


def test_training_pairs(model: Transformer, prompts: Prompts) -> None:
    """Rows that are run with edits of several kinds, behind the prefix under each."""
    pairs = [
        [(ids[prompts.prefix :], reply)] for ids, reply in zip(prompts.ids, REPLIES, strict=True)
    ]
    which, own = np.array([3, 0, 5, 7]), list(EDITS.values())
    batch, prefix = pack_pairs(pairs, prompts, 48), prefix_tokens(prompts, 1)
    capture = Capture(sites=("resid_pre",), slots=jnp.zeros((4, 1), jnp.int32))
    out = jax.jit(paired_stream)(
        model, jr.rows(*own), prefix, batch, row_edit=which, capture=capture
    )
    for row, ((_, reply),) in enumerate(pairs):
        logits, stream = alone(model, prompts, prompts.ids[row], reply, own[which[row]])
        found = model.unembed(out.x[row : row + 1])[0, : len(logits) - prompts.prefix]
        assert_close(found, logits[prompts.prefix :], INVARIANCE)
        kept = out.captured["resid_pre"][:, row, 0]
        assert_close(kept, stream[:, prompts.prefix], INVARIANCE)


def test_a_gradient_with_respect_to_ones_own_params(model: Transformer) -> None:
    ids, kinds = np.arange(SLOTS), np.full(SLOTS, REPLY)

    def value(edit: Edit) -> jax.Array:
        return whole_pass(model, ids, np.int32(SLOTS), kinds, edit)[0][-1, 3]

    transform = addition_by_hand()
    own = jax.grad(lambda params: value(dataclasses.replace(transform, params=params)))
    by_add = jax.grad(lambda vector: value(jr.add(vector, L, layer=1)))
    vector = transform.params["vector"]
    params = {"vector": vector, "layer": jnp.float32(1)}  # a gradient is of floats
    assert largest(own(params)["vector"]) > 0
    assert_close(own(params)["vector"], by_add(vector), INVARIANCE)
