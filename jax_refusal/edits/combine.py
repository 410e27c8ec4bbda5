"""Edits of several: one after the other, at some tokens only, and as the rows of one batch.

Letters: T token, D residual width, L layers, S residual sites, R edit rows, M rank.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain as concatenated
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.edits.build import identity
from jax_refusal.edits.forms import KINDS, Affine, Chain, Edit, Transform


def chain(*edits: Edit) -> Edit:
    """One after the other at every site: `chain(ablate(...), add(...))` puts in what it adds when
    the component has been taken out. Each has one row, or as many as those with more."""
    links = tuple(concatenated.from_iterable(map(_links, edits)))
    if not links:
        raise ValueError("chain() needs at least one edit.")
    several = sorted({num_rows(link) for link in links} - {1})
    if len(several) > 1:
        raise ValueError(
            f"Edits of {several} rows cannot be chained: each needs one row, or as many as the "
            "others."
        )
    return links[0] if len(links) == 1 else Chain(links)


def only(edit: Edit, tokens: str | Sequence[str]) -> Edit:
    """The edit at tokens of these kinds alone, named as in `KINDS`: "prompt", "reply",
    "post_instruction", "marked" (the user's own choice of prompt tokens), or several of them.

    An edit that is gated already acts where both gates let it.
    """
    names = [tokens] if isinstance(tokens, str) else list(tokens)
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise ValueError(f"Unknown kinds of token {unknown}; allowed are some of {list(KINDS)}.")
    chosen = {kind for name in names for kind in KINDS[name]}
    gate = jnp.array([[float(kind in chosen) for kind in range(4)]])  # [1, 4]

    def gated(link: Affine | Transform) -> Affine | Transform:
        old = jnp.ones((num_rows(link), 4)) if link.tokens is None else link.tokens
        return dataclasses.replace(link, tokens=old * gate)

    return chain(*map(gated, _links(edit)))


def num_rows(edit: Edit) -> int:
    """R: 1, or one for each row of the batches that the edit is for."""
    if isinstance(edit, Affine):
        return len(edit.unit)
    if isinstance(edit, Transform):
        return 1 if edit.rows is None else len(edit.rows)
    return max(map(num_rows, _links(edit)))


def take(edit: Edit, rows: jax.Array | np.ndarray) -> Edit:
    """The edit's rows at the given indices; an edit of one row (R = 1) serves every row as is."""
    return _with_rows(edit, lambda x, axis: x[rows] if axis == 0 else x[..., rows])


def repeat(edit: Edit, times: int) -> Edit:
    """Every row of the edit for `times` consecutive batch rows: R becomes R * times."""
    if num_rows(edit) == 1:
        return chain(*(_wide(link, times) for link in _links(edit)))
    return _with_rows(edit, lambda x, axis: jnp.repeat(x, times, axis))


def rows(*edits: Edit) -> Edit:
    """One edit per batch row, in order: R of the result is the sum of the edits' R.

    Smaller ranks are filled up. Of chains the first links are put together, then the second ones,
    and so on. A Transform is called on the whole batch, of which its own rows are edited.
    """
    if not edits:
        raise ValueError("rows() needs at least one edit.")
    sizes, joined = [num_rows(edit) for edit in edits], []
    if len(edits) == 1:
        return edits[0]
    for place in zip_longest(*map(_links, edits)):
        wide = [link and _wide(link, size) for link, size in zip(place, sizes, strict=True)]
        joined += [*_affine_rows(wide, sizes), *_transform_rows(wide, sizes)]
    return chain(*joined)


def _links(edit: Edit) -> tuple[Affine | Transform, ...]:
    if isinstance(edit, Chain):
        return edit.links
    if isinstance(edit, Affine | Transform):
        return (edit,)
    raise TypeError(
        f"{type(edit).__name__} is not an edit whose rows are known: Affine, Transform and Chain "
        "are, and a Transform holds any function of the stream."
    )


def _each(
    link: Affine | Transform, change: Callable[[jax.Array, int], jax.Array]
) -> Affine | Transform:
    """With `change(array, axis)` of every array that has an axis R."""
    last = ("remove", "add") if isinstance(link, Affine) else ()
    first = ("unit", "vector", "offset") if isinstance(link, Affine) else ("rows",)
    named = [(name, -1) for name in last] + [(name, 0) for name in (*first, "tokens")]
    arrays = [(name, getattr(link, name), axis) for name, axis in named]
    changed = {name: change(x, axis) for name, x, axis in arrays if x is not None}
    return dataclasses.replace(link, **changed)


def _with_rows(edit: Edit, change: Callable[[jax.Array, int], jax.Array]) -> Edit:
    """Changed are the links that have rows; the others serve every row as they are."""
    return chain(*(x if num_rows(x) == 1 else _each(x, change) for x in _links(edit)))


def _wide(link: Affine | Transform, size: int) -> Affine | Transform:
    """With `size` rows, where it has one."""
    if num_rows(link) == size:
        return link
    if isinstance(link, Transform) and link.rows is None:
        link = dataclasses.replace(link, rows=jnp.ones(1, bool))
    return _each(link, lambda x, axis: jnp.repeat(x, size, axis))


def _affine_rows(
    links: Sequence[Affine | Transform | None],  # one of each edit, with all its rows
    sizes: Sequence[int],
) -> list[Affine]:
    """The affine ones as one, which does nothing in the others' rows."""
    given = [link for link in links if isinstance(link, Affine)]
    if not given:
        return []
    shapes = sorted({(len(each.remove), each.unit.shape[-1]) for each in given})
    if len(shapes) > 1:
        raise ValueError(
            f"Edits for {' and '.join(f'{n} layers of width {d}' for n, d in shapes)} cannot be "
            "rows of one batch."
        )
    nothing, rank = identity(*shapes[0]), max(each.unit.shape[1] for each in given)
    offset, tokens = (any(getattr(e, n) is not None for e in given) for n in ("offset", "tokens"))

    def filled(link: Affine | Transform | None, size: int) -> Affine:
        edit = link if isinstance(link, Affine) else _wide(nothing, size)
        assert isinstance(edit, Affine)
        more = ((0, 0), (0, rank - edit.unit.shape[1]))
        if more[1][1]:
            edit = dataclasses.replace(
                edit,
                unit=jnp.pad(edit.unit, (*more, (0, 0))),
                offset=None if edit.offset is None else jnp.pad(edit.offset, more),
            )
        if offset and edit.offset is None:
            edit = dataclasses.replace(edit, offset=jnp.zeros((size, rank)))
        if tokens and edit.tokens is None:
            edit = dataclasses.replace(edit, tokens=jnp.ones((size, 4)))
        return edit

    every = [filled(link, size) for link, size in zip(links, sizes, strict=True)]

    def joined(name: str, axis: int = 0) -> Any:
        parts = [getattr(each, name) for each in every]
        return None if parts[0] is None else jnp.concatenate(parts, axis)

    first, last = ("unit", "vector", "offset", "tokens"), ("remove", "add")
    return [Affine(**{n: joined(n) for n in first}, **{n: joined(n, -1) for n in last})]


def _transform_rows(
    links: Sequence[Affine | Transform | None],  # one of each edit, with all its rows
    sizes: Sequence[int],
) -> list[Transform]:
    """Each Transform, acting on its own rows alone."""
    found = []
    for i, link in enumerate(links):
        if isinstance(link, Transform):
            around = (sum(sizes[:i]), sum(sizes[i + 1 :]))
            rows = jnp.pad(jnp.ones(sizes[i], bool) if link.rows is None else link.rows, around)
            tokens = None if link.tokens is None else jnp.pad(link.tokens, (around, (0, 0)))
            found.append(dataclasses.replace(link, rows=rows, tokens=tokens))
    return found
