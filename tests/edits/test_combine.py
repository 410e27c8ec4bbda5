"""Edits that are combined: one after the other, at some tokens only, as rows; and one's own.

Letters: B batch row, T token, D residual width, L layers, R edit rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.edits import Edit, num_rows, take
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Output, Transformer
from tests.edits.common import (
    KINDS,
    SITES,
    B,
    D,
    L,
    T,
    ablate_by_hand,
    ablation_by_hand,
    add_by_hand,
    addition_by_hand,
    assert_same,
    at,
    random,
    run,
    three_edits,
)
from tests.tolerances import INVARIANCE, ROUNDING, assert_close


def of_every_kind() -> dict[str, Edit]:
    """Edits of one row; whose structure differs, all of them."""
    _, ablation, addition = three_edits()
    affine = jr.affine(random(D, seed=3), L, target=0.3, coefficient=-0.1)
    return {
        "addition": addition,
        "rank 3": jr.ablate(random(3, D, seed=4), L),
        "affine": affine,
        "affine of rank 2": jr.affine(random(2, D, seed=5), L, target=random(D, seed=6)),
        "gated": jr.only(ablation, "reply"),
        "gated affine": jr.only(affine, ("reply", "post_instruction")),
        "chain": jr.chain(ablation, addition),
        "transform": ablation_by_hand(),
        "gated transform": jr.only(addition_by_hand(), "prompt"),
        "chain of both": jr.chain(addition_by_hand(), affine, ablation_by_hand()),
    }


# One after the other


def test_a_chain_by_hand() -> None:
    """(3, 4) without (0, 1) is (3, 0); with (1, 1) it is (4, 1). The other way round (4, 0)."""
    ablation, addition = jr.ablate(np.array([0.0, 1]), L), jr.add(np.ones(2), L, layer=1)
    x = jnp.array([[[3.0, 4.0]]])
    for edits, there, elsewhere in (
        ((ablation, addition), (4, 1), (3, 0)),
        ((addition, ablation), (4, 0), (3, 0)),
    ):
        np.testing.assert_array_equal(at(jr.chain(*edits), 1, "resid_pre", x), [[there]])
        np.testing.assert_array_equal(at(jr.chain(*edits), 0, "resid_pre", x), [[elsewhere]])


def test_a_chain_is_flat() -> None:
    a, b, c = three_edits()
    assert jr.chain(a) is a
    assert_same(jr.chain(jr.chain(a, b), c), jr.chain(a, jr.chain(b, c)))


def test_a_chain_in_the_model(model: Transformer, ids: jax.Array) -> None:
    """Ablation everywhere and an addition behind it, at one layer: as one function does it."""
    direction, vector = random(D, seed=1), 3 * random(D, seed=2)

    def both(params: Any, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
        return add_by_hand(params, site, layer, ablate_by_hand(params["out"], site, layer, x))

    params = {"out": jnp.asarray(direction), "layer": jnp.int32(2), "vector": jnp.asarray(vector)}
    chained = jr.chain(jr.ablate(direction, L), jr.add(vector, L, layer=2))
    expected = run(model, ids, jr.Transform(function=both, params=params))
    jax.tree.map(lambda x, y: assert_close(x, y, INVARIANCE), run(model, ids, chained), expected)


# At some tokens only

GATES = {
    "prompt": [1, 1, 0, 1],
    "post_instruction": [0, 1, 0, 0],
    "reply": [0, 0, 1, 0],
    "marked": [0, 0, 0, 1],
    ("reply", "post_instruction"): [0, 1, 1, 0],
}


@pytest.mark.parametrize("tokens", GATES)
@pytest.mark.parametrize("name", [name for name in of_every_kind() if "gated" not in name])
def test_only_at_some_tokens(name: str, tokens: Any) -> None:
    """There it is the edit, elsewhere nothing to the bit; a gate of a gate is where both are."""
    x, edit = jnp.asarray(random(B, T, D)), of_every_kind()[name]
    kinds = np.random.default_rng(0).integers(4, size=(B, T))
    here = np.array(GATES[tokens], bool)[kinds][..., None]
    found = at(jr.only(edit, tokens), 1, "resid_pre", x, kinds)
    assert_close(found, np.where(here, at(edit, 1, "resid_pre", x), x), ROUNDING)
    np.testing.assert_array_equal(np.where(here, 0, found), np.where(here, 0, x))
    twice = jr.only(jr.only(edit, tokens), ("post_instruction", "marked"))
    both = np.isin(kinds, (1, 3))[..., None] & here
    expected = np.where(both, at(edit, 1, "resid_pre", x), x)
    assert_close(at(twice, 1, "resid_pre", x, kinds), expected, ROUNDING)


def test_marked_tokens(model: Transformer, ids: jax.Array) -> None:
    """The user's own choice of tokens, in the model: each gets the vector, no other does."""
    marked, vector = np.random.default_rng(0).random((B, T)) < 0.4, 3 * random(D, seed=2)

    @jax.jit
    def by_hand(model: Transformer, ids: jax.Array) -> jax.Array:
        x = model.embedded(ids) + marked[..., None] * vector
        return model.unembed(model.stream(x, Tokens.padded(ids), jr.identity(L, D)).x)

    edit = jr.add(vector, L, layer=0)
    found = jr.logits(model, ids, None, jr.only(edit, "marked"), marked=marked)
    assert_close(found, by_hand(model, ids), INVARIANCE)
    of_the_prompt = jr.logits(model, ids, None, jr.only(edit, "prompt"), marked=marked)
    assert_close(of_the_prompt, jr.logits(model, ids, None, edit), INVARIANCE)


# Rows


def test_rows_equal_singles(model: Transformer, ids: jax.Array) -> None:
    """One batch with another edit on every row, against one batch for each edit."""
    together = run(model, ids, jr.rows(*three_edits()))
    for row, edit in enumerate(three_edits()):
        alone = run(model, ids[row : row + 1], edit)
        assert_close(together.x[row], alone.x[0], INVARIANCE, f"row {row}")
        for site in SITES:
            assert_close(
                together.captured[site][:, row], alone.captured[site][:, 0], INVARIANCE, site
            )


def test_rows_of_every_kind_equal_singles(model: Transformer, ids: jax.Array) -> None:
    """Ranks, offsets, gates, chains and one's own functions in one batch, some of several rows."""
    edits = of_every_kind()
    names = [*edits, "addition", "affine", "transform", "gated transform"]
    mixed = jr.rows(*edits.values(), jr.rows(*(edits[name] for name in names[-4:])))
    assert num_rows(mixed) == len(names)
    many = jnp.tile(ids[:1], (len(names), 1))
    together = run(model, many, mixed, jnp.tile(KINDS[:1], (len(names), 1)))
    order = np.array([3, 0, 13, 7])
    some = run(model, many[:4], take(mixed, order), KINDS[[0] * 4])
    twice = run(model, many[:8], jr.repeat(take(mixed, order), 2), KINDS[[0] * 8])
    for row, name in enumerate(names):
        alone = run(model, ids[:1], edits[name], KINDS[:1])
        assert_close(together.x[row], alone.x[0], INVARIANCE, name)
        for found in np.flatnonzero(order == row):
            assert_close(some.x[found], alone.x[0], INVARIANCE, name)
            assert_close(twice.x[2 * found], alone.x[0], INVARIANCE, name)
            assert_close(twice.x[2 * found + 1], alone.x[0], INVARIANCE, name)


def test_repeat_and_take() -> None:
    a, b, c = three_edits()
    assert_same(jr.repeat(jr.rows(a, b), 2), jr.rows(a, a, b, b))
    assert_same(take(jr.rows(a, b, c), np.array([2, 0, 2])), jr.rows(c, a, c))
    assert take(a, np.array([0, 1, 2])) is a
    assert_same(jr.rows(jr.rows(a, b), c), jr.rows(a, b, c))


@pytest.mark.parametrize("name", of_every_kind())
def test_repeat_and_take_of_every_kind(name: str) -> None:
    edit = of_every_kind()[name]
    assert num_rows(edit) == 1 and num_rows(jr.repeat(edit, 3)) == 3
    x = jnp.asarray(random(B, T, D))
    expected = at(edit, 1, "resid_pre", x, KINDS)
    for other in (
        jr.rows(edit),
        jr.rows(edit, edit, edit),
        jr.repeat(edit, 3),
        take(jr.repeat(edit, 4), np.array([3, 0, 0])),
        jr.chain(edit, jr.repeat(jr.identity(L, D), 3)),
    ):
        assert_same(at(other, 1, "resid_pre", x, KINDS), expected)


def test_vmap_over_edits_of_every_kind(model: Transformer, ids: jax.Array) -> None:
    for name, edit in of_every_kind().items():
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), edit)
        mapped = jax.vmap(lambda edit: run(model, ids, edit).x)(stacked)
        assert_close(mapped[1], run(model, ids, edit).x, INVARIANCE, name)


# One's own


def test_transform_equals_the_edit(model: Transformer, ids: jax.Array) -> None:
    _, ablation, _ = three_edits()
    found, expected = run(model, ids, ablation_by_hand()), run(model, ids, ablation)
    jax.tree.map(lambda x, y: assert_close(x, y, INVARIANCE), found, expected)
    direction = random(D, seed=1)
    for layer in range(L):
        params = {"layer": jnp.int32(layer), "vector": jnp.asarray(direction)}
        transform = jr.Transform(function=add_by_hand, params=params)
        expected = run(model, ids, jr.add(direction, L, layer=layer))
        assert_close(run(model, ids, transform).x, expected.x, INVARIANCE)


# Traces


def many_edits() -> list[Edit]:
    """Edits of one row: 7 directions x L layers x 3 coefficients, and ablations of all kinds."""
    edits: list[Edit] = [jr.identity(L, D)]
    for direction in random(7, D):
        for layer in range(L):
            edits += [jr.add(direction, L, layer=layer, coefficient=c) for c in (-1, 0.5, 1)]
        edits += [jr.ablate(direction, L, strength=s) for s in (0, 1, 1.5)]
    edits += [jr.add(random(D), L, layer=jnp.int32(2), site=s) for s in SITES]
    return edits + [jr.ablate(jnp.asarray(random(D)), L, sites=(s,)) for s in SITES]


def of_one_structure() -> dict[str, list[Edit]]:
    """Edits that differ in their numbers alone."""
    plain = three_edits()
    return {
        "gates": [jr.only(edit, tokens) for edit in plain for tokens in GATES],
        "rank 3": [jr.ablate(random(3, D, seed=s), L, strength=s, sites=SITES[s:]) for s in (0, 1)],
        "affine": [jr.affine(random(D), L, target=t, layer=2) for t in (0, 1.5, random(D))],
        "chains": [jr.chain(plain[1], edit) for edit in plain],
    }


def test_one_trace(model: Transformer, ids: jax.Array) -> None:
    traces = []

    @jax.jit
    def forward(model: Transformer, ids: jax.Array, edit: Edit) -> jax.Array:
        traces.append(edit)
        return model(Tokens.padded(ids, marked=ids > 9), edit).x

    for edits in (many_edits(), *of_one_structure().values()):
        before = len(traces)
        for edit in edits:
            forward(model, ids, edit)
        assert len(traces) == before + 1
    for scale in (1.0, 2.0):
        params = scale * jnp.asarray(random(D))
        transform = jr.Transform(function=ablate_by_hand, params=params)
        for tokens in GATES:
            forward(model, ids, jr.only(transform, tokens))
    assert len(traces) == before + 2


@pytest.mark.parametrize("name", ["plain", "gates"])
def test_one_trace_of_every_stage(
    name: str, model: Transformer, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the library compiles again for another edit, temperature or number of tokens."""
    passes = []
    stream = Transformer.stream

    def counted(*args: Any, **options: Any) -> Output:
        passes.append(args)
        return stream(*args, **options)

    monkeypatch.setattr(Transformer, "stream", counted)
    texts = ["Bake some bread", "Hide the car"]
    edits = {"plain": many_edits()[::20], "gates": of_one_structure()["gates"][::2]}
    first: int | None = None
    for i, edit in enumerate(edits[name]):
        jr.logits(model, np.array([[1, 2, 3]]), None, edit, marked=np.array([[True, False, i > 1]]))
        jr.mean_activations(model, chat, texts, edit=edit)
        jr.generate(model, chat, texts, edit, 2 + i, temperature=0.1 * i, seed=i)
        first = len(passes) if first is None else first
    assert first
    assert len(passes) == first


# Errors


class Unknown:
    """An edit of another library."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jr.rows(), "at least one edit"),
        (lambda: jr.chain(), "at least one edit"),
        (lambda: jr.only(jr.identity(L, D), "answer"), r"\['answer'\]; allowed.*'reply'"),
        (lambda: jr.only(jr.identity(L, D), ()), "allowed are some of"),
        (lambda: jr.rows(jr.identity(L, D), jr.identity(3, D)), "3 layers of width 64 and 4"),
        (
            lambda: jr.chain(*(jr.repeat(jr.identity(L, D), n) for n in (2, 1, 3))),
            r"Edits of \[2, 3\] rows cannot be chained",
        ),
        (lambda: jr.rows(jr.identity(L, D), Unknown()), "Unknown is not an edit"),
    ],
)
def test_errors(make: Callable[[], Edit], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def test_what_a_gate_and_a_function_need(model: Transformer, ids: jax.Array) -> None:
    gated = jr.only(jr.identity(L, D), "reply")
    for edit in (gated, jr.only(ablation_by_hand(), "reply"), jr.chain(gated, gated)):
        with pytest.raises(ValueError, match="do not say theirs: give `Tokens"):
            jr.logits(model, ids, None, edit)
    for function in (lambda p, site, layer, x: x[:, :1], lambda p, site, layer, x: x > 0):
        with pytest.raises(ValueError, match=r"given float32 \(3, 12, 64\) at resid_pre and retur"):
            jr.logits(model, ids, None, jr.Transform(function=function, params=()))
    with pytest.raises(ValueError, match="2 rows and the batch has 3"):
        jr.logits(model, ids, None, jr.repeat(ablation_by_hand(), 2))
