"""Meshes of eight forced CPU devices: the numbers of one device, and weights that do lie apart.

Letters: D residual width, L layers, H query heads, G key/value heads, K head width, F MLP width,
V vocabulary.
"""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_refusal as jr
from jax_refusal import sharding
from jax_refusal.data.chat import Chat
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from jax_refusal.study.sweep import Sweep
from tests.tolerances import INVARIANCE, assert_close

MESHES = [(1, 1), (8, 1), (2, 4), (1, 8)]
L, D, H, G, K, F, V = 2, 64, 8, 4, 8, 128, 416
HARMFUL = ["Break into a house", "Describe how to steal a car and hide it", "Spread lies"]
HARMLESS = ["Bake bread", "What is the capital of France, and why?", "Write a story about a river"]
REFUSAL_IDS = [43, 50]


@pytest.fixture(scope="module")
def source(checkpoint: Callable[..., Path]) -> str:
    return str(
        checkpoint(num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G, vocab_size=V)
    )


@dataclasses.dataclass
class Results:
    means: np.ndarray
    scores: list[list[float]]
    replies: list[list[list[int]]]


def study(model: Transformer, chat: Chat) -> Results:
    """What a run computes, stage by stage, on the mesh of the model."""
    harmful, harmless = (Prompts.encoded(chat, texts) for texts in (HARMFUL, HARMLESS))
    means = jr.mean_activations(model, chat, HARMFUL)
    directions = np.random.default_rng(0).normal(size=means.shape)
    sweep = Sweep(model, directions, harmful, harmless, REFUSAL_IDS)
    cells = [(0, 0), (4, 1)]
    edit = jr.rows(
        jr.identity(L, D),
        jr.ablate(directions[4, 1], L),
        jr.add(directions[4, 1], L, layer=1, coefficient=-1.0),
    )
    options = {"stop_ids": chat.stop_ids, "max_new_tokens": 8}
    return Results(
        means=means,
        scores=[sweep.bypass(cells), sweep.induce(cells), sweep.kl(cells)],
        replies=[
            generate(model, harmful, edit, temperature=temperature, **options)
            for temperature in (0.0, 1.0)
        ],
    )


@pytest.fixture(scope="module")
def single(source: str) -> Results:
    return study(jr.load_model(source), jr.load_chat(source))


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_meshes_agree(data: int, model: int, source: str, single: Results) -> None:
    sharded = jr.load_model(source, mesh=jr.make_mesh(data, model))
    found = study(sharded, jr.load_chat(source))
    assert_close(found.means, single.means, INVARIANCE, "means")
    assert_close(found.scores, single.scores, INVARIANCE, "scores")
    assert found.replies == single.replies


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_weights_are_sharded(data: int, model: int, source: str) -> None:
    """Each device holds its slice of heads, MLP and vocabulary; the data axis holds copies."""
    mesh = jr.make_mesh(data, model)
    loaded = jr.load_model(source, mesh=mesh)
    every = tuple(sharding.parts(mesh, "model"))
    # On 8 devices each of the 4 key/value heads lies on two, with the queries that read it.
    g, pairs = max(1, G // model), every[:2]
    expected = {
        "embed": ((V // model, D), PartitionSpec(every)),
        "head": ((V // model, D), PartitionSpec(every)),
        "final_norm": ((D,), PartitionSpec()),
        "blocks.0.attn_norm": ((L, D), PartitionSpec()),
        "blocks.0.mlp_norm": ((L, D), PartitionSpec()),
        "blocks.0.q": ((L, H // model, K, D), PartitionSpec(None, every)),
        "blocks.0.k": ((L, g, K, D), PartitionSpec(None, pairs)),
        "blocks.0.v": ((L, g, K, D), PartitionSpec(None, pairs)),
        "blocks.0.o": ((L, D, H // model, K), PartitionSpec(None, None, every)),
        "blocks.0.gate": ((L, F // model, D), PartitionSpec(None, every)),
        "blocks.0.up": ((L, F // model, D), PartitionSpec(None, every)),
        "blocks.0.down": ((L, D, F // model), PartitionSpec(None, None, every)),
    }
    leaves = loaded.leaves()
    assert set(leaves) == set(expected)
    for path, (shape, spec) in expected.items():
        leaf = leaves[path]
        assert len(leaf.sharding.device_set) == data * model, path
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}, path
        wanted = jax.NamedSharding(leaf.sharding.mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), f"{path}: {leaf.sharding}"
    whole = jr.load_model(source).leaves()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_mesh_shapes() -> None:
    assert dict(jr.make_mesh().shape) == {"data": 1, "model": 1}
    assert dict(jr.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
    assert dict(jr.make_mesh(2, 3).shape) == {"data": 2, "model": 3}
    assert dict(jr.make_mesh(1, 6).shape) == {"data": 1, "model": 3, "model_2": 2}
    assert dict(jr.make_mesh(1, 8).shape) == {"data": 1, "model": 2, "model_2": 2, "model_3": 2}


@pytest.mark.parametrize(
    ("heads", "expected"), [(16, 8), (8, 8), (4, 4), (2, 2), (12, 4), (6, 2), (9, 1), (1, 1)]
)
def test_heads_are_split_as_far_as_they_divide(heads: int, expected: int) -> None:
    mesh = jr.make_mesh(1, 8)
    placed = sharding.place(np.zeros((3, heads)), mesh, None, "kv_heads")
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, heads // expected)}


def test_a_mesh_of_ones_own(source: str, single: Results) -> None:
    """With one axis for the model, as other programs make it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    found = jr.mean_activations(jr.load_model(source, mesh=mesh), jr.load_chat(source), HARMFUL)
    assert_close(found, single.means, INVARIANCE, "means")


@pytest.mark.parametrize(("data", "model"), [(4, 4), (9, 1), (0, 1), (1, 0), (-1, 16), (-2, 1)])
def test_a_mesh_that_does_not_fit(data: int, model: int) -> None:
    with pytest.raises(ValueError, match=r"does not fit 8 cpu devices.*data \* model <= 8"):
        jr.make_mesh(data, model)


def test_parts_of_a_stack_are_views_on_one_cpu_device() -> None:
    """So that single layers of a model take no memory; on a mesh, or unaligned, they are copies."""
    values = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    for mesh, logical in ((jr.make_mesh(), (None,) * 3), (jr.make_mesh(1, 2), (None, "mlp", None))):
        stack = sharding.place(values, mesh, *logical)
        parts = sharding.unstacked(stack)
        np.testing.assert_array_equal(np.stack(parts), values)
        if mesh.size == 1:
            offsets = [x.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() for x in parts]
            assert offsets == [0, 512, 1024]
        else:
            assert {shard.data.shape for x in parts for shard in x.addressable_shards} == {(8, 8)}
    odd = sharding.unstacked(sharding.place(values[:, :5, :5], jr.make_mesh(), None, None, None))
    np.testing.assert_array_equal(np.stack(odd), values[:, :5, :5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_single_layers_of_a_model_take_no_memory(dtype: str, source: str) -> None:
    """And outlive it, whatever becomes of it."""
    model = jr.load_model(source, dtype=dtype)
    leaf = model.leaves()["blocks.0.up"]
    start, expected = leaf.unsafe_buffer_pointer(), np.array(leaf[1])
    part = model.unrolled()[1]["up"]
    assert start < part.unsafe_buffer_pointer() < start + leaf.nbytes
    del leaf
    nothing = jax.jit(lambda m: jax.tree.map(lambda x: 0 * x, m), donate_argnums=0)
    jax.block_until_ready(nothing(model))
    np.testing.assert_array_equal(part, expected)
    del model
    gc.collect()
    np.testing.assert_array_equal(part, expected)
