"""What a layer knows beside its weights: the pass that it is part of, and its own place in it.

Letters: B batch row, T token, Q token that is asked for, C context slot, D residual width, W
rotated channels of a head, or width of a layer's own input.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jax_refusal.edits import SITES, Edit
from jax_refusal.models import ops, rope, spec
from jax_refusal.models.cache import Cache, Tokens, lengths, visible
from jax_refusal.models.recurrence import Runs
from jax_refusal.models.spec import Architecture
from jax_refusal.sharding import constrain
from jax_refusal.sites import Capture

Weights = Mapping[str, jax.Array]  # of one layer, by name
Angles = tuple[jax.Array, jax.Array]  # cos, sin [B, T, 1, W / 2]
Index = jax.Array | int  # data in a scan, static where all layers of a slot have the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What all layers of one pass share."""

    arch: Architecture
    tokens: Tokens
    allowed: jax.Array  # [B, T, C] bool, whether windows allow it or not
    distance: jax.Array  # [B, T, C] tokens
    angles: tuple[Angles, ...]  # of each of `arch.ropes`
    query_scale: jax.Array | None  # [B, T, 1, 1]
    few_rows: bool  # see `ops.linear`
    runs: Runs | None  # where a mixer is recurrent

    @property
    def recurrent(self) -> Runs:
        assert self.runs is not None
        return self.runs

    @classmethod
    def of(
        cls,
        arch: Architecture,
        tokens: Tokens,
        cache: Cache | None,  # that holds these tokens too
        prefix: Cache | None,
        few_rows: bool,
    ) -> "Pass":
        before = [part for part in (prefix, tokens if cache is None else cache) if part is not None]
        positions = jnp.concatenate([part.positions for part in before], 1)
        segments = jnp.concatenate([part.segments for part in before], 1)
        allowed, distance = visible(tokens, positions, segments)
        mixers = [each.mixer for each in arch.specs if isinstance(each.mixer, spec.Recurrent)]
        return cls(
            arch=arch,
            tokens=tokens,
            allowed=allowed,
            distance=distance,
            angles=_angles(arch, tokens),
            query_scale=_query_scale(arch, tokens.positions),
            few_rows=few_rows,
            runs=Runs.of(tokens, max(m.taps for m in mixers)) if mixers else None,
        )


def _angles(arch: Architecture, tokens: Tokens) -> tuple[Angles, ...]:
    by_length = any(each.by_length for each in arch.ropes)
    counted = lengths(tokens) if by_length else None
    turned = [s.mixer for s in arch.specs if isinstance(s.mixer, spec.Attention)]
    widths = {mixer.rope: mixer.rotary_width or mixer.head_width for mixer in turned}
    some = next(iter(widths.values()), 2)  # for what no layer turns by
    return tuple(
        rope.angles(tokens.positions, each, widths.get(i, some), counted)
        for i, each in enumerate(arch.ropes)
    )


def _query_scale(arch: Architecture, positions: jax.Array) -> jax.Array | None:
    """How much longer queries are far from the start, so that attention stays as sharp there."""
    at = positions[..., None, None]
    if arch.query_scale:
        times = at // arch.query_period
        return 1 + arch.query_scale * jnp.log1p(times.astype(jnp.float32))
    if arch.query_log:  # log-n attention: 1 up to so many tokens, then log(tokens) by its log
        log = jnp.log1p(at.astype(jnp.float32))
        return jnp.maximum(log / jnp.log(jnp.float32(arch.query_log)), 1.0)
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """One layer's view of the pass."""

    shared: Pass
    fields: Mapping[str, jax.Array]  # this layer's own of the mixer's, see `spec.Slot.varying`
    inputs: jax.Array | None  # [B, T, W] of the layer's own
    last: Callable[[jax.Array], jax.Array]  # [B, T, ...] -> [B, Q, ...], the tokens asked for

    def linear(self, x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
        return ops.linear(x, kernel, inputs, self.shared.few_rows)

    def normed(self, p: Weights, name: str, x: jax.Array) -> jax.Array:
        """x behind the norm of that name, where the layer has it."""
        return self.norm(x, p[name]) if name in p else x

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return ops.rms_norm(x, scale, self.shared.arch.norm_epsilon, self.shared.arch.norm)

    @property
    def own_input(self) -> jax.Array:  # [B, Q, W]
        assert self.inputs is not None
        return self.last(self.inputs)

    def angles(self, rope: Index) -> Angles:
        """Of one of `arch.ropes`, unless this layer has another."""
        rope = self.fields.get("rope", rope)
        if isinstance(rope, int):
            return self.shared.angles[rope]
        return jax.tree.map(lambda *each: jnp.stack(each)[rope], *self.shared.angles)

    def allowed(self, window: Index) -> jax.Array:  # [B, Q, C]
        """Which context slots the asked tokens attend to, in a window of so many tokens (0 is all)
        unless this layer has another."""
        window = self.fields.get("window", window)
        if isinstance(window, int) and not window:
            return self.last(self.shared.allowed)
        window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window)
        return self.last(self.shared.allowed & (self.shared.distance < window))


@dataclasses.dataclass(kw_only=True)
class Site:
    """`site(name, x)`: x as it goes on from a site of one layer, captured and edited."""

    edit: Edit
    layer: object  # this layer's slice of `edit.scanned`
    capture: Capture
    kinds: jax.Array | None  # [B, T] of the tokens
    last: Callable[[jax.Array], jax.Array]  # as `Context.last`
    captured: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return name in self.capture.sites

    def __call__(self, name: str, x: jax.Array) -> jax.Array:  # [B, T, ...]
        if self.wants(name):
            self.captured[name] = self.capture.take(x)
        if name not in SITES:
            return x
        kinds = self.kinds
        if kinds is not None and name != "resid_pre":  # what enters a layer comes whole
            kinds = self.last(kinds)
        edited = self.edit.at_site(self.layer, name, x, kinds)
        return constrain(edited, "batch", None, "embed")
