"""MXFP4 weights against transformers: the same numbers, the same logits, and what is no pair.

Letters: D residual width, E experts, F width of one, N blocks of 32 numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import jax_refusal as jr
from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.quantised.mxfp4 import dequantise, read
from jax_refusal.checkpoints.tensors import ConversionError, Tensor
from jax_refusal.run import convert as conversion
from tests import tiny
from tests.models.test_families import hf_everything, random_ids
from tests.tolerances import PARITY, assert_close

D, E, F = 64, 6, 32
Checkpoint = Callable[..., Path]
PREFIX = "model.layers.{}.mlp.experts."
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def random_pair(seed: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [E, O, N, 16] and scales [E, O, N] of weights of an ordinary size."""
    generator = np.random.default_rng(seed)
    shape = (E, outputs, inputs // 32)
    blocks = generator.integers(256, size=(*shape, 16), dtype=np.uint8)
    return blocks, generator.integers(120, 124, size=shape, dtype=np.uint8)


def write_packed(source: Path, folder: Path) -> Path:
    """The checkpoint with other experts, as the hub's files hold them."""
    folder.mkdir(exist_ok=True)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for seed, (name, sizes) in enumerate({"gate_up": (2 * F, D), "down": (D, F)}.items()):
            whole = f"{PREFIX.format(layer)}{name}_proj"
            tensors.pop(whole)
            pair = random_pair(2 * layer + seed, *sizes)
            tensors[f"{whole}_blocks"], tensors[f"{whole}_scales"] = pair
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = checkpoint(architecture="gpt_oss", intermediate_size=F)
    return write_packed(source, tmp_path_factory.mktemp("mxfp4"))


def hf_dequantised(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        str(path),
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_and_every_scale(dtype: torch.dtype) -> None:
    """To the bit: the smallest numbers, those too large, and what is none."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 16))
    theirs = convert_moe_packed_tensors(
        torch.tensor(blocks.copy()), torch.tensor(scales.copy()), dtype=dtype
    )
    theirs = theirs.float().numpy()  # [1, 32 N, 256]
    ours = dequantise(blocks, scales).swapaxes(1, 2)
    np.testing.assert_array_equal(ours, theirs, strict=True)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))  # of zeros too
    whole = dequantised(blocks, scales)
    np.testing.assert_array_equal(whole[(slice(None),) * 3].astype(np.float32), theirs)


def dequantised(*pair: np.ndarray) -> Tensor:
    named = zip(("w_blocks", "w_scales"), pair, strict=True)
    parts = {name: Tensor(values.shape, values.__getitem__, "U8") for name, values in named}
    return read({}).dequantised(parts)["w"]


def test_any_slice_is_that_part_of_the_whole() -> None:
    blocks, scales = random_pair(0, 10, 96)
    part = dequantised(blocks, scales)
    whole = part[(slice(None),) * 3]
    assert part.shape == whole.shape == (E, 96, 10)
    for slices in (
        (slice(2, 4), slice(0, 96), slice(1, 10, 2)),
        (slice(0, E), slice(40, 50), slice(3, 4)),
        (slice(5, 6), slice(64, 96), slice(0, 8, 2)),
        (slice(1, 2), slice(31, 65), slice(0, 10)),
    ):
        np.testing.assert_array_equal(part[slices], whole[slices])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_are_transformers_values(packed: Path, dtype: str) -> None:
    theirs = hf_dequantised(packed).state_dict()
    model = jr.load_model(str(packed), dtype=dtype)
    found = dict(hf.to_hugging_face(model))
    assert set(found) == set(theirs)
    for name, values in found.items():
        if ".experts." in name and not name.endswith("bias"):  # exact in bfloat16 too
            np.testing.assert_array_equal(
                values.astype(np.float32), theirs[name].numpy(), err_msg=name
            )


def test_logits_are_those_of_transformers(packed: Path) -> None:
    model = jr.load_model(str(packed))
    ids = random_ids(model.arch.vocab)
    theirs, _ = hf_everything(hf_dequantised(packed), ids)
    assert_close(jr.logits(model, ids), theirs, PARITY)


def test_devices_read_their_slices(packed: Path) -> None:
    one, many = (jr.load_model(str(packed), mesh=jr.make_mesh(1, n)) for n in (1, 4))
    for leaf, values in one.leaves().items():
        np.testing.assert_array_equal(values, many.leaves()[leaf], err_msg=leaf)


def test_a_model_leaves_as_numbers(packed: Path, tmp_path: Path) -> None:
    """launch.convert writes them under the names of an unpacked checkpoint, for transformers."""
    request = conversion.Request(
        source=str(packed), to="hf", out=str(tmp_path / "out"), dtype="float32"
    )
    out = conversion.convert(request, log=lambda _: None)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert "| weights | MXFP4 in the source, numbers" in (out / "README.md").read_text()
    names = set(load_file(out / "model.safetensors"))
    assert f"{PREFIX.format(0)}down_proj" in names
    assert not any(name.endswith(("_blocks", "_scales")) for name in names)
    ids = random_ids(config["vocab_size"])
    before, _ = hf_everything(hf_dequantised(packed), ids)
    after, _ = hf_everything(tiny.hf_model(out), ids)
    np.testing.assert_array_equal(after, before)


def test_an_edited_model_leaves_as_numbers(packed: Path, tmp_path: Path) -> None:
    """Orthogonalised, biases of the experts too: transformers' logits are those of ablation."""
    direction = np.random.default_rng(0).normal(size=D).astype(np.float32)
    save_file({"direction": direction}, tmp_path / "direction.safetensors")
    request = conversion.Request(
        source=str(packed),
        to="hf",
        out=str(tmp_path / "out"),
        edit="orthogonalize",
        direction=str(tmp_path / "direction.safetensors"),
        dtype="float32",
    )
    out = conversion.convert(request, log=lambda _: None)
    model = jr.load_model(str(packed))
    ids = random_ids(model.arch.vocab)
    expected = jr.logits(model, ids, edit=jr.ablate(direction, model.arch.layers))
    assert_close(hf_everything(tiny.hf_model(out), ids)[0], expected, PARITY)


def test_without_a_word_it_leaves_in_bfloat16(packed: Path, tmp_path: Path) -> None:
    """The config of such a source names no dtype; what is not packed there is in bfloat16."""
    source = tmp_path / "source"
    source.mkdir()
    for file in packed.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    request = conversion.Request(source=str(source), to="hf", out=str(tmp_path / "out"))
    out = conversion.convert(request, log=lambda _: None)
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "quantization_config" not in written
    again, whole = (jr.load_model(str(path), dtype="bfloat16") for path in (out, packed))
    assert again.arch == whole.arch
    for leaf, values in whole.leaves().items():
        np.testing.assert_array_equal(values, again.leaves()[leaf], err_msg=leaf)


# What cannot be read

DOWN = PREFIX.format(1) + "down_proj"


def change(tensors: dict[str, np.ndarray], what: str) -> None:
    blocks, scales = tensors[f"{DOWN}_blocks"], tensors[f"{DOWN}_scales"]
    if what == "no scales":
        del tensors[f"{DOWN}_scales"]
    elif what == "no blocks":
        del tensors[f"{DOWN}_blocks"]
    elif what == "neither":
        del tensors[f"{DOWN}_blocks"], tensors[f"{DOWN}_scales"]
    elif what == "half a block":
        tensors[f"{DOWN}_blocks"] = np.ascontiguousarray(blocks[..., :8])
    elif what == "fewer outputs":
        tensors[f"{DOWN}_blocks"] = np.ascontiguousarray(blocks[:, 1:])
        tensors[f"{DOWN}_scales"] = np.ascontiguousarray(scales[:, 1:])
    elif what == "twice":
        tensors[DOWN] = np.zeros((E, F, D), np.float32)
    elif what == "as floats":
        tensors[f"{DOWN}_blocks"] = blocks.astype(np.float32)
    elif what == "bytes elsewhere":
        tensors["model.norm.weight"] = np.ones(D, np.uint8)
    elif what == "left over":
        tensors["model.side_blocks"], tensors["model.side_scales"] = blocks.copy(), scales.copy()
    elif what == "no number":
        scales[0, 0, 0] = 255


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no scales", r"1.mlp.experts.down_proj: lacks its _scales"),
        ("no blocks", r"1.mlp.experts.down_proj: lacks its _blocks"),
        ("neither", r"missing \S+1.mlp.experts.down_proj \(6, 32, 64\)"),
        (
            "half a block",
            r"down_proj: its _blocks have shape \(6, 64, 1, 8\) and its _scales \(6, 64, 1\)",
        ),
        ("fewer outputs", r"down_proj has shape \(6, 32, 63\), not \(6, 32, 64\)"),
        ("twice", r"down_proj is there twice"),
        ("as floats", r"down_proj_blocks in \S+ is stored as F32; supported are \['U8'\]"),
        ("bytes elsewhere", r"model.norm.weight in \S+ is stored as U8; supported are \['BF16'"),
        ("left over", r"unused model.side \(6, 32, 64\)"),
        ("no number", r"not finite .*1.mlp.experts.down_proj"),
    ],
)
def test_broken_pairs_are_named(what: str, words: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    tensors = load_file(packed / "model.safetensors")
    change(tensors, what)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=words):
        jr.load_model(str(tmp_path))


def test_bytes_are_refused_where_the_config_names_no_quantisation(
    packed: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((packed / "model.safetensors").read_bytes())
    with pytest.raises(ConversionError, match=r"down_proj_blocks in .* is stored as U8"):
        jr.load_model(str(tmp_path))
