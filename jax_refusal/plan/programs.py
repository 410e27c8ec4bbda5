"""The compiled programs of a study, for devices that need not be there: weights and batches are
shapes on a mesh.

Letters: B batch row, T token, C candidates, X prompts in a row, P post-instruction tokens, N prefix
tokens, L layers, D residual width, V vocabulary, J requests prefilled at once.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_refusal import sharding
from jax_refusal.edits import identity, repeat
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN
from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture
from jax_refusal.runtime import collect, decode
from jax_refusal.runtime.batching import bucket
from jax_refusal.runtime.generate import PREFILLS
from jax_refusal.study import passes
from jax_refusal.study.passes import Rows, Streams
from jax_refusal.study.scores import refusal_score

CONDITIONS = 3  # edits of a run's completions: none, ablated, added


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the batches that a run would make: what its config says, and how long prompts are."""

    prompt_tokens: int = 64  # behind the shared prefix; a row holds one such prompt or several
    prefix_tokens: int = 8  # N
    positions: int = 5  # P
    row_tokens: int = 64
    batch_tokens: int = 2048  # for each part of the data axis
    batch_size: int = 64  # rows of replies
    max_new_tokens: int = 512
    refusal_tokens: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program: how to lower it, and what one run of it has to do."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    tokens: int  # that go through the layers in one run; of a loop, in one step
    logits: int  # tokens that go through the head
    context: int = 0  # tokens that each row reads from the cache
    rows: int = 0  # of the cache


def programs(arch: Architecture, mesh: Mesh, dtype: Any, sizes: Sizes) -> list[Program]:
    """What a run compiles, in the order in which it needs them."""
    make = Shapes(arch, mesh, dtype, sizes)
    data = mesh.shape["data"]
    B, T = max(1, sizes.batch_tokens // sizes.row_tokens) * data, sizes.row_tokens
    packed = partial(Program, tokens=B * T, logits=B)
    # As many candidates as make a batch of the rows of their prompts.
    C, Y = max(1, sizes.batch_tokens // sizes.row_tokens), data
    scored = partial(Program, tokens=C * Y * T, logits=C * Y)
    size = -(-sizes.batch_size // data) * data
    J, slots = -(-size // PREFILLS // data) * data, bucket(sizes.prompt_tokens)
    context = sizes.prefix_tokens + slots + sizes.max_new_tokens
    return [
        packed(name="means", lower=partial(make.means, B, T)),
        scored(name="kl", lower=partial(make.kl, C, Y, T)),
        scored(name="bypass", lower=partial(make.bypass, C, Y, T)),
        scored(name="induce", lower=partial(make.induce, C, Y, T)),
        Program(
            name="prefill",
            lower=partial(make.prefill, size, J, slots),
            tokens=J * slots,
            logits=J,
        ),
        Program(
            name="decode",
            lower=partial(make.advance, size, slots),
            tokens=size,
            logits=size,
            context=context,
            rows=size,
        ),
    ]


def abstract_model(arch: Architecture, mesh: Mesh, dtype: Any) -> Transformer:
    """The model without its weights: their shapes, where they would lie."""
    arrays = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, dtype, sharding=sharding.named(mesh, leaf.axes, leaf.shape)
        )
        for path, leaf in leaves(arch).items()
    }
    return Transformer(arch, arrays)


class Shapes:
    """Arguments of the programs, as shapes on the mesh."""

    def __init__(self, arch: Architecture, mesh: Mesh, dtype: Any, sizes: Sizes):
        self.arch, self.mesh, self.dtype, self.sizes = arch, mesh, dtype, sizes
        self.model = abstract_model(arch, mesh, dtype)
        self.token_ids = self.whole(jax.ShapeDtypeStruct((sizes.refusal_tokens,), jnp.int32))

    def means(self, B: int, T: int):
        slots = self.array((B, 1, self.sizes.positions), jnp.int32, "batch", None, None)
        valid = self.array((B, 1), bool, "batch", None)
        nothing = self.edits(1)
        return self.lowered(
            collect.mean_pass,
            self.model,
            self.tokens(B, T),
            nothing,
            self.prefix(B),
            slots,
            valid,
            score=refusal_score,
            score_params=self.token_ids,
            sign=1,
        )

    def kl(self, C: int, Y: int, T: int):
        base = self.array((Y, 1, self.arch.vocab), jnp.float32, "batch", None, "vocab")
        return self.lowered(passes.kl, self.model, self.rows(Y, T), self.vectors(C), base)

    def bypass(self, C: int, Y: int, T: int):
        rows = self.rows(Y, T)
        return self.lowered(passes.bypass, self.model, rows, self.vectors(C), self.token_ids)

    def induce(self, C: int, Y: int, T: int):
        layer = self.whole(jax.ShapeDtypeStruct((), jnp.int32))
        N, D = self.sizes.prefix_tokens, self.arch.width
        streams = Streams(
            self.array((Y, T, D), self.dtype, "batch", None, "embed"),
            self.array((1, N, D), self.dtype, None, None, "embed") if N else None,
        )
        rows, vectors = self.rows(Y, T), self.vectors(C)
        return self.lowered(
            passes.induce, self.model, streams, rows, vectors, layer, self.token_ids
        )

    def prefill(self, size: int, J: int, slots: int):
        numbers = partial(self.array, (J,), jnp.int32, "batch")
        return self.lowered(
            decode.prefill,
            self.model,
            self.replies(size, slots),
            self.tokens(J, slots),
            numbers(),
            self.edits(CONDITIONS),
            numbers(),
            self.prefix(CONDITIONS),
            numbers(),
            numbers(),
            self.rules(),
        )

    def advance(self, size: int, slots: int):
        target = self.whole(jax.ShapeDtypeStruct((), jnp.int32))
        replies, edits = self.replies(size, slots), self.edits(CONDITIONS)
        return self.lowered(decode.advance, self.model, SCAN, replies, edits, target, self.rules())

    def lowered(self, program: Any, *arguments: Any, **options: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return program.lower(*arguments, **options)

    def array(self, shape: tuple[int, ...], dtype: Any, *logical: str | None) -> Any:
        placed = sharding.named(self.mesh, logical, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def whole(self, tree: Any) -> Any:
        """The shapes of a tree, on every device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
        )

    def placed(self, x: Any, *logical: str | None) -> Any:
        return self.array(x.shape, x.dtype, *logical)

    def tokens(self, rows: int, length: int) -> Tokens:
        each = partial(self.array, (rows, length), jnp.int32, "batch", None)
        return Tokens(ids=each(), positions=each(), segments=each(), kinds=each())

    def rows(self, Y: int, T: int) -> Rows:
        N = self.sizes.prefix_tokens
        return Rows(
            tokens=self.tokens(Y, T),
            prefix=self.tokens(1, N) if N else None,
            last=self.array((Y, 1), jnp.int32, "batch", None),
            valid=self.array((Y, 1), bool, "batch", None),
        )

    def vectors(self, C: int) -> Any:
        return self.whole(jax.ShapeDtypeStruct((C, self.arch.width), jnp.float32))

    def edits(self, rows: int) -> Any:
        one = partial(identity, self.arch.layers, self.arch.width)
        return self.whole(jax.eval_shape(lambda: repeat(one(), rows) if rows > 1 else one()))

    def prefix(self, rows: int) -> Any:
        N = self.sizes.prefix_tokens
        if not N:
            return None
        empty = partial(caches.empty, self.arch, rows, N, self.dtype)
        shapes = jax.eval_shape(empty)
        return dataclasses.replace(shapes.each(self.placed), length=self.whole(shapes.length))

    def replies(self, size: int, slots: int) -> Any:
        shapes = jax.eval_shape(
            partial(
                decode.empty,
                rows=size,
                slots=self.sizes.prefix_tokens + slots,
                capacity=bucket(self.sizes.max_new_tokens),
                unrolled=False,
            ),
            self.model,
        )
        found = shapes.each(self.placed)
        cache = dataclasses.replace(found.cache, length=self.whole(shapes.cache.length))
        return dataclasses.replace(found, cache=cache, step=self.whole(shapes.step))

    def rules(self) -> Any:
        rules = jax.eval_shape(
            lambda: decode.Rules(
                stop_ids=jnp.zeros(2, jnp.int32),
                limit=jnp.int32(self.sizes.max_new_tokens),
                sampling=decode.Sampling(temperature=jnp.float32(0), key=jax.random.key(0)),
            )
        )
        return self.whole(rules)
