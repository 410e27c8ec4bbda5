"""Mixers with a state: module by module against transformers, by both forms of the recurrence, and
as a study uses them. What holds for every model is in `test_cache` and `test_families`.

Letters: B batch row, T token, G key heads, H value heads, N key width, P value width, D residual
width, L layers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import jax_refusal as jr
from jax_refusal.edits import SITES
from jax_refusal.models.cache import Tokens, empty
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.recurrence import CHUNK, Runs, recur
from jax_refusal.models.spec import phases
from jax_refusal.runtime.generate import generate
from jax_refusal.sites import Capture
from jax_refusal.study.sweep import Sweep
from tests import tiny
from tests.models.cases import T, fields
from tests.models.modules import blank, one_layer
from tests.models.test_cache import nothing, one_by_one, sharing
from tests.models.test_families import B, random_ids, text_model, writers
from tests.tolerances import INVARIANCE, PARITY, SCORES, assert_close

Checkpoint = Callable[..., Path]
NAMES = ("qwen3_next", "qwen3_5_text", "granitemoehybrid")
MIXERS = ("qwen3_next", "granitemoehybrid")  # one of each, where replies are made
REFUSAL_IDS = (43, 50)


@pytest.fixture(scope="module", params=NAMES)
def hybrid(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Transformer:
    return jr.load_model(str(checkpoint(**fields(request.param))))


@torch.no_grad()
def hf_modules(hf: PreTrainedModel, ids: np.ndarray) -> dict[tuple[int, str], list[np.ndarray]]:
    """(layer, site) -> what the module there reads and writes, [B, T, D] each; sums of several."""
    seen: dict[tuple[int, str], list[np.ndarray]] = {}

    def note(key: tuple[int, str], _module: Any, args: Any, named: Any, out: Any) -> None:
        read = args[0] if args else named["hidden_states"]
        out = out[0] if isinstance(out, tuple) else out
        before = seen.get(key, [None, 0])[1]
        seen[key] = [read.numpy().copy(), before + out.numpy().reshape(read.shape)]

    handles = [
        module.register_forward_hook(partial(note, (number, site)), with_kwargs=True)
        for number, block in enumerate(text_model(hf).layers)
        for site, modules in writers(block).items()
        for module in modules
    ]
    hf(torch.tensor(ids))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_modules(name: str, checkpoint: Checkpoint) -> None:
    """Each mixer and branch fed with what Hugging Face's was fed with."""
    path = checkpoint(**fields(name))
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    kinds = {type(spec.mixer).__name__ for spec in model.arch.specs}
    assert kinds == {"Attention", "Mamba2" if name.startswith("granite") else "DeltaNet"}
    for (number, site), (x, out) in hf_modules(hf, random_ids(model.arch.vocab)).items():
        own = one_layer(model, number, blank(B, T))
        run = own.mixer if site == "attn_out" else own.branch
        assert_close(run(jnp.asarray(x)), out, PARITY, f"{site} of layer {number}")


def test_layers_are_scanned_by_pattern(hybrid: Transformer) -> None:
    assert [phase.repeats for phase in phases(hybrid.arch)] == [2]


def inputs(T: int) -> list[jax.Array]:
    """Queries, keys, values, decays and shares of 2 rows."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, h, w)) for h, w in ((2, 8), (2, 8), (4, 5)))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay, beta = -0.3 * rng.uniform(size=(2, T, 4)), rng.uniform(size=(2, T, 4))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, decay, beta)]


def runs(segments: np.ndarray) -> Runs:
    none = jnp.zeros(segments.shape, jnp.int32)
    tokens = Tokens(ids=none, positions=none, segments=jnp.asarray(segments, jnp.int32))
    return Runs.of(tokens, taps=4)


@pytest.mark.parametrize("delta", [True, False], ids=["delta_net", "mamba"])
def test_chunks_equal_steps(delta: bool) -> None:
    """Of rows longer than a chunk, with padding in between; out of a state that is there."""
    length = CHUNK * 2 + 9
    arrays, some = inputs(length), np.random.default_rng(1)
    state = jnp.asarray(some.normal(size=(2, 4, 8, 5)), jnp.float32)
    real = (some.uniform(size=(2, length)) < 0.9).astype(int)
    q, k, v, decay, beta = arrays
    whole, end = jax.jit(recur)(q, k, v, decay, runs(real), state, beta if delta else None)
    step, parts = jax.jit(recur), []
    for i in range(length):
        q, k, v, decay, beta = (x[:, i : i + 1] for x in arrays)
        one = runs(real[:, i : i + 1])
        out, state = step(q, k, v, decay, one, state, beta if delta else None)
        parts.append(out)
    seen = real[..., None, None]
    assert_close(whole * seen, jnp.concatenate(parts, 1) * seen, INVARIANCE, "outputs")
    assert_close(end, state, INVARIANCE, "state")


@pytest.mark.parametrize("delta", [True, False], ids=["delta_net", "mamba"])
def test_prompts_of_a_row_begin_where_the_prefix_ended(delta: bool) -> None:
    """Three prompts in a row, over borders of chunks, as in rows of their own."""
    sizes = (50, 90, 30)
    arrays = inputs(sum(sizes))
    state = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 8, 5)), jnp.float32)
    segments = np.tile(np.repeat([3, 1, 2], sizes), (2, 1))

    def run(start: int, stop: int, segments: np.ndarray) -> jax.Array:
        q, k, v, decay, beta = (x[:, start:stop] for x in arrays)
        return recur(q, k, v, decay, runs(segments), state, beta if delta else None)[0]

    packed, start = run(0, sum(sizes), segments), 0
    for size in sizes:
        alone = run(start, start + size, np.ones((2, size), int))
        assert_close(packed[:, start : start + size], alone, INVARIANCE)
        start += size


def test_writes_add_up_to_the_stream(hybrid: Transformer) -> None:
    ids = jnp.asarray(random_ids(hybrid.arch.vocab))
    capture = Capture(sites=(*SITES, "z"))
    out = hybrid(Tokens.padded(ids), nothing(hybrid), capture=capture)
    written = sum(out.captured[site].sum(0) for site in ("attn_out", "mlp_out"))
    assert_close(hybrid.embedded(ids) + written, out.x, INVARIANCE)
    heads = [spec.mixer.heads for spec in hybrid.arch.specs]
    assert [z.shape[-2] for z in out.captured["z"]] == heads


def test_what_is_ablated_is_gone_at_every_site(hybrid: Transformer) -> None:
    """And the weights that write, made orthogonal to it, give the same logits."""
    direction = np.random.default_rng(5).normal(size=hybrid.arch.width)
    edit = jr.ablate(direction, hybrid.arch.layers)
    ids = random_ids(hybrid.arch.vocab)
    out = hybrid(Tokens.padded(jnp.asarray(ids)), edit)
    along = np.asarray(out.x) @ (direction / np.linalg.norm(direction))
    assert np.abs(along).max() < 1e-5 * np.abs(out.x).max()
    weights = jr.orthogonalize(hybrid, direction)
    assert_close(jr.logits(weights, ids), jr.logits(hybrid, ids, edit=edit), INVARIANCE)


def test_selection_starts_at_a_saved_stream(hybrid: Transformer) -> None:
    """`induce` runs from the layer of each candidate on: the scores of whole passes."""
    prompts = sharing(hybrid, 5, (21, 14, 30, 12))
    shape = (prompts.positions, hybrid.arch.layers, hybrid.arch.width)
    directions = np.random.default_rng(2).normal(size=shape)
    cells = [(0, 0), (2, 1), (1, 3), (2, 2)]
    found = Sweep(hybrid, directions, prompts, prompts, REFUSAL_IDS).induce(cells)
    for (position, at), score in zip(cells, found, strict=True):
        edit = jr.add(directions[position, at], hybrid.arch.layers, layer=at)
        logits = jax.nn.log_softmax(jnp.asarray(one_by_one(hybrid, prompts, edit)))
        p = jnp.exp(logits[:, jnp.array(REFUSAL_IDS)]).sum(-1)
        assert abs(score - float(jnp.mean(jnp.log(p) - jnp.log1p(-p)))) < SCORES


def test_replies_do_not_depend_on_the_row(hybrid: Transformer) -> None:
    """Under an edit: rows that took in several prompts, and each prompt by itself."""
    prompts = sharing(hybrid, 4, (11, 9, 13, 7, 12))
    direction = np.random.default_rng(5).normal(size=hybrid.arch.width)
    edit = jr.ablate(direction, hybrid.arch.layers)
    options: Any = {"stop_ids": (7, 9, 100, 101), "max_new_tokens": 9}
    few = generate(hybrid, prompts, edit, batch_size=2, **options)
    assert few == generate(hybrid, prompts, edit, batch_size=1, **options)
    whole = generate(hybrid, prompts, edit, batch_size=8, **options)
    assert few == whole and few != generate(hybrid, prompts, nothing(hybrid), **options)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mesh_gives_the_same_replies(name: str, checkpoint: Checkpoint) -> None:
    """States lie with their heads on the devices of the model axis, rows on those of data."""
    path = str(checkpoint(**fields(name)))
    one, many = jr.load_model(path), jr.load_model(path, mesh=jr.make_mesh(2, 2))
    ids = random_ids(one.arch.vocab)
    assert_close(jr.logits(many, ids), jr.logits(one, ids), INVARIANCE)
    prompts = sharing(one, 4, (11, 9, 13, 7))
    options: Any = {"stop_ids": (), "max_new_tokens": 6, "batch_size": 4}
    theirs = generate(many, prompts, nothing(many), **options)
    assert theirs == generate(one, prompts, nothing(one), **options)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(hybrid: Transformer, platform: str) -> None:
    """Prefill and a step of decoding, as programs for machines that are not there."""

    def run(model: Transformer, ids: jax.Array, cache: Any) -> jax.Array:
        return model(Tokens.padded(ids), nothing(model), cache=cache).x

    cache = empty(hybrid.arch, 2, 80, hybrid.dtype)
    for length in (70, 1):
        ids = jnp.zeros((2, length), jnp.int32)
        traced = jax.jit(run).trace(hybrid, ids, cache)
        assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", MIXERS)
def test_the_state_is_float32_in_every_dtype(name: str, checkpoint: Checkpoint) -> None:
    model = jr.load_model(str(checkpoint(**fields(name))), dtype="bfloat16")
    entries = empty(model.arch, 1, 4, model.dtype).entries
    found = {k: x.dtype for entry in entries for k, x in entry.items()}
    assert found.pop("state") == jnp.float32
    assert set(found.values()) == {jnp.dtype(jnp.bfloat16)}
