"""Every family against transformers, on tiny random checkpoints that lie as the hub's do.

Letters: B batch row, T token, D residual width, L layers, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import jax_refusal as jr
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.edits import SITES
from jax_refusal.models.cache import Tokens, empty
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN, Unrolled
from jax_refusal.sites import Capture
from tests import tiny
from tests.models.cases import CASES, PLAIN, WINDOWS, T, fields
from tests.tolerances import (
    BFLOAT16,
    BFLOAT16_LOSS,
    INVARIANCE,
    PARITY,
    assert_close,
    largest,
)

Checkpoint = Callable[..., Path]
HYBRIDS = ("qwen3_next", "granitemoehybrid")
B = 2
ONE = np.ones(1, np.float32)
MISTRAL = {"architecture": "mistral"}
MISTRAL3 = {"model_type": "mistral3", "spatial_merge_size": 2}
UNIFIED = {"model_type": "gemma4_unified", "audio_config": {}, "boi_token_id": 3}


def random_ids(vocab: int) -> np.ndarray:  # [B, T]
    return np.random.default_rng(0).integers(vocab, size=(B, T))


def text_model(hf: PreTrainedModel) -> nn.Module:
    return getattr(hf.model, "language_model", hf.model)


def writers(block: nn.Module) -> dict[str, list[nn.Module]]:
    """Site -> the modules whose outputs are added to the residual stream: norms, where there are
    any behind a block."""
    mixers = ("self_attn", "linear_attn", "mamba")
    found = {
        "attn_out": [getattr(block, name, None) for name in mixers],
        "mlp_out": [getattr(block, n, None) for n in ("mlp", "block_sparse_moe", "shared_mlp")],
        "per_layer_out": [getattr(block, "post_per_layer_input_norm", None)],
    }
    if hasattr(block, "post_feedforward_layernorm"):
        found["attn_out"] = [block.post_attention_layernorm]
        found["mlp_out"] = [block.post_feedforward_layernorm]
    return {site: [m for m in modules if m is not None] for site, modules in found.items()}


@torch.no_grad()
def hf_everything(hf: PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B, T, V], and what arrives at each site that the model has [L, B, T, D]."""
    layers = text_model(hf).layers
    seen: dict[str, dict[int, np.ndarray]] = {site: {} for site in SITES}

    def inward(number: int, _module: Any, args: Any) -> None:
        seen["resid_pre"][number] = args[0].float().numpy().copy()

    def outward(number: int, site: str, _module: Any, _args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        scale = getattr(layers[number], "residual_multiplier", 1.0)
        out = scale * out.float().numpy().reshape(B, T, -1)
        seen[site][number] = seen[site].get(number, 0) + out

    handles = []
    for number, block in enumerate(layers):
        handles.append(block.register_forward_pre_hook(partial(inward, number)))
        for site, modules in writers(block).items():
            hook = partial(outward, number, site)
            handles += [module.register_forward_hook(hook) for module in modules]
    logits = hf(torch.tensor(ids)).logits.float().numpy()
    for handle in handles:
        handle.remove()
    return logits, {site: np.stack([*each.values()]) for site, each in seen.items() if each}


@jax.jit
def everything(model: Transformer, ids: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    edit = jr.identity(model.arch.layers, model.arch.width)
    out = model(Tokens.padded(ids), edit, capture=Capture(sites=SITES))
    return model.unembed(out.x), out.captured


@pytest.mark.parametrize("name", CASES)
def test_logits_and_residual_stream(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(**fields(name))
    model = jr.load_model(str(path))
    ids = random_ids(model.arch.vocab)
    ours, captured = everything(model, jnp.asarray(ids))
    theirs, sites = hf_everything(tiny.hf_model(path), ids)
    assert_close(ours, theirs, PARITY, "logits")
    assert set(captured) == set(sites)
    for site, theirs in sites.items():
        assert_close(captured[site], theirs, PARITY, site)


SWITCHES = [(name, off) for name, every in PLAIN.items() for off in every]


@pytest.mark.parametrize(("name", "off"), SWITCHES, ids=[f"{n}-{[*o]}" for n, o in SWITCHES])
def test_every_switch_changes_the_logits(
    name: str, off: dict[str, Any], checkpoint: Checkpoint
) -> None:
    """With the same weights and a switch off: the parity above says something about it."""
    on, plain = (tiny.hf_model(checkpoint(**f)) for f in (fields(name), fields(name, **off)))
    ids = random_ids(on.config.vocab_size)
    theirs, _ = hf_everything(on, ids)
    assert largest(hf_everything(plain, ids)[0] - theirs) > 1e3 * PARITY * largest(theirs)


@pytest.mark.parametrize(
    "name", ["gemma2", "olmo2", "qwen3", "gpt_oss", "gemma4", "qwen3_5", HYBRIDS[1]]
)
def test_bfloat16(name: str, checkpoint: Checkpoint) -> None:
    """Agrees loosely with Hugging Face's bfloat16, and strays no further from float32 than it."""
    path = checkpoint(**fields(name))
    model, hf = jr.load_model(str(path), dtype="bfloat16"), tiny.hf_model(path, torch.bfloat16)
    ids = random_ids(model.arch.vocab)
    ours, theirs = jr.logits(model, ids), hf_everything(hf, ids)[0]
    exact = hf_everything(hf.float(), ids)[0]  # the same rounded weights

    def distance(x: Any, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x - y))))

    assert distance(ours, theirs) <= BFLOAT16 * distance(exact, np.zeros_like(exact))
    assert distance(ours, exact) <= BFLOAT16_LOSS * distance(theirs, exact)


@jax.jit
def cached(model: Transformer, tokens: Tokens, edit: Any, cache: Any) -> tuple[jax.Array, Any]:
    apart = isinstance(cache.entries[0], tuple)
    drive = Unrolled(model.unrolled()) if apart else SCAN
    out = model(tokens, edit, cache=cache, drive=drive)
    return model.unembed(out.x), out.cache


@pytest.mark.parametrize("name", [*WINDOWS, "gemma4", "olmo2_bias", *HYBRIDS])
def test_cache_equals_no_cache(name: str, checkpoint: Checkpoint) -> None:
    """Prefill, then single tokens out of every layer's window, under an edit; as a CPU decodes."""
    model = jr.load_model(str(checkpoint(**fields(name))))
    ids = random_ids(model.arch.vocab)
    direction = np.random.default_rng(5).normal(size=model.arch.width)
    edit = jr.ablate(direction, model.arch.layers)
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    cache, parts, start = empty(model.arch, B, T, model.dtype), [], 0
    for size in (16, *[1] * (T - 16)):
        piece = jax.tree.map(lambda x, s=start, n=size: x[:, s : s + n], tokens)
        logits, cache = cached(model, piece, edit, cache)
        parts.append(logits)
        start += size
        if size > 1:  # the prompt is read: what follows is decoding, over single layers
            cache = cache.unrolled()
    assert_close(jnp.concatenate(parts, 1), jr.logits(model, ids, edit=edit), INVARIANCE)


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, under the names of the text model."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str, checkpoint: Checkpoint) -> None:
    """Hugging Face -> ours -> Hugging Face gives the same bits and as many parameters."""
    path = checkpoint(**fields(name))
    model = jr.load_model(str(path))
    back = dict(convert.to_hugging_face(model))
    theirs = convert.unwrapped(model.arch, stored(path))
    assert set(back) == set(theirs)
    for tensor, values in theirs.items():
        np.testing.assert_array_equal(back[tensor], values, err_msg=tensor, strict=True)
    hf = tiny.hf_model(path)
    count = sum(weight.numel() for weight in text_model(hf).state_dict().values())
    count += 0 if model.arch.tied_head else hf.lm_head.weight.numel()
    assert sum(leaf.size for leaf in model.leaves().values()) == count


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt_oss", "qwen3_next"])
def test_bfloat16_there_and_back(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(**fields(name, dtype="bfloat16", shards=2))
    model = jr.load_model(str(path), dtype="bfloat16")
    theirs = stored(path)
    for tensor, values in convert.to_hugging_face(model):
        np.testing.assert_array_equal(values, theirs.pop(tensor), err_msg=tensor, strict=True)
    assert not theirs


@pytest.mark.parametrize(
    "name", ["gemma3", "olmo2", "phi3", "gpt_oss", "gemma4", "qwen3_5", HYBRIDS[1]]
)
def test_devices_read_their_slices(name: str, checkpoint: Checkpoint) -> None:
    """The same leaves on a mesh, fused tensors and norms over heads included."""
    path = str(checkpoint(**fields(name)))
    one, many = jr.load_model(path), jr.load_model(path, mesh=jr.make_mesh(2, 4))
    for leaf, values in one.leaves().items():
        np.testing.assert_array_equal(values, many.leaves()[leaf], err_msg=leaf)


# Checkpoints as they lie


@pytest.fixture
def renamed(tmp_path: Path, checkpoint: Checkpoint) -> Iterator[Callable[..., Path]]:
    """A copy of a checkpoint with every tensor's name passed through a function."""

    def copy(name: str, rename: Callable[[str], str]) -> Path:
        source = checkpoint(**fields(name))
        for file in source.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = {rename(key): values for key, values in stored(source).items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    yield copy


@pytest.mark.parametrize("style", ["hub", "new"])
def test_the_text_model_of_a_multimodal_checkpoint(
    style: str, renamed: Callable[..., Path], checkpoint: Checkpoint
) -> None:
    def rename(name: str) -> str:
        text = name.removeprefix("model.").replace("language_model.model.", "language_model.")
        if style == "new":
            return f"model.{text}"
        return text.replace("language_model.", "language_model.model.")

    again = jr.load_model(str(renamed("gemma3", rename)))
    for leaf, values in jr.load_model(str(checkpoint(**fields("gemma3")))).leaves().items():
        np.testing.assert_array_equal(values, again.leaves()[leaf], err_msg=leaf)


@pytest.mark.parametrize(
    ("wrapper", "text_model", "front", "others"),
    [
        (MISTRAL3, "ministral3", "language_model.", "vision_tower.ln_pre.weight"),
        (
            MISTRAL3,
            {"architecture": "mistral"},
            "language_model.",
            "multi_modal_projector.n.weight",
        ),
        (UNIFIED, "gemma4_unified_text", "model.language_model.", "model.embed_vision.n.weight"),
    ],
)
def test_the_text_model_in_a_wrapper(
    wrapper: dict[str, Any],
    text_model: str | dict[str, Any],
    front: str,
    others: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    """Wrappers around one of several families, with tensors of other modalities beside."""
    case = fields(text_model) if isinstance(text_model, str) else text_model
    source = checkpoint(**case)
    text = json.loads((source / "config.json").read_text())
    outer = {**wrapper, "text_config": text, "vision_config": {"model_type": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    inner = "model." if front.startswith("model.") else ""
    tensors = {front + name.removeprefix(inner): v for name, v in stored(source).items()}
    save_file({**tensors, others: ONE}, tmp_path / "model.safetensors")
    again = jr.load_model(str(tmp_path))
    for leaf, values in jr.load_model(str(source)).leaves().items():
        np.testing.assert_array_equal(values, again.leaves()[leaf], err_msg=leaf)


def test_other_modalities_are_unused_where_no_config_names_them(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(**fields("qwen3"))
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(stored(source) | {"vision_tower.w": ONE}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"unused vision_tower\.w"):
        jr.load_model(str(tmp_path))
