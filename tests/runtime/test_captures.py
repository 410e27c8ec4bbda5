"""What is captured inside the layers: the same whatever prompts share a batch, and what it says.

Letters: B batch row, T token, D residual width, L layers, P captured tokens of a prompt, H query
heads, K head width, M directions.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_refusal as jr
from jax_refusal.edits import SITES
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN, Scan, Unrolled
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.captures import capture
from jax_refusal.runtime.collect import mean_activations
from jax_refusal.sites import INSIDE, Capture, Outer, Project, Sum
from tests import tiny
from tests.models.cases import fields
from tests.models.test_cache import nothing, sharing, some_edit
from tests.models.test_families import random_ids
from tests.tolerances import INVARIANCE, PARITY, assert_close

Checkpoint = Callable[..., Path]
LENGTHS = (21, 14, 30, 12, 25)
EVERY = (*SITES[:3], *INSIDE)


def single(model: Transformer, prompt: list[int], edit: Any, sites: tuple[str, ...]) -> Any:
    """Site -> [L, T, ...] of one prompt in a pass of its own."""
    tokens = Tokens.padded(jnp.array([prompt]))
    run = jax.jit(lambda m, t, e: m(t, e, capture=Capture(sites=sites)).captured)
    return {site: np.asarray(x)[:, 0] for site, x in run(model, tokens, edit).items()}


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("every_token", [False, True], ids=["last", "all"])
def test_packed_prompts_equal_single_ones(
    model: Transformer, prefix: int, every_token: bool
) -> None:
    """At every site, under an edit, behind a shared prefix."""
    prompts, edit = sharing(model, prefix, LENGTHS), some_edit(model)
    found = capture(model, prompts, edit, EVERY, every_token=every_token, row_tokens=64)
    assert set(found) == set(EVERY)
    for number, prompt in enumerate(prompts.ids):
        alone = single(model, prompt, edit, EVERY)
        start = prefix if every_token else len(prompt) - prompts.positions
        for site in EVERY:
            expected = alone[site][:, start:].swapaxes(0, 1)
            assert_close(found[site][number], expected, INVARIANCE, f"{site} of {number}")


@pytest.mark.parametrize("site", ["resid_pre", "z", "hidden"])
def test_reductions_are_of_what_is_there(model: Transformer, site: str) -> None:
    """Mean, outer products and coordinates, against those of the activations themselves."""
    prompts, edit = sharing(model, 5, LENGTHS), some_edit(model)

    def run(**options: Any) -> np.ndarray:
        return capture(model, prompts, edit, [site], row_tokens=64, batch_tokens=64, **options)[
            site
        ]

    each = np.float64(run())  # [N, P, L, ...]
    assert_close(run(reduce="mean"), each.mean(0), INVARIANCE)
    outer = np.einsum("npl...d,npl...e->pl...de", each, each) / len(each)
    assert_close(run(reduce="outer"), outer, INVARIANCE)
    directions = np.random.default_rng(1).normal(size=(3, each.shape[-1]))
    along = run(reduce="project", directions=directions)
    assert_close(along, each @ directions.T, INVARIANCE)
    tokens = capture(model, prompts, edit, [site], every_token=True)[site]
    whole = np.concatenate([np.float64(x) for x in tokens]).mean(0)[None]
    assert_close(run(reduce="mean", every_token=True), whole, INVARIANCE)


def test_means_are_those_of_collection(model: Transformer) -> None:
    prompts = sharing(model, 5, LENGTHS)
    found = capture(model, prompts, nothing(model), ["resid_pre"], reduce="mean")
    means, _ = mean_activations(model, prompts, nothing(model))
    assert_close(found["resid_pre"], means, INVARIANCE)


def test_a_reduction_leaves_nothing_of_every_layer(model: Transformer) -> None:
    """Neither the result nor the program's memory grows by layers times prompts."""
    B, T = 64, 16
    tokens = Tokens.padded(jnp.zeros((B, T), jnp.int32))

    def program(reduce: Any) -> Any:
        asked = Capture(sites=("resid_pre",), reduce=reduce)
        none = jnp.zeros((B, 0), jnp.int32)
        run = jax.jit(lambda m, t, e, c: m(t, e, capture=c, query_slots=none).captured)
        return run.lower(model, tokens, nothing(model), asked).compile().memory_analysis()

    whole = model.arch.layers * B * T * model.arch.width * 4
    held = [m.temp_size_in_bytes + m.output_size_in_bytes for m in map(program, (None, SUM))]
    assert held[0] > whole > 4 * (held[1] - (held[0] - whole)) + whole / 2


SUM = Sum(jnp.ones((64, 16, 1)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_oss"])
def test_patterns_and_heads_are_those_of_transformers(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(**fields(name))
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    ids = random_ids(model.arch.vocab)
    seen: list[np.ndarray] = []
    for layer in hf.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].numpy().copy())
        )
    theirs = hf(torch.tensor(ids), output_attentions=True).attentions
    tokens, asked = Tokens.padded(jnp.asarray(ids)), Capture(sites=("pattern", "z"))
    found = jax.jit(lambda m, t, e: m(t, e, capture=asked).captured)(model, tokens, nothing(model))
    for layer, (pattern, z) in enumerate(zip(theirs, seen, strict=True)):
        ours = found["pattern"][layer].swapaxes(1, 2)  # [B, H, T, C]
        assert_close(ours, pattern, PARITY, f"pattern of layer {layer}")
        assert_close(found["z"][layer].reshape(z.shape), z, PARITY, f"heads of layer {layer}")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4_text_all_untied"])
def test_what_is_written_is_what_the_stream_becomes(name: str, checkpoint: Checkpoint) -> None:
    """Each layer's input and writes add up to the next one's input, the gated input's too."""
    case = {} if name == "llama" else fields(name)
    model = jr.load_model(str(checkpoint(**case)))
    tokens, asked = Tokens.padded(jnp.asarray(random_ids(model.arch.vocab))), Capture(sites=SITES)
    run = jax.jit(lambda m, t, e: m(t, e, capture=asked))
    out, arch = run(model, tokens, nothing(model)), model.arch
    after = np.concatenate([out.captured["resid_pre"][1:], out.x[None]])
    total = sum(np.asarray(x) for x in out.captured.values())
    scales = [np.asarray(own.get("scale", 1.0)) for own in model.unrolled()]
    assert arch.layers == len(scales)
    for layer, scale in enumerate(scales):
        assert_close(scale * total[layer], after[layer], INVARIANCE, f"layer {layer}")
    assert ("per_layer_out" in out.captured) == name.startswith("gemma4")


def test_layers_of_several_shapes_stand_apart(checkpoint: Checkpoint) -> None:
    """Heads of two widths, and keys of the layers that have their own."""
    model = jr.load_model(str(checkpoint(**fields("gemma4_text_all_untied"))))
    prompts, sites = sharing(model, 4, (9, 12, 10)), ("resid_pre", "z", "keys")
    each = capture(model, prompts, nothing(model), sites)
    means = capture(model, prompts, nothing(model), sites, reduce="mean")
    assert [x.shape for x in each["z"]] == [(3, 3, 4, k) for k in (8, 16, 8, 8, 8, 16)]
    assert [x.shape for x in each["keys"]] == [(3, 3, g, k) for g, k in ((2, 8), (1, 16), (2, 8))]
    assert each["resid_pre"].shape == (3, 3, 6, 32)
    for layer, x in enumerate(each["z"]):
        assert_close(means["z"][layer], np.float64(x).mean(0), INVARIANCE)
    for number, prompt in enumerate(prompts.ids):
        tokens = Tokens.padded(jnp.array([prompt]))
        alone = model(tokens, nothing(model), capture=Capture(sites=("z",))).captured["z"]
        for layer, x in enumerate(alone):
            assert_close(each["z"][layer][number], x[0, -3:], INVARIANCE, f"layer {layer}")


def test_a_notebook_s_call(model: Transformer, chat: Any) -> None:
    texts = ["Say river", "Name some kinds of bread", "Why?"]
    P, L = len(chat.post_instruction), model.arch.layers
    mixer = model.arch.specs[0].mixer
    shape = (L, mixer.heads, mixer.head_width)
    assert jr.capture(model, chat, texts, ("z",))["z"].shape == (3, P, *shape)
    assert jr.capture(model, chat, texts, ("z",), slots="last")["z"].shape == (3, 1, *shape)
    every = jr.capture(model, chat, texts, ("z", "pattern"), slots="all")
    lengths = [len(ids) for ids in chat.encode(texts)]
    assert [x.shape for x in every["z"]] == [(n, *shape) for n in lengths]
    assert [x.shape for x in every["pattern"]] == [(n, L, mixer.heads, n) for n in lengths]
    for pattern in every["pattern"]:
        assert_close(pattern.sum(-1), np.ones(pattern.shape[:-1]), INVARIANCE)
    means = jr.capture(model, chat, texts, reduce="mean")["resid_pre"]
    assert_close(means, jr.mean_activations(model, chat, texts), INVARIANCE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": ("z_out",)}, r"Unknown sites \['z_out'\]; allowed are \['resid_pre'.*'hidden'"),
        ({"reduce": "median"}, r"reduce='median'; allowed are \['none', 'mean'"),
        ({"reduce": "project"}, r"reduce='project' and directions are not given"),
        ({"directions": np.ones((1, 64))}, r"reduce='none' and directions are given"),
        ({"sites": ("pattern",), "reduce": "mean"}, "pattern of a prompt lies over its own tokens"),
        ({"slots": "first"}, r"slots='first'; allowed are \['post_instruction', 'last', 'all'\]"),
    ],
)
def test_what_cannot_be_captured(
    options: dict[str, Any], words: str, model: Transformer, chat: Any
) -> None:
    with pytest.raises(ValueError, match=words):
        jr.capture(model, chat, ["Say river"], **options)


@pytest.mark.parametrize("reduce", [Sum, Outer])
def test_what_does_not_count_may_be_nan(reduce: Any) -> None:
    """Slots that hold no prompt are left out, whatever lies there."""
    x, weights = np.ones((2, 3, 4), np.float32), np.ones((2, 3, 1), np.float32)
    x[1, 2], weights[1, 2] = np.nan, 0
    total = np.asarray(reduce(jnp.asarray(weights))(jnp.asarray(x)))
    np.testing.assert_array_equal(total, np.full_like(total, 5))


def test_coordinates_are_float32_products() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), jnp.bfloat16)
    directions = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    found = Project(jnp.asarray(directions))(x)
    assert found.dtype == jnp.float32
    assert_close(found, np.float64(np.float32(x)) @ directions.T, PARITY)


def test_prompts_of_one_length_are_stacked(model: Transformer) -> None:
    prompts = Prompts([[5, 6, 7, 8], [5, 9, 7, 8]], prefix=1, positions=2)
    found = capture(model, prompts, nothing(model), ["resid_pre"], every_token=True)["resid_pre"]
    assert found.shape == (2, 3, model.arch.layers, model.arch.width)


def test_reductions_are_told_apart() -> None:
    """By jit too, which looks for a compiled program by the structure of its arguments."""
    kinds = [jax.tree.structure(kind(1.0)) for kind in (Sum, Outer, Project)]
    assert kinds[0] != kinds[1] != kinds[2] != kinds[0]
    edits = [
        jr.identity(2, 4),
        jr.chain(jr.identity(2, 4), jr.identity(2, 4)),
        jr.Transform(function=lambda params, site, layer, x: x, params=1.0),
    ]
    drivers = [SCAN, Scan((0, 1)), Unrolled(({"q": 1.0}, {"q": 1.0}))]
    for values in (edits, drivers):
        found = [jax.tree.structure(value) for value in values]
        assert all(a != b for a, b in itertools.combinations(found, 2))
