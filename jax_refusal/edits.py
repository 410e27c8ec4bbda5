"""Edits of the residual stream, as data.

Letters: B batch row, T token, D residual width, L layers, S residual sites, R edit rows (1 or B).

The paper's edits (Arditi et al. 2024, section 2.4) are one gated affine map, applied at every site
of every layer:  x <- x - remove <x, unit> unit + add vector.  What changes between calls
(direction, layer, site, coefficient, row) is an array, so no edit ever recompiles the model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Axis S: where the residual stream is read or edited. `attn_out` and `mlp_out` are the residual
# contributions, that is, after a post-norm where the family has one.
SITES = ("resid_pre", "attn_out", "mlp_out", "per_layer_out")


class Edit(Protocol):
    """What the decoder asks of an edit; `Intervention` and `Transform` provide it."""

    def scanned(self, num_layers: int) -> Any:
        """A pytree whose leaves lead with L: what the scan over layers hands to `at_site`."""
        ...

    def at_site(self, layer: Any, site: str, x: jax.Array) -> jax.Array:
        """Edits x [B, T, D] at one site; `layer` is this layer's slice of `scanned`.

        What the last layer writes may come for the tokens alone that are asked for, or for none.
        """
        ...



@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
    """x <- x - remove <x, unit> unit + add vector, gated per layer, site and row; all float32."""

    unit: jax.Array  # [R, D] unit direction taken out
    vector: jax.Array  # [R, D] vector put in, in activation units
    remove: jax.Array  # [L, S, R] share of the component along `unit` that goes: 0 none, 1 all
    add: jax.Array  # [L, S, R] multiple of `vector` put in

    def scanned(self, num_layers: int) -> tuple[jax.Array, jax.Array]:
        if self.remove.shape[0] != num_layers:
            raise ValueError(
                f"The edit was made for {self.remove.shape[0]} layers and the model has "
                f"{num_layers}. Build it with num_layers={num_layers}."
            )
        return self.remove, self.add

    def at_site(
        self, layer: tuple[jax.Array, jax.Array], site: str, x: jax.Array
    ) -> jax.Array:  # x [B, T, D]
        rows, width = self.unit.shape
        if rows not in (1, x.shape[0]) or width != x.shape[-1]:
            raise ValueError(
                f"The edit has {rows} rows of width {width} and the batch has {x.shape[0]} of "
                f"width {x.shape[-1]}: an edit needs one row, or one for every batch row."
            )
        remove, add = (gate[SITES.index(site)][:, None, None] for gate in layer)  # [R, 1, 1]
        x32, unit = x.astype(jnp.float32), self.unit[:, None]
        along = jnp.sum(x32 * unit, -1, keepdims=True)
        edited = x32 - remove * along * unit + add * self.vector[:, None]
        # The select makes identity bit-exact: `x + 0.0` makes 0.0 of -0.0, and 0 * inf is NaN.
        return jnp.where((remove != 0) | (add != 0), edited.astype(x.dtype), x)



@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """A researcher's own edit: a pure function at the same places, in the same scan.

    `function(params, site, layer, x) -> x` with site one of `SITES`, layer an int32 scalar and
    x [B, T, D]; `params` is any pytree. Another function recompiles, other params do not. Where a
    layer writes a second time behind its MLP (Gemma 4 with per-layer inputs), the function is
    called once more as at `mlp_out`. It has to treat each token alone: what the last layer writes
    comes for the tokens only whose logits are wanted, and where none are, for none (T = 0).
    """

    function: Callable[[Any, str, jax.Array, jax.Array], jax.Array] = dataclasses.field(
        metadata={"static": True}
    )
    params: Any

    def scanned(self, num_layers: int) -> jax.Array:
        return jnp.arange(num_layers)

    def at_site(self, layer: jax.Array, site: str, x: jax.Array) -> jax.Array:  # x [B, T, D]
        return self.function(self.params, site, layer, x)



def identity(num_layers: int, width: int) -> Intervention:
    """The edit that changes no bit of any activation, in any dtype."""
    none, gates = jnp.zeros((1, width)), jnp.zeros((num_layers, len(SITES), 1))
    return Intervention(unit=none, vector=none, remove=gates, add=gates)


def ablate(
    direction: jax.Array | np.ndarray,  # [D], any length
    num_layers: int,
    *,
    sites: Sequence[str] = SITES,
    strength: float = 1.0,
) -> Intervention:
    """Directional ablation (paper eq. 4): takes the component along `direction` out everywhere.

    Raises ValueError for a direction that is zero, not finite, or not a vector.
    """
    unit = unit_vector(direction)
    gates = jnp.tile(_site_gates(sites)[None, :, None], (num_layers, 1, 1))
    return Intervention(
        unit=unit[None],
        vector=jnp.zeros_like(unit[None]),
        remove=jnp.float32(strength) * gates,
        add=jnp.zeros_like(gates),
    )


def add(
    vector: jax.Array | np.ndarray,  # [D], in activation units
    num_layers: int,
    *,
    layer: int | jax.Array,
    site: str = "resid_pre",
    coefficient: float | jax.Array = 1.0,
) -> Intervention:
    """Activation addition (paper eq. 3): puts `coefficient * vector` in at one layer, all tokens.

    +1 induces refusal and -1 bypasses it when `vector` is the difference of means.
    """
    vector = _vector(vector)
    if isinstance(layer, int | np.integer) and not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} is not in 0..{num_layers - 1}.")
    here = jnp.arange(num_layers)[:, None, None] == layer
    gates = jnp.where(here, _site_gates([site])[None, :, None], 0.0)
    return Intervention(
        unit=jnp.zeros_like(vector[None]),
        vector=vector[None],
        remove=jnp.zeros_like(gates),
        add=jnp.asarray(coefficient, jnp.float32) * gates,
    )


def rows(*edits: Intervention) -> Intervention:
    """One edit per batch row, in order: R of the result is the sum of the edits' R."""
    if not edits:
        raise ValueError("rows() needs at least one edit.")
    return Intervention(
        unit=jnp.concatenate([e.unit for e in edits]),
        vector=jnp.concatenate([e.vector for e in edits]),
        remove=jnp.concatenate([e.remove for e in edits], axis=-1),
        add=jnp.concatenate([e.add for e in edits], axis=-1),
    )


def repeat(edit: Intervention, times: int) -> Intervention:
    """Every row of the edit for `times` consecutive batch rows: R becomes R * times."""
    return Intervention(
        unit=jnp.repeat(edit.unit, times, 0),
        vector=jnp.repeat(edit.vector, times, 0),
        remove=jnp.repeat(edit.remove, times, -1),
        add=jnp.repeat(edit.add, times, -1),
    )


def take(edit: Intervention, rows: jax.Array | np.ndarray) -> Intervention:
    """The edit's rows at the given indices; an edit of one row (R = 1) serves every row as is."""
    if edit.unit.shape[0] == 1:
        return edit
    return Intervention(
        unit=edit.unit[rows],
        vector=edit.vector[rows],
        remove=edit.remove[..., rows],
        add=edit.add[..., rows],
    )


def unit_vector(direction: jax.Array | np.ndarray) -> jax.Array:
    """direction [D] scaled to length 1, float32; ValueError where that is not possible."""
    direction = _vector(direction)
    norm = jnp.linalg.norm(direction)
    if not isinstance(norm, Tracer) and not (np.isfinite(norm) and norm > 0):
        raise ValueError(
            f"The direction has norm {float(norm)}; a finite, non-zero vector is needed. "
            "A zero difference of means says that both instruction sets look alike there."
        )
    return direction / norm


def _vector(vector: jax.Array | np.ndarray) -> jax.Array:
    vector = jnp.asarray(vector, jnp.float32)
    if vector.ndim != 1:
        raise ValueError(f"A vector [D] is needed and the shape given is {vector.shape}.")
    if not isinstance(vector, Tracer) and not np.isfinite(vector).all():
        raise ValueError("The vector holds NaN or infinity; a finite one is needed.")
    return vector


def _site_gates(sites: Sequence[str]) -> jax.Array:  # [S]
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise ValueError(f"Unknown sites {unknown}; allowed are {list(SITES)}.")
    return jnp.array([float(site in sites) for site in SITES], jnp.float32)
