"""Quantised checkpoints are the numbers that they stand for, whatever part of them is read.

The weights are packed by tests/checkpoints/packing.py, one number at a time.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.quantised.formats import Format
from jax_refusal.checkpoints.quantised.registry import quantisation
from jax_refusal.checkpoints.tensors import Tensor, read_safetensors
from jax_refusal.run import convert as conversion
from tests.checkpoints.packing import CASES, Maker, fp8, gptq

Checkpoint = Callable[..., Path]
QUANTISED = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp).*_proj)\.weight")
ONE_OF_EACH = ("fp8 blocks", "compressed 4 bits, zeros", "awq", "gptq", "bitsandbytes nf4")
NAME = "model.layers.0.mlp.up_proj"
STORED = {  # as a safetensors file calls numpy's dtypes
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


def format_of(config: Mapping[str, Any]) -> Format:
    found = quantisation({"model_type": "llama", "quantization_config": config})
    assert found is not None
    return found


def in_file(parts: Mapping[str, np.ndarray], folder: Path, form: Format) -> Tensor:
    """The weight NAME that these parts make, read from a file."""
    named = {f"{NAME}.{part}": values for part, values in parts.items()}
    save_file(named, folder / "model.safetensors")
    tensors = form.dequantised(read_safetensors([folder / "model.safetensors"], form.allowed))
    assert list(tensors) == [f"{NAME}.weight"]
    return tensors[f"{NAME}.weight"]


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_exact_and_any_slice_is_that_part(case: str, tmp_path: Path) -> None:
    config, make = CASES[case]
    parts, weight = make(np.random.default_rng(0), 80, 96)
    found = in_file(parts, tmp_path, format_of(config))
    assert found.shape == weight.shape
    whole = found[(slice(None), slice(None))].astype(np.float32)
    # To the bit, but that 8 bits of bitsandbytes are divided by 127 in another order.
    tolerance = 2e-7 if case == "bitsandbytes 8 bits" else 0
    np.testing.assert_allclose(whole, weight, rtol=tolerance, atol=0)
    for slices in (
        (slice(0, 80), slice(40, 50)),
        (slice(7, 8), slice(0, 96)),
        (slice(31, 66, 5), slice(33, 95, 3)),
        (slice(79, 80), slice(95, 96)),
        (slice(0, 80, 2), slice(None)),
    ):
        np.testing.assert_array_equal(found[slices].astype(np.float32), whole[slices])


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_what_is_read_in_chunks_is_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, make = CASES[case]
    parts, weight = make(np.random.default_rng(1), 48, 64)
    found = in_file(parts, tmp_path, format_of(config))
    monkeypatch.setattr("jax_refusal.checkpoints.quantised.codes.CHUNK", 200)  # 3 rows
    for slices in ((slice(0, 48), slice(0, 64)), (slice(1, 47, 2), slice(5, 64))):
        np.testing.assert_array_equal(found[slices].astype(np.float32), weight[slices])


@pytest.mark.parametrize("case", CASES)
def test_a_slice_reads_little_more_than_its_own(case: str) -> None:
    """An eighth of the outputs is an eighth of the codes."""
    config, make = CASES[case]
    parts, _ = make(np.random.default_rng(3), 128, 96)
    read: list[int] = []

    def tensor(values: np.ndarray) -> Tensor:
        def part(slices: tuple[slice, ...]) -> np.ndarray:
            read.append(values[slices].nbytes)
            return values[slices]

        return Tensor(values.shape, part, STORED[values.dtype.name])

    tensors = {f"{NAME}.{name}": tensor(values) for name, values in parts.items()}
    found = format_of(config).dequantised(tensors)[f"{NAME}.weight"]
    read.clear()
    assert found[(slice(16, 32), slice(None))].shape == (16, 96)
    codes = max(values.nbytes for values in parts.values())
    others = sum(values.nbytes for values in parts.values()) - codes
    assert sum(read) <= codes / 8 + others


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_gptq_that_borrow_from_the_next(bits: int, tmp_path: Path) -> None:
    """A zero of 0 is stored less one as whole words are, by GPTQModel: all zeros can be stored."""
    config, _ = CASES["gptq, version 2"]
    parts, weight = gptq(bits, v2=True)(np.random.default_rng(2), 64, 96)
    words = parts["qzeros"].view(np.uint32)
    parts["qzeros"] = (words - np.uint32(0x11111111 if bits == 4 else 0x01010101)).view(np.int32)
    form = format_of({**config, "bits": bits, "checkpoint_format": "gptq"})
    found = in_file(parts, tmp_path, form)
    np.testing.assert_array_equal(found[(slice(None), slice(None))].astype(np.float32), weight)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """As transformers writes a mixture in FP8: codes [E, O, I] beside scales of their blocks."""
    config, make = CASES["fp8 blocks"]
    made = [make(np.random.default_rng(seed), 64, 96) for seed in range(3)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    named = {
        name: np.stack([parts["weight"] for parts, _ in made]),
        f"{name}_scale_inv": np.stack([parts["weight_scale_inv"] for parts, _ in made]),
    }
    save_file(named, tmp_path / "model.safetensors")
    form = format_of(config)
    found = form.dequantised(read_safetensors([tmp_path / "model.safetensors"], form.allowed))[name]
    weight = np.stack([weight for _, weight in made])
    for slices in ((slice(None),) * 3, (slice(1, 3), slice(30, 40), slice(5, 60, 7))):
        np.testing.assert_array_equal(found[slices], weight[slices])


# Whole models


Tensors = dict[str, np.ndarray]


def quantise(
    source: Path, folder: Path, config: Mapping[str, Any], make: Maker
) -> tuple[Tensors, Tensors]:
    """Writes the checkpoint with other projections, quantised; returns all of its tensors, as they
    lie in the file and as numbers."""
    numbers = load_file(source / "model.safetensors")
    stored, random = {}, np.random.default_rng(0)
    for name, values in numbers.items():
        match = QUANTISED.fullmatch(name)
        if not match:
            stored[name] = values
            continue
        parts, numbers[name] = make(random, *values.shape)
        stored |= {f"{match[1]}.{part}": part_values for part, part_values in parts.items()}
    plain(source, folder, stored)
    said = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return stored, numbers


def plain(source: Path, folder: Path, numbers: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("family", [{}, {"architecture": "qwen3_moe", "moe_intermediate_size": 32}])
def test_a_model_is_that_of_its_numbers(
    family: dict[str, Any], case: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Every leaf, on one device and on four; experts too, and what is not quantised."""
    source = separate_experts(checkpoint(**family), tmp_path / "source")
    _, numbers = quantise(source, tmp_path / "quantised", *CASES[case])
    wanted = jr.load_model(str(plain(source, tmp_path / "plain", numbers))).leaves()
    for mesh in (jr.make_mesh(1, 1), jr.make_mesh(1, 4)):
        found = jr.load_model(str(tmp_path / "quantised"), mesh=mesh).leaves()
        for leaf, values in wanted.items():
            np.testing.assert_array_equal(found[leaf], values, err_msg=leaf)


def separate_experts(source: Path, folder: Path) -> Path:
    """The checkpoint with a tensor for each expert's projection, as the hub's files have them."""
    numbers = {}
    for name, values in load_file(source / "model.safetensors").items():
        if ".experts." not in name or values.ndim != 3:
            numbers[name] = values
            continue
        for expert, own in enumerate(values):
            stem = f"{name.rpartition('.')[0]}.{expert}."
            if name.endswith("gate_up_proj"):
                gate, up = np.split(own, 2)
                numbers |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
            else:
                numbers[f"{stem}down_proj.weight"] = own
    whole = {name: np.ascontiguousarray(values) for name, values in numbers.items()}
    return plain(source, folder, whole)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_logits_are_those_of_transformers(case: str, tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="Hugging Face's model needs PyTorch")
    from tests import tiny
    from tests.models.test_families import hf_everything, random_ids
    from tests.tolerances import PARITY, assert_close

    _, numbers = quantise(tiny_dir, tmp_path / "quantised", *CASES[case])
    model = jr.load_model(str(tmp_path / "quantised"))
    ids = random_ids(model.arch.vocab)
    theirs, _ = hf_everything(tiny.hf_model(plain(tiny_dir, tmp_path / "plain", numbers)), ids)
    assert_close(jr.logits(model, ids), theirs, PARITY)


def test_floats_of_8_bits_are_those_of_transformers(tiny_dir: Path, tmp_path: Path) -> None:
    """Read and dequantised by its own code."""
    torch = pytest.importorskip("torch", reason="Hugging Face's model needs PyTorch")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    block = (32, 64)  # transformers knows no blocks that are cut off
    config = {"quant_method": "fp8", "weight_block_size": list(block), "ignored_layers": []}
    _, numbers = quantise(tiny_dir, tmp_path, config, fp8(block))
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path),
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(weight_block_size=block, dequantize=True),
    ).state_dict()
    found = dict(hf.to_hugging_face(jr.load_model(str(tmp_path))))
    assert set(found) == set(theirs) == set(numbers)
    for name, values in found.items():
        np.testing.assert_array_equal(values, theirs[name].numpy(), err_msg=name)


def test_a_model_leaves_as_numbers(tiny_dir: Path, tmp_path: Path) -> None:
    """launch.convert writes plain weights, and says what they were."""
    _, numbers = quantise(tiny_dir, tmp_path / "quantised", *CASES["awq"])
    request = conversion.Request(
        source=str(tmp_path / "quantised"), to="hf", out=str(tmp_path / "out"), dtype="float32"
    )
    out = conversion.convert(request, log=lambda _: None)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "| weights | AWQ (4 bits) in the source, numbers" in (out / "README.md").read_text()
    found = load_file(out / "model.safetensors")
    assert set(found) == set(numbers)
    for name, values in numbers.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
