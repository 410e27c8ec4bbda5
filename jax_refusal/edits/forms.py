"""Edits of the residual stream, as data.

Letters: B batch row, T token, D residual width, L layers, S residual sites, R edit rows (1 or B),
M rank.

The paper's edits (Arditi et al. 2024, section 2.4) and affine ones (Marshall et al. 2024) are one
gated map, applied at every site of every layer, with U [M, D] orthonormal:

    x <- x - remove U^T (U x - offset) + add vector

What changes between calls (directions, layer, site, coefficient, row, kind of token) is an array,
so no edit ever recompiles the model. Structure is the rank, whether there is an offset or a token
gate at all, and how many edits are chained: what is not there costs nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Axis S: where the residual stream is read or edited. All but the first are contributions to it,
# that is, behind a post-norm where the family has one; `per_layer_out` is that of Gemma 4's inputs
# for each layer, and other families never ask for it.
SITES = ("resid_pre", "attn_out", "mlp_out", "per_layer_out")

# What a token gate can tell apart. A prompt's template head is part of its instruction. MARKED are
# tokens of a prompt that the user chose.
INSTRUCTION, POST_INSTRUCTION, REPLY, MARKED = range(4)
KINDS = {
    "prompt": (INSTRUCTION, POST_INSTRUCTION, MARKED),
    "post_instruction": (POST_INSTRUCTION,),
    "reply": (REPLY,),
    "marked": (MARKED,),
}


class Edit(Protocol):
    """What the decoder asks of an edit; `Affine`, `Transform` and `Chain` provide it."""

    def scanned(self, num_layers: int) -> Any:
        """A pytree whose leaves lead with L: what the scan over layers hands to `at_site`."""
        ...

    def at_site(
        self,
        layer: Any,  # this layer's slice of `scanned`
        site: str,
        x: jax.Array,  # [B, T, D]
        kinds: jax.Array | None,  # [B, T] int32 as above; None where nobody knows
    ) -> jax.Array:  # [B, T, D]
        """Edits x at one site.

        What the last layer writes may come for the tokens alone that are asked for, or for none.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """x <- x - remove U^T (U x - offset) + add vector, gated by layer, site, row and kind of token;
    all float32."""

    unit: jax.Array  # [R, M, D] U, orthonormal rows; rows of zeros fill up a smaller rank
    vector: jax.Array  # [R, D] vector put in, in activation units
    remove: jax.Array  # [L, S, R] how far the coordinates along U go to `offset`: 0 stay, 1 all
    add: jax.Array  # [L, S, R] multiple of `vector` put in
    offset: jax.Array | None = None  # [R, M] in activation units; None is zero
    tokens: jax.Array | None = None  # [R, 4] factor of both gates by kind of token; None is 1

    def scanned(self, num_layers: int) -> tuple[jax.Array, jax.Array]:
        if self.remove.shape[0] != num_layers:
            raise ValueError(
                f"The edit was made for {self.remove.shape[0]} layers and the model has "
                f"{num_layers}. Build it with num_layers={num_layers}."
            )
        return self.remove, self.add

    def at_site(
        self,
        layer: tuple[jax.Array, jax.Array],
        site: str,
        x: jax.Array,  # [B, T, D]
        kinds: jax.Array | None,  # [B, T]
    ) -> jax.Array:
        rows, rank, width = self.unit.shape
        if rows not in (1, x.shape[0]) or width != x.shape[-1]:
            raise ValueError(
                f"The edit has {rows} rows of width {width} and the batch has {x.shape[0]} of "
                f"width {x.shape[-1]}: an edit needs one row, or one for every batch row."
            )
        remove, add = (gate[SITES.index(site)][:, None, None] for gate in layer)  # [R, 1, 1]
        if self.tokens is not None:
            here = _by_kind(self.tokens, kinds, x.shape[0])[..., None]  # [B, T, 1]
            remove, add = remove * here, add * here
        x32 = x.astype(jnp.float32)
        along = _along(x32, self.unit)  # [B, T, M]
        if self.offset is not None:
            along -= self.offset[:, None]
        if rank == 1:
            edited = x32 - remove * along * self.unit + add * self.vector[:, None]
        else:
            taken = jnp.matmul(along, self.unit, precision="highest")
            edited = x32 - remove * taken + add * self.vector[:, None]
        # The select makes identity bit-exact: `x + 0.0` makes 0.0 of -0.0, and 0 * inf is NaN.
        return jnp.where((remove != 0) | (add != 0), edited.astype(x.dtype), x)


def _along(x: jax.Array, unit: jax.Array) -> jax.Array:  # [B, T, D], [R, M, D] -> [B, T, M]
    if unit.shape[1] == 1:  # a sum of products fuses with what is done to x
        return jnp.sum(x * unit, -1, keepdims=True)
    return jnp.matmul(x, unit.swapaxes(1, 2), precision="highest")


def _by_kind(gates: jax.Array, kinds: jax.Array | None, rows: int) -> jax.Array:
    """gates [R, 4] of the tokens [B, T] of each kind."""
    if kinds is None:
        raise ValueError(
            "The edit is gated by the kind of token, and these tokens do not say theirs: give "
            "`Tokens.kinds` [B, T], or `marked` to `logits`."
        )
    return jnp.take_along_axis(jnp.broadcast_to(gates, (rows, len(gates[0]))), kinds, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """A researcher's own edit: a pure function at the same places, in the same scan.

    `function(params, site, layer, x) -> x` with site one of `SITES`, layer an int32 scalar and
    x [B, T, D], whose shape and dtype it keeps; `params` is any pytree. Another function
    recompiles, other params do not. It serves all rows alike and has to treat each token alone:
    prompts are packed, and what the last layer writes comes for the tokens only whose logits are
    wanted, and where none are, for none (T = 0).
    """

    function: Callable[[Any, str, jax.Array, jax.Array], jax.Array] = dataclasses.field(
        metadata={"static": True}
    )
    params: Any
    rows: jax.Array | None = None  # [R] bool, the batch rows that it acts on; None is all
    tokens: jax.Array | None = None  # [R, 4] whether it acts, by kind of token; None is always

    def scanned(self, num_layers: int) -> jax.Array:
        return jnp.arange(num_layers)

    def at_site(
        self,
        layer: jax.Array,
        site: str,
        x: jax.Array,  # [B, T, D]
        kinds: jax.Array | None,  # [B, T]
    ) -> jax.Array:
        edited = self.function(self.params, site, layer, x)
        if edited.shape != x.shape or edited.dtype != x.dtype:
            raise ValueError(
                f"A Transform's function was given {x.dtype} {x.shape} at {site} and returned "
                f"{edited.dtype} {edited.shape}; shape and dtype have to stay."
            )
        if self.rows is not None and len(self.rows) not in (1, x.shape[0]):
            raise ValueError(
                f"The edit has {len(self.rows)} rows and the batch has {x.shape[0]}: an edit needs "
                "one row, or one for every batch row."
            )
        if self.rows is not None:
            edited = jnp.where(self.rows[:, None, None], edited, x)
        if self.tokens is not None:
            acts = _by_kind(self.tokens, kinds, x.shape[0]) != 0
            edited = jnp.where(acts[..., None], edited, x)
        return edited


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Edits that are applied one after the other at every site; see `chain`."""

    links: tuple[Affine | Transform, ...]

    def scanned(self, num_layers: int) -> tuple[Any, ...]:
        return tuple(link.scanned(num_layers) for link in self.links)

    def at_site(
        self, layer: tuple[Any, ...], site: str, x: jax.Array, kinds: jax.Array | None
    ) -> jax.Array:
        for link, own in zip(self.links, layer, strict=True):
            x = link.at_site(own, site, x, kinds)
        return x


def apply(
    edit: Edit,
    x: jax.Array,  # [B, T, D]
    kinds: jax.Array | None = None,  # [B, T]
    *,
    num_layers: int,
    layer: int | jax.Array,
    site: str,
) -> jax.Array:  # [B, T, D]
    """The edit at one site of one layer, outside of a model."""
    scanned = jax.tree.map(lambda leaf: leaf[layer], edit.scanned(num_layers))
    return edit.at_site(scanned, site, x, kinds)
