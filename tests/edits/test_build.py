"""Edits that are built: properties of the arithmetic at a site, and of the model under them.

Letters: B batch row, T token, D residual width, L layers, S residual sites, R edit rows, M rank.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.edits import Affine, Edit, EditError, unit_vector
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import Scan
from tests.edits.common import (
    ARRIVALS,
    KINDS,
    B,
    D,
    L,
    T,
    assert_same,
    at,
    random,
    run,
    three_edits,
)
from tests.tolerances import GRADIENT, INVARIANCE, ROUNDING, assert_close, largest
from tests.xla import FULLY_OPTIMISED

# Identity

NOTHING: dict[str, Callable[[], Edit]] = {
    "identity": lambda: jr.identity(L, D),
    "ablate": lambda: jr.ablate(random(D), L, strength=0.0),
    "add": lambda: jr.add(random(D), L, layer=0, coefficient=0.0),
    "elsewhere": lambda: jr.add(random(D), L, layer=1),
    "rank 3": lambda: jr.ablate(random(3, D), L, strength=0.0),
    "affine elsewhere": lambda: jr.affine(random(D), L, target=1e30, layer=1),
    "another token": lambda: jr.only(jr.ablate(random(D), L), "marked"),
    "chain": lambda: jr.chain(jr.identity(L, D), jr.add(random(D), L, layer=2)),
    "transform": lambda: jr.only(jr.Transform(function=lambda *a: a[-1] + 1, params=()), "marked"),
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
        found = call(NOTHING[name](), 0, "resid_pre", x, KINDS)
        np.testing.assert_array_equal(bits(found), bits(x))


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
    along = {site: np.float64(kept) @ unit for site, kept in out.captured.items()}  # [L, B, T]
    limit = 10 * ROUNDING * largest(jnp.linalg.norm(out.x, axis=-1))
    assert largest(along["resid_pre"][1:]) <= limit
    assert largest(np.float64(out.x) @ unit) <= limit
    for layer, site in ARRIVALS:
        if site != "resid_pre" or layer == 0:
            assert largest(along[site][layer]) > 100 * limit, f"layer {layer} has none at {site}"


# Ablation of a space


def test_ablation_of_a_space_by_hand() -> None:
    """x = (3, 4, 5) without what lies in the plane of (0, 2, 0) and (0, 1, 1) is (3, 0, 0)."""
    edit = jr.ablate(np.array([[0.0, 2, 0], [0, 1, 1]]), L)
    found = at(edit, 1, "attn_out", jnp.array([[[3.0, 4.0, 5.0]]]))
    assert_close(found, [[[3.0, 0, 0]]], ROUNDING)


@pytest.mark.parametrize("rank", [2, 5])
def test_ablation_of_a_space(rank: int) -> None:
    """Nothing is left along any direction, the rest stays, a second time changes nothing, and any
    directions of the same span do the same."""
    directions, x = random(rank, D, seed=1), jnp.asarray(100 * random(B, T, D))
    edit, size = jr.ablate(directions, L), largest(jnp.linalg.norm(x, axis=-1))
    once = at(edit, 2, "mlp_out", x)
    assert largest(np.float64(once) @ directions.T) <= 10 * ROUNDING * size
    span = np.linalg.qr(np.float64(directions).T)[0]
    assert_close(once, np.float64(x) @ (np.eye(D) - span @ span.T), ROUNDING, "by hand")
    assert_close(at(edit, 2, "mlp_out", once), once, ROUNDING, "twice")
    mixed = random(rank, rank, seed=2) @ directions
    assert_close(at(jr.ablate(mixed, L), 2, "mlp_out", x), once, 10 * ROUNDING, "same span")


def test_a_space_of_one_direction_is_the_direction() -> None:
    assert_same(jr.ablate(random(1, D), L), jr.ablate(random(D), L))


# Affine edits


def test_affine_by_hand() -> None:
    """The coordinate of x = (3, 4) along (0, 2) becomes the target, and more by its multiples."""
    x, direction = jnp.array([[[3.0, 4.0]]]), np.array([0.0, 2.0])
    for target, coefficient, expected in ((1.5, 0, 1.5), ([7, 1.5], 0, 1.5), (1.5, -1, -0.5)):
        edit = jr.affine(direction, L, target=np.array(target), coefficient=coefficient)
        np.testing.assert_array_equal(at(edit, 1, "resid_pre", x), [[[3, expected]]])
        np.testing.assert_array_equal(at(edit, 1, "attn_out", x), x)
    once = jr.affine(direction, L, target=1.5, layer=1, sites=("attn_out",))
    changed = [place for place in ARRIVALS if not np.array_equal(at(once, *place, x), x)]
    assert changed == [(1, "attn_out")]


@pytest.mark.parametrize("rank", [1, 3])
def test_affine(rank: int) -> None:
    """x - proj(x) + proj(target) + coefficient * direction, and the same a second time."""
    directions, mean, x = random(rank, D, seed=1), random(D, seed=2), random(B, T, D)
    edit = jr.affine(directions, L, target=mean, coefficient=0.7)
    once = at(edit, 0, "resid_pre", jnp.asarray(x))
    span = np.linalg.qr(np.float64(directions).T)[0]
    expected = x - (x - mean) @ span @ span.T + 0.7 * directions.sum(0)
    assert_close(once, expected, ROUNDING, "by hand")
    assert_close(at(edit, 0, "resid_pre", once), once, ROUNDING, "twice")
    plain = jr.affine(directions, L, target=np.zeros(D))
    ablated = at(jr.ablate(directions, L), 0, "resid_pre", jnp.asarray(x))
    assert_close(at(plain, 0, "resid_pre", jnp.asarray(x)), ablated, ROUNDING, "target 0")


SEVERAL: dict[str, Callable[[Any], Affine]] = {
    "ablate": lambda direction: jr.ablate(direction, L),
    "add": lambda direction: jr.add(direction, L, layer=1),
    "affine": lambda direction: jr.affine(direction, L, target=0.5, coefficient=0.2),
    "rank 2": lambda direction: jr.ablate(jnp.stack([direction, random(D, seed=7)]), L),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_bfloat16_is_rounded_once(name: str) -> None:
    """The arithmetic is in float32 whatever the stream's dtype."""
    edit, x = SEVERAL[name](random(D)), jnp.asarray(random(B, T, D)).astype(jnp.bfloat16)
    found = at(edit, 1, "resid_pre", x)
    assert found.dtype == jnp.bfloat16
    exact = at(edit, 1, "resid_pre", x.astype(jnp.float32))
    np.testing.assert_array_equal(bits(found), bits(exact.astype(jnp.bfloat16)))


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
        x = model.stream(model.embedded(ids), tokens, nothing, drive=Scan((jnp.int32(0), layer))).x
        return model.stream(x + vector[None, None], tokens, nothing, drive=Scan((layer, end))).x

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
            edited.captured[other_site][other_layer], base.captured[other_site][other_layer]
        )
        assert same == (i <= place), f"at layer {other_layer}, {other_site}"
    x = jnp.asarray(random(B, T, D))
    for other in ARRIVALS:
        expected = x + vector[None, None] if other == (layer, site) else x
        np.testing.assert_array_equal(at(edit, *other, x), expected)


# Transformations of JAX


def test_vmap(model: Transformer, ids: jax.Array) -> None:
    """Over edits, over the direction of one, and over the layer of one."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *three_edits())
    mapped = jax.vmap(lambda edit: run(model, ids, edit).x)(stacked)
    for x, edit in zip(mapped, three_edits(), strict=True):
        assert_close(x, run(model, ids, edit).x, INVARIANCE)
    directions = random(5, D)
    for make in SEVERAL.values():
        many = jax.vmap(make)(jnp.asarray(directions))
        for i, direction in enumerate(directions):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
            jax.tree.map(lambda x, y: assert_close(x, y, ROUNDING), one, make(direction))
    many = jax.vmap(lambda layer: jr.add(directions[0], L, layer=layer))(jnp.arange(L))
    for layer in range(L):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], many)
        assert_same(one, jr.add(directions[0], L, layer=layer))


@pytest.mark.parametrize("name", SEVERAL)
def test_gradient(name: str, model: Transformer, ids: jax.Array) -> None:
    """With respect to the direction, against central differences."""
    direction, tangent = jnp.asarray(random(D, seed=1)), random(D, seed=3)
    weights = jnp.asarray(random(B, T, D, seed=4))

    @jax.jit
    def value(direction: jax.Array) -> jax.Array:
        return jnp.sum(weights * run(model, ids, SEVERAL[name](direction)).x)

    step = 1e-2
    difference = value(direction + step * tangent) - value(direction - step * tangent)
    slope = jax.grad(value)(direction) @ tangent
    assert abs(slope) > 1
    assert_close(slope, difference / (2 * step), GRADIENT)


# Errors

NAN, ZERO = np.full(D, np.nan), np.zeros(D)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jr.ablate(ZERO, L), "norm 0.0"),
        (lambda: jr.ablate(NAN, L), "finite"),
        (lambda: jr.ablate(np.full(D, np.inf), L), "finite"),
        (lambda: jr.ablate(np.ones((1, 1, D)), L), r"shape given is \(1, 1, 64\)"),
        (lambda: jr.ablate(np.float32(1), L), r"shape given is \(\)"),
        (lambda: jr.ablate(np.ones(D), L, sites=("resid_post",)), "resid_post.*resid_pre"),
        (lambda: jr.add(NAN, L, layer=0), "finite"),
        (lambda: jr.add(np.ones((D, 1)), L, layer=0), r"shape given is \(64, 1\)"),
        (lambda: jr.add(np.ones(D), L, layer=L), r"layer=4 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=-1), r"layer=-1 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=0, site="mlp"), "mlp.*mlp_out"),
        (lambda: jr.ablate(np.ones((2, D)), L), r"2 directions of width 64 depend.*\[1\.0, 0\.0\]"),
        (lambda: jr.ablate(random(D + 1, D), L), "65 directions of width 64 depend"),
        (lambda: jr.ablate(np.stack([random(D), ZERO]), L), "norm 0.0"),
        (lambda: jr.affine(random(2, D), L, target=0.0), "one number and there are 2 directions"),
        (lambda: jr.affine(random(D), L, target=NAN), "finite"),
        (lambda: jr.affine(random(D), L, target=1.0, layer=L), r"layer=4 is not in 0\.\.3"),
        (lambda: jr.add(ZERO, L, layer=0), "The vector is zero"),
        (lambda: jr.add(np.full(D, 1e39), L, layer=0), "in float32.*at most 3.4e"),
        (lambda: jr.add(np.ones(D), L, layer=0, coefficient=np.nan), "coefficient is nan"),
        (lambda: jr.add(np.ones(D), L, layer=0, coefficient=1e39), "coefficient is inf"),
        (lambda: jr.add(np.full(D, 1e20), L, layer=0, coefficient=1e20), "coefficient . vector"),
        (lambda: jr.add(np.ones(D), L, layer=1.5), r"layer=1.5 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=jnp.int32(L)), r"layer=4 is not in 0\.\.3"),
        (lambda: jr.add(np.ones(D), L, layer=np.nan), r"layer=nan is not in 0\.\.3"),
        (lambda: jr.ablate(np.ones(D), L, strength=np.inf), "strength is inf"),
        (lambda: jr.ablate(np.ones(D), L, sites=()), r"allowed are some of \['resid_pre'"),
        (lambda: jr.ablate(np.full(D, 1e30), L), "norm inf in float32"),
        (lambda: jr.affine(random(D), L, target=np.inf), "target is inf"),
        (lambda: jr.affine(random(D), L, target=0.0, coefficient=np.nan), "coefficient is nan"),
        (lambda: jr.affine(ZERO, L, target=0.0), "norm 0.0"),
    ],
)
def test_errors(make: Callable[[], Affine], said: str) -> None:
    with pytest.raises(EditError, match=said):
        make()


def test_an_edit_of_another_model(model: Transformer, ids: jax.Array) -> None:
    with pytest.raises(ValueError, match="made for 5 layers and the model has 4"):
        run(model, ids, jr.identity(L + 1, D))
    for width in (1, D + 1):
        with pytest.raises(ValueError, match=f"width {width} and the batch has 3 of width 64"):
            run(model, ids, jr.ablate(np.ones(width), L))
    with pytest.raises(ValueError, match="2 rows"):
        run(model, ids, jr.repeat(jr.identity(L, D), 2))
