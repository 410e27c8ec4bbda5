"""Edits: properties of the arithmetic at a site, and of the model under them.

Letters: B batch row, T token, D residual width, L layers, S residual sites, R edit rows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.interventions import SITES, Edit, Intervention, take, unit_vector
from jax_refusal.models.cache import Tokens
from jax_refusal.models.transformer import Output, Transformer
from tests.tolerances import GRADIENT, INVARIANCE, ROUNDING, assert_close, largest
from tests.xla import FULLY_OPTIMISED

L, D = 4, 64  # of the tiny model
B, T = 3, 12
ARRIVALS = [(layer, site) for layer in range(L) for site in SITES]  # in the order of the stream


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def at(edit: Edit, layer: int, site: str, x: jax.Array) -> jax.Array:
    """The edit at one layer and site, outside of a model."""
    scanned = jax.tree.map(lambda leaf: leaf[layer], edit.scanned(L))
    return edit.at_site(scanned, site, x)


@jax.jit
def run(model: Transformer, ids: jax.Array, edit: Edit) -> Output:
    """The stream, and what arrives at every site before its edit."""
    everywhere = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    return model(Tokens.padded(ids), edit, keep=everywhere, sites=SITES)


@pytest.fixture(scope="module")
def ids() -> jax.Array:  # [B, T]
    return jnp.asarray(np.random.default_rng(1).integers(409, size=(B, T)))


def three_edits() -> list[Intervention]:
    """Nothing, an ablation, an addition."""
    addition = jr.add(3 * random(D, seed=2), L, layer=1, coefficient=-1.0)
    return [jr.identity(L, D), jr.ablate(random(D, seed=1), L), addition]


def assert_same(one: Any, other: Any) -> None:
    """Pytrees of equal arrays."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Identity

NOTHING: dict[str, Callable[[], Intervention]] = {
    "identity": lambda: jr.identity(L, D),
    "ablate": lambda: jr.ablate(random(D), L, strength=0.0),
    "add": lambda: jr.add(random(D), L, layer=0, coefficient=0.0),
    "elsewhere": lambda: jr.add(random(D), L, layer=1),
    "rows": lambda: jr.repeat(jr.identity(L, D), B),
}


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NOTHING)
def test_identity_is_exact(name: str, dtype: Any) -> None:
    """Not a bit changes: not of -0.0, infinities, NaNs, subnormals, or numbers that would round."""
    odd = [-0.0, 0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, 1e-7, 6e4, 1 / 3]
    x = jnp.asarray(random(B, T, D)).at[:, ::2, : len(odd)].set(jnp.array(odd)[None, None])
    x = x.astype(dtype)
    compiled = jax.jit(at, static_argnums=(1, 2), compiler_options=FULLY_OPTIMISED)
    for call in (at, compiled):
        np.testing.assert_array_equal(bits(call(NOTHING[name](), 0, "resid_pre", x)), bits(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_exact_in_the_model(dtype: str, tiny_dir: Path, ids: jax.Array) -> None:
    """The same streams, to the bit, as without any arithmetic at the sites."""
    model = jr.load_model(str(tiny_dir), dtype)
    untouched = jr.Transform(function=lambda params, site, layer, x: x, params=())
    one, other = run(model, ids, jr.identity(L, D)), run(model, ids, untouched)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


# Ablation


def test_ablation_by_hand() -> None:
    """x = (3, 4) without its component along (0, 2) is (3, 0)."""
    edit = jr.ablate(np.array([0.0, 2.0]), L)
    np.testing.assert_array_equal(at(edit, 1, "attn_out", jnp.array([[[3.0, 4.0]]])), [[[3.0, 0]]])


@pytest.mark.parametrize(("layer", "site"), ARRIVALS)
def test_ablation(layer: int, site: str) -> None:
    """Nothing is left along the direction, the rest stays, and a second time changes nothing."""
    direction, x = random(D, seed=1), jnp.asarray(100 * random(B, T, D))
    edit, unit = jr.ablate(direction, L), np.float64(unit_vector(direction))
    once, x64 = at(edit, layer, site, x), np.float64(x)
    assert largest(np.float64(once) @ unit) <= ROUNDING * largest(np.linalg.norm(x64, axis=-1))
    assert_close(once, x64 - (x64 @ unit)[..., None] * unit, ROUNDING, "by hand")
    assert_close(at(edit, layer, site, once), once, ROUNDING, "twice")
    assert_close(at(jr.ablate(-7 * direction, L), layer, site, x), once, ROUNDING, "any length")


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
def test_ablation_strength(strength: float) -> None:
    """`strength` of the component goes; twice of it is a reflection."""
    direction, x = random(D, seed=1), random(B, T, D)
    unit = np.float64(unit_vector(direction))
    out = at(jr.ablate(direction, L, strength=strength), 0, "mlp_out", jnp.asarray(x))
    assert_close(out, x - strength * (x @ unit)[..., None] * unit, ROUNDING)
    if strength == 2:
        assert_close(jnp.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), ROUNDING)


def test_ablation_sites() -> None:
    x, edit = jnp.asarray(random(B, T, D)), jr.ablate(random(D), L, sites=("attn_out",))
    changed = [s for layer, s in ARRIVALS if not np.array_equal(at(edit, layer, s, x), x)]
    assert changed == ["attn_out"] * L


def test_ablation_in_the_model(model: Transformer, ids: jax.Array) -> None:
    """No block reads the direction or leaves it in the stream, though each would write it."""
    direction = random(D, seed=1)
    unit = np.float64(unit_vector(direction))
    out = run(model, ids, jr.ablate(direction, L))
    along = {site: np.float64(kept) @ unit for site, kept in out.kept.items()}  # [L, B, T]
    limit = 10 * ROUNDING * largest(jnp.linalg.norm(out.x, axis=-1))
    assert largest(along["resid_pre"][1:]) <= limit
    assert largest(np.float64(out.x) @ unit) <= limit
    for layer, site in ARRIVALS:
        if site != "resid_pre" or layer == 0:
            assert largest(along[site][layer]) > 100 * limit, f"layer {layer} has none at {site}"


# Addition


@pytest.mark.parametrize("coefficient", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("layer", range(L))
def test_addition_by_hand(
    layer: int, coefficient: float, model: Transformer, ids: jax.Array
) -> None:
    """The layers before, plus the vector, through the layers from there on."""
    vector = random(D, seed=2)

    @jax.jit
    def by_hand(model, ids, vector, layer):
        tokens, nothing, end = Tokens.padded(ids), jr.identity(L, D), jnp.int32(L)
        x = model.stream(model.embedded(ids), tokens, nothing, span=(jnp.int32(0), layer)).x
        return model.stream(x + vector[None, None], tokens, nothing, span=(layer, end)).x

    edit = jr.add(vector, L, layer=layer, coefficient=coefficient)
    expected = by_hand(model, ids, coefficient * jnp.asarray(vector), jnp.int32(layer))
    assert_close(run(model, ids, edit).x, expected, INVARIANCE)


@pytest.mark.parametrize(("layer", "site"), ARRIVALS)
def test_addition_is_at_one_place(
    layer: int, site: str, model: Transformer, ids: jax.Array
) -> None:
    """What arrives before it is the same to the bit, what arrives after it is not."""
    vector = random(D, seed=2)
    edit = jr.add(vector, L, layer=layer, site=site)
    edited, base = run(model, ids, edit), run(model, ids, jr.identity(L, D))
    place = ARRIVALS.index((layer, site))
    for i, (other_layer, other_site) in enumerate(ARRIVALS):
        same = np.array_equal(
            edited.kept[other_site][other_layer], base.kept[other_site][other_layer]
        )
        assert same == (i <= place), f"at layer {other_layer}, {other_site}"
    x = jnp.asarray(random(B, T, D))
    for other in ARRIVALS:
        expected = x + vector[None, None] if other == (layer, site) else x
        np.testing.assert_array_equal(at(edit, *other, x), expected)


# Rows


def test_rows_equal_singles(model: Transformer, ids: jax.Array) -> None:
    """One batch with another edit on every row, against one batch for each edit."""
    together = run(model, ids, jr.rows(*three_edits()))
    for row, edit in enumerate(three_edits()):
        alone = run(model, ids[row : row + 1], edit)
        assert_close(together.x[row], alone.x[0], INVARIANCE, f"row {row}")
        for site in SITES:
            assert_close(together.kept[site][:, row], alone.kept[site][:, 0], INVARIANCE, site)


def test_repeat_and_take() -> None:
    a, b, c = three_edits()
    assert_same(jr.repeat(jr.rows(a, b), 2), jr.rows(a, a, b, b))
    assert_same(take(jr.rows(a, b, c), np.array([2, 0, 2])), jr.rows(c, a, c))
    assert take(a, np.array([0, 1, 2])) is a
    assert_same(jr.rows(jr.rows(a, b), c), jr.rows(a, b, c))


# Transformations of JAX


def test_vmap(model: Transformer, ids: jax.Array) -> None:
    """Over edits, over the direction of one, and over the layer of one."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *three_edits())
    mapped = jax.vmap(lambda edit: run(model, ids, edit).x)(stacked)
    for x, edit in zip(mapped, three_edits(), strict=True):
        assert_close(x, run(model, ids, edit).x, INVARIANCE)
    directions = random(5, D)
    many = jax.vmap(lambda d: jr.ablate(d, L))(jnp.asarray(directions))
    for i, direction in enumerate(directions):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        jax.tree.map(lambda x, y: assert_close(x, y, ROUNDING), one, jr.ablate(direction, L))
    many = jax.vmap(lambda layer: jr.add(directions[0], L, layer=layer))(jnp.arange(L))
    for layer in range(L):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], many)
        assert_same(one, jr.add(directions[0], L, layer=layer))


@pytest.mark.parametrize("make", [jr.ablate, partial(jr.add, layer=1)], ids=["ablate", "add"])
def test_gradient(make: Callable[..., Intervention], model: Transformer, ids: jax.Array) -> None:
    """With respect to the direction, against central differences."""
    direction, tangent = jnp.asarray(random(D, seed=1)), random(D, seed=3)
    weights = jnp.asarray(random(B, T, D, seed=4))

    @jax.jit
    def value(direction: jax.Array) -> jax.Array:
        return jnp.sum(weights * run(model, ids, make(direction, L)).x)

    step = 1e-2
    difference = value(direction + step * tangent) - value(direction - step * tangent)
    slope = jax.grad(value)(direction) @ tangent
    assert abs(slope) > 1
    assert_close(slope, difference / (2 * step), GRADIENT)


# Transform


def ablate_by_hand(params: jax.Array, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
    unit = params / jnp.linalg.norm(params)
    return x - jnp.einsum("btd,d->bt", x, unit)[..., None] * unit[None, None]


def add_by_hand(params: dict, site: str, layer: jax.Array, x: jax.Array) -> jax.Array:
    here = (layer == params["layer"]) & (site == "resid_pre")
    return jnp.where(here, x + params["vector"][None, None], x)


def test_transform_equals_the_intervention(model: Transformer, ids: jax.Array) -> None:
    direction = random(D, seed=1)
    transform = jr.Transform(function=ablate_by_hand, params=jnp.asarray(direction))
    expected = run(model, ids, jr.ablate(direction, L))
    jax.tree.map(lambda x, y: assert_close(x, y, INVARIANCE), run(model, ids, transform), expected)
    for layer in range(L):
        params = {"layer": jnp.int32(layer), "vector": jnp.asarray(direction)}
        transform = jr.Transform(function=add_by_hand, params=params)
        expected = run(model, ids, jr.add(direction, L, layer=layer))
        assert_close(run(model, ids, transform).x, expected.x, INVARIANCE)


# Traces


def many_edits() -> list[Intervention]:
    """Edits of one row: 7 directions x L layers x 3 coefficients, and ablations of all kinds."""
    edits = [jr.identity(L, D)]
    for direction in random(7, D):
        for layer in range(L):
            edits += [jr.add(direction, L, layer=layer, coefficient=c) for c in (-1, 0.5, 1)]
        edits += [jr.ablate(direction, L, strength=s) for s in (0, 1, 1.5)]
    edits += [jr.add(random(D), L, layer=jnp.int32(2), site=s) for s in SITES]
    return edits + [jr.ablate(jnp.asarray(random(D)), L, sites=(s,)) for s in SITES]


def test_one_trace(model: Transformer, ids: jax.Array) -> None:
    traces = []

    @jax.jit
    def forward(model: Transformer, ids: jax.Array, edit: Edit) -> jax.Array:
        traces.append(edit)
        return model(Tokens.padded(ids), edit).x

    for edit in many_edits():
        forward(model, ids, edit)
    assert len(traces) == 1
    for scale in (1.0, 2.0):
        params = scale * jnp.asarray(random(D))
        forward(model, ids, jr.Transform(function=ablate_by_hand, params=params))
    assert len(traces) == 2


def test_one_trace_of_every_stage(
    model: Transformer, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the library compiles again for another edit, temperature or number of tokens."""
    passes = []
    stream = Transformer.stream

    def counted(*args: Any, **options: Any) -> Output:
        passes.append(args)
        return stream(*args, **options)

    monkeypatch.setattr(Transformer, "stream", counted)
    texts = ["Bake some bread", "Hide the car"]
    first: int | None = None
    for i, edit in enumerate(many_edits()[::20]):
        jr.logits(model, np.array([[1, 2, 3]]), edit=edit)
        jr.mean_activations(model, chat, texts, edit=edit)
        jr.generate(model, chat, texts, edit, 2 + i, temperature=0.1 * i, seed=i)
        first = len(passes) if first is None else first
    assert first
    assert len(passes) == first


# Errors

NAN, ZERO = np.full(D, np.nan), np.zeros(D)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jr.ablate(ZERO, L), "norm 0.0"),
        (lambda: jr.ablate(NAN, L), "finite"),
        (lambda: jr.ablate(np.full(D, np.inf), L), "finite"),
        (lambda: jr.ablate(np.ones((1, D)), L), r"shape given is \(1, 64\)"),
        (lambda: jr.ablate(np.float32(1), L), r"shape given is \(\)"),
        (lambda: jr.ablate(np.ones(D), L, sites=("resid_post",)), "resid_post.*resid_pre"),
        (lambda: jr.add(NAN, L, layer=0), "finite"),
        (lambda: jr.add(np.ones((D, 1)), L, layer=0), r"shape given is \(64, 1\)"),
        (lambda: jr.add(np.ones(D), L, layer=L), r"layer=4 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=-1), r"layer=-1 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=0, site="mlp"), "mlp.*mlp_out"),
        (lambda: jr.rows(), "at least one edit"),
    ],
)
def test_errors(make: Callable[[], Intervention], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_edit_of_another_model(model: Transformer, ids: jax.Array) -> None:
    with pytest.raises(ValueError, match="made for 5 layers and the model has 4"):
        run(model, ids, jr.identity(L + 1, D))
    for width in (1, D + 1):
        with pytest.raises(ValueError, match=f"width {width} and the batch has 3 of width 64"):
            run(model, ids, jr.ablate(np.ones(width), L))
    with pytest.raises(ValueError, match="2 rows"):
        run(model, ids, jr.repeat(jr.identity(L, D), 2))
