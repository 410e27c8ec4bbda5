"""Replies where prompts outnumber the rows of a batch: each is the one it would be alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.edits import Edit, take
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN
from jax_refusal.runtime import decode
from jax_refusal.runtime import generate as generation
from jax_refusal.runtime.batching import Prompts, pools
from jax_refusal.runtime.generate import generate

NEW_TOKENS = 24  # as many as there are slots: the ring is as tight as can be
WORDS = "river stone bread cloud train music garden paper".split()
TEXTS = [
    *(f"Say {WORDS[i % 8]} {'again and ' * (i % 3)}{i}" for i in range(13)),
    "Repeat this: " + " ".join(WORDS * 4),  # does not fit the slots of the others
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Prompts with the edit of each, their greedy replies, and a token that ends some of these."""

    prompts: Prompts
    edits: Edit  # three rows
    row_edit: list[int]
    plain: list[list[int]]
    stop: int

    @property
    def expected(self) -> list[list[int]]:
        return [until(reply, self.stop) for reply in self.plain]

    @property
    def short(self) -> Prompts:
        """Without the last one, which does not fit the slots of the others."""
        return dataclasses.replace(self.prompts, ids=self.prompts.ids[:-1])


@pytest.fixture(scope="module")
def case(model: Transformer, chat: Chat) -> Case:
    direction, L = np.random.default_rng(0).normal(size=model.arch.width), model.arch.layers
    edits = jr.rows(
        jr.identity(L, model.arch.width),
        jr.ablate(direction, L),
        jr.add(direction, L, layer=1, coefficient=4.0),
    )
    prompts, row_edit = Prompts.encoded(chat, TEXTS), [i % 3 for i in range(len(TEXTS))]
    plain = whole_passes(model, prompts, edits, row_edit)

    def lengths(token: int) -> int:
        return len({len(until(reply, token)) for reply in plain})

    stop = max({token for reply in plain for token in reply}, key=lengths)
    assert lengths(stop) >= 4
    return Case(prompts, edits, row_edit, plain, stop)


def whole_passes(
    model: Transformer, prompts: Prompts, edits: Edit, row_edit: list[int]
) -> list[list[int]]:
    """Greedy replies by whole forward passes: no cache, no batch, no prefix."""
    slots, replies = max(map(len, prompts.ids)) + NEW_TOKENS, []
    for ids, which in zip(prompts.ids, row_edit, strict=True):
        edit, tokens = take(edits, np.array([which])), list(ids)
        for _ in range(NEW_TOKENS):
            row = np.zeros((1, slots), np.int32)
            row[0, : len(tokens)] = tokens
            logits = jr.logits(model, row, np.arange(slots)[None] < len(tokens), edit)
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        replies.append(tokens[len(ids) :])
    return replies


def until(reply: list[int], stop: int) -> list[int]:
    return reply[: reply.index(stop)] if stop in reply else reply


@pytest.mark.parametrize(
    ("batch_size", "scan", "at_once"), [(4, False, 32), (8, True, 32), (64, False, 4)]
)
def test_rows_take_in_the_prompts_that_wait(
    batch_size: int,
    scan: bool,
    at_once: int,
    model: Transformer,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer after layer, and by a scan as accelerators step; a whole batch prefilled in parts."""
    if scan:
        monkeypatch.setattr(generation, "driver", lambda model: SCAN)
    monkeypatch.setattr(generation, "AT_ONCE", at_once)
    found = generate(
        model,
        case.prompts,
        case.edits,
        row_edit=case.row_edit,
        stop_ids=(case.stop,),
        max_new_tokens=NEW_TOKENS,
        batch_size=batch_size,
    )
    assert found == case.expected


def test_an_edit_for_every_prompt(model: Transformer, case: Case) -> None:
    """More edits than rows: the prefix is run with each group's own."""
    each = take(case.edits, np.array(case.row_edit))
    options: Any = {"stop_ids": (), "max_new_tokens": 3, "batch_size": 4}
    assert generate(model, case.prompts, each, **options) == [reply[:3] for reply in case.plain]
    # What is donated is the job's own: the caller's arrays can be used again.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((model, each)))


def test_a_request_leaves_nothing_behind(model: Transformer, case: Case) -> None:
    """Were it NaN: rows of an edit that breaks the stream, and others after them."""
    L, width = model.arch.layers, model.arch.width
    sound, added = jr.identity(L, width), jr.add(np.ones(width), L, layer=0)
    broken = dataclasses.replace(added, vector=added.vector * jnp.nan)
    row_edit = [int(i % 3 != 0) for i in range(13)]  # every third one is sound, as in `plain`
    options: Any = {"stop_ids": (), "max_new_tokens": NEW_TOKENS, "batch_size": 2}
    found = generate(model, case.short, jr.rows(sound, broken), row_edit=row_edit, **options)
    assert found[::3] == case.plain[:13:3]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_shortest_replies(limit: int, model: Transformer, case: Case) -> None:
    edit = jr.identity(model.arch.layers, model.arch.width)
    options: Any = {"stop_ids": (), "batch_size": 2}
    short = dataclasses.replace(case.prompts, ids=case.prompts.ids[:13:3])
    found = generate(model, short, edit, max_new_tokens=limit, **options)
    assert found == [reply[:limit] for reply in case.plain[:13:3]]
    with pytest.raises(ValueError, match="max_new_tokens=0; a reply has at least 1"):
        generate(model, short, edit, max_new_tokens=0, **options)


def test_prompts_of_one_number_share_their_noise(model: Transformer, case: Case) -> None:
    twice = dataclasses.replace(case.prompts, ids=case.prompts.ids[:4] * 2)
    edit = jr.identity(model.arch.layers, model.arch.width)
    options: Any = {"stop_ids": (), "max_new_tokens": 8, "temperature": 1.0, "batch_size": 4}
    own = generate(model, twice, edit, **options)
    shared = generate(model, twice, edit, numbers=[0, 1, 2, 3] * 2, **options)
    assert own[:4] != own[4:]
    assert own[:4] == shared[:4] == shared[4:]


def test_no_row_waits_for_the_longest_reply(
    model: Transformer, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps taken, against the tokens that were needed and what whole batches would have taken."""
    steps, real = [0], decode.advance

    def advance(*args: Any) -> Any:
        rows = real(*args)
        steps[0] = int(rows.step)
        return rows

    monkeypatch.setattr(decode, "advance", advance)
    options: Any = {"stop_ids": (case.stop,), "max_new_tokens": NEW_TOKENS, "batch_size": 2}
    generate(model, case.short, case.edits, row_edit=case.row_edit[:-1], **options)
    lengths = [len(reply) for reply in case.expected[:-1]]
    needed = sum(min(length, NEW_TOKENS - 1) for length in lengths)
    by_batches = sum(max(lengths[i : i + 2]) for i in range(0, len(lengths), 2))
    assert needed / 2 <= steps[0] < needed / 2 + NEW_TOKENS
    assert steps[0] < by_batches


def test_on_a_mesh(checkpoint: Callable[..., Path], case: Case) -> None:
    """Four edits, so that their prefixes lie apart too; prefilled two at a time."""
    sharded = jr.load_model(str(checkpoint()), mesh=jr.make_mesh(2, 2))
    options: Any = {"stop_ids": (case.stop,), "max_new_tokens": NEW_TOKENS, "batch_size": 8}
    compiled = decode.advance._cache_size()
    four = jr.rows(case.edits, jr.identity(sharded.arch.layers, sharded.arch.width))
    which = [3 if i % 6 == 0 else edit for i, edit in enumerate(case.row_edit[:-1])]
    found = generate(sharded, case.short, four, row_edit=which, **options)
    assert found == case.expected[:-1]
    assert decode.advance._cache_size() == compiled + 1


def test_programs_serve_every_batch(model: Transformer, case: Case) -> None:
    """Another number of prompts, other edits, another limit within the capacity: nothing new."""
    some = dataclasses.replace(case.prompts, ids=case.prompts.ids[:12])
    options: Any = {"stop_ids": (3,), "batch_size": 4}
    generate(
        model, some, case.edits, row_edit=case.row_edit[:12], max_new_tokens=NEW_TOKENS, **options
    )
    compiled = [f._cache_size() for f in (decode.empty, decode.prefill, decode.advance)]
    other = dataclasses.replace(case.prompts, ids=case.prompts.ids[:8])
    generate(model, other, case.edits, row_edit=[2] * 8, max_new_tokens=NEW_TOKENS - 3, **options)
    assert [f._cache_size() for f in (decode.empty, decode.prefill, decode.advance)] == compiled


def test_which_edit_is_whose(model: Transformer, case: Case) -> None:
    options: Any = {"stop_ids": (), "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"3 rows for 14 prompts.*row_edit"):
        generate(model, case.prompts, case.edits, **options)
    for wrong in ([0] * 13, [0] * 13 + [3], [-1] + [0] * 13):
        with pytest.raises(ValueError, match=r"edit's rows 0\.\.2 for each of 14 prompts"):
            generate(model, case.prompts, case.edits, row_edit=wrong, **options)


@pytest.mark.parametrize("vocab", [512, 450, 7])
def test_the_next_token_is_the_first_of_the_largest(vocab: int) -> None:
    """In groups of 256, of 2, of 1; few values, so that rows have many ties."""
    logits = np.random.default_rng(0).integers(4, size=(40, vocab)).astype(np.float32)
    logits[0], logits[1, : vocab // 2] = -np.inf, -np.inf
    np.testing.assert_array_equal(decode.largest(jnp.asarray(logits)), logits.argmax(-1))


def test_pools_are_of_about_one_length() -> None:
    lengths = [3, 64, 65, 128, 129, 10, 1000]
    found = [pool.tolist() for pool in pools(lengths)]
    assert found == [[6], [4], [3, 2], [1, 5, 0]]
    assert pools([5])[0].tolist() == [0]
