"""Quantised checkpoints whose tensors do not fit: one error that names them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_refusal as jr
from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.tensors import ConversionError
from tests.checkpoints.packing import CASES
from tests.checkpoints.test_quantised import quantise

Tensors = dict[str, np.ndarray]
UP = "model.layers.2.mlp.up_proj."  # [128, 64]


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[UP + name]

    return change


def cut(name: str, part: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[UP + name] = np.ascontiguousarray(tensors[UP + name][part])

    return change


def put(name: str, values: np.ndarray) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[UP + name] = values

    return change


def set_first(name: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        values = tensors[UP + name] = tensors[UP + name].copy()
        values.reshape(-1)[0] = value

    return change


def to(name: str, dtype: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[UP + name] = tensors[UP + name].astype(dtype)

    return change


PACKED, ZEROS, ORDERED = (
    "compressed 4 bits",
    "compressed 4 bits, zeros",
    "compressed 4 bits, by activation",
)
NF4, STATE = "bitsandbytes nf4", "weight.quant_state.bitsandbytes__nf4"
NESTED = "bitsandbytes fp4, nested"
BROKEN: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "awq, parts missing": (
        "awq",
        without("qzeros", "scales"),
        r"2.mlp.up_proj.weight: lacks its .qzeros and .scales",
    ),
    "awq, all missing": (
        "awq",
        without("qweight", "qzeros", "scales"),
        r"missing \S+up_proj.weight \(128, 64\)",
    ),
    "awq, another group size": (
        "awq",
        cut("scales", slice(1)),
        r"up_proj.weight: its .scales has shape \(1, 128\), not \(2, 128\)",
    ),
    "awq, fewer outputs": (
        "awq",
        cut("qweight", (slice(None), slice(1, None))),
        r"its .qzeros has shape \(2, 16\), not \(2, 15\) and its .scales",
    ),
    "awq, twice": (
        "awq",
        put("weight", np.zeros((128, 64), "f4")),
        "up_proj.weight is there twice",
    ),
    "awq, no number": ("awq", set_first("scales", np.nan), r"not finite .*: \S+2.mlp.up_proj"),
    "awq, infinite": ("awq", set_first("scales", np.inf), r"not finite .*: \S+2.mlp.up_proj"),
    "awq, floats for codes": ("awq", to("qweight", "f4"), r"qweight in \S+ is stored as F32"),
    "awq, one dimension": ("awq", cut("qweight", 0), r"its .qweight has shape \(16,\)"),
    "awq, nothing": ("awq", put("qweight", np.zeros((0, 16), "i4")), "no numbers in its .qweight"),
    "gptq, nothing": ("gptq", put("qweight", np.zeros((0, 8), "i4")), "no numbers in its .qweight"),
    "gptq, another group size": (
        "gptq",
        cut("qzeros", slice(1)),
        r"its .qzeros has shape \(1, 16\), not \(2, 16\)",
    ),
    "gptq, no order": ("gptq by activation", without("g_idx"), "lacks its .g_idx"),
    "gptq, a group too many": (
        "gptq by activation",
        set_first("g_idx", 2),
        r"its .g_idx names groups 0 to 2 of 2",
    ),
    "gptq, short order": ("gptq by activation", cut("g_idx", slice(60)), r"its .g_idx has shape"),
    "fp8, no scale": ("fp8 blocks", without("weight_scale_inv"), "has 0 of _scale_inv and _scale"),
    "fp8, nothing": (
        "fp8 a tensor",
        put("weight", np.zeros((0, 64), ml_dtypes.float8_e4m3fn)),
        "no numbers in its",
    ),
    "fp8, two scales": (
        "fp8 blocks",
        put("weight_scale", np.ones((), "f4")),
        "has 2 of _scale_inv and _scale",
    ),
    "fp8, other blocks": (
        "fp8 blocks",
        cut("weight_scale_inv", slice(2)),
        r"scales of shape \(2, 2\), not one of \[\(4, 2\)\] \(weight_block_size=\(32, 48\)\)",
    ),
    "fp8, a scale of a plain weight": (
        "fp8 blocks",
        to("weight", "f4"),
        "is stored as F32, not as",
    ),
    "fp8, no codes": ("fp8 blocks", without("weight"), "up_proj.weight: lacks its"),
    "compressed, no scales": (PACKED, without("weight_scale"), "lacks its .weight_scale"),
    "compressed, no shape": (PACKED, without("weight_shape"), "lacks its .weight_shape"),
    "compressed, another shape": (
        PACKED,
        put("weight_shape", np.array([128, 96])),
        r"its .weight_packed has shape \(128, 8\), not \(128, 12\)",
    ),
    "compressed, no shape at all": (
        PACKED,
        put("weight_shape", np.array([-128, 64])),
        r"its shape is \(-128, 64\)",
    ),
    "compressed, another group size": (
        PACKED,
        cut("weight_scale", (slice(None), slice(1))),
        r"its scales have shape \(128, 1\), not \(128, 2\)",
    ),
    "compressed, both": (PACKED, put("weight", np.zeros((128, 64), "f4")), "is there twice"),
    "compressed, no zeros": (ZEROS, without("weight_zero_point"), "lacks its .weight_zero_point"),
    "compressed, fewer zeros": (
        ZEROS,
        cut("weight_zero_point", slice(4)),
        r"its packed zeros have shape \(4, 2\), not \(16, 2\)",
    ),
    "compressed, groups of other sizes": (
        ORDERED,
        put("weight_g_idx", np.zeros(64, "i4")),
        "its .weight_g_idx does not make 2 groups of 32 inputs",
    ),
    "compressed, not compressed": (
        "compressed 8 bits",
        to("weight", "f4"),
        "its codes are stored as F32, not as I8",
    ),
    "bitsandbytes, no scales": ("bitsandbytes 8 bits", without("SCB"), "lacks its .SCB"),
    "bitsandbytes, columns": (
        "bitsandbytes 8 bits",
        put("weight_format", np.ones((), np.uint8)),
        "lies in another order than by rows",
    ),
    "bitsandbytes, no state": (NF4, without(STATE), "needs one of"),
    "bitsandbytes, no byte": (
        NF4,
        put(STATE, np.zeros(0, np.uint8)),
        "no numbers in its .weight.q",
    ),
    "bitsandbytes, a state that is none": (
        NF4,
        put(STATE, np.frombuffer(b"[" * 4000, np.uint8)),
        "which cannot be",
    ),
    "bitsandbytes, a long state": (
        NF4,
        put(STATE, np.zeros(5000, np.uint8)),
        "quant_state has shape",
    ),
    "bitsandbytes, another shape": (
        NF4,
        put(
            STATE,
            np.frombuffer(b'{"shape": [128, 96], "blocksize": 64, "dtype": "float16"}', np.uint8),
        ),
        r"has 4096 bytes in shape \(4096, 1\) for 12288 numbers",
    ),
    "bitsandbytes, no block": (
        NF4,
        put(
            STATE,
            np.frombuffer(b'{"shape": [128, 64], "blocksize": 0, "dtype": "float16"}', np.uint8),
        ),
        "which cannot be",
    ),
    "bitsandbytes, a large block": (
        NF4,
        put(
            STATE,
            np.frombuffer(b'{"shape": [128, 64], "blocksize": 1e30, "dtype": "float16"}', np.uint8),
        ),
        "which cannot be",
    ),
    "bitsandbytes, other blocks": (NF4, cut("weight.absmax", slice(9)), r"absmax has shape \(9,\)"),
    "bitsandbytes, no nested scales": (
        NESTED,
        without("weight.nested_absmax", "weight.nested_quant_map"),
        "lacks its .weight.nested_absmax and .weight.nested_quant_map",
    ),
}


Quantised = Callable[[str], tuple[Path, Tensors]]


@pytest.fixture(scope="module")
def quantised(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """Writes a model of a case once; returns its folder and the tensors in it."""
    written: dict[str, tuple[Path, Tensors]] = {}

    def write(case: str) -> tuple[Path, Tensors]:
        if case not in written:
            folder = tmp_path_factory.mktemp("quantised")
            written[case] = folder, quantise(tiny_dir, folder, *CASES[case])[0]
        return written[case]

    return write


def changed(source: tuple[Path, Tensors], folder: Path, change: Callable[[Tensors], None]) -> str:
    (folder / "config.json").write_bytes((source[0] / "config.json").read_bytes())
    tensors = dict(source[1])
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_named(name: str, quantised: Quantised, tmp_path: Path) -> None:
    case, change, words = BROKEN[name]
    with pytest.raises(ConversionError, match=words):
        jr.load_model(changed(quantised(case), tmp_path, change))


def test_all_weights_that_do_not_fit_are_named(quantised: Quantised, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith(".scales"):
                del tensors[name]

    with pytest.raises(ConversionError) as error:
        jr.load_model(changed(quantised("awq"), tmp_path, change))
    assert str(error.value).count("lacks its .scales") == 20
    assert "and 8 more" in str(error.value)


def test_scales_of_activations_and_caches_change_nothing(
    quantised: Quantised, tmp_path: Path
) -> None:
    one = np.ones(1, np.float32)

    def change(tensors: Tensors) -> None:
        for name in ("mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.v_scale"):
            tensors[f"model.layers.0.{name}"] = one
        tensors["model.layers.0.self_attn.k_proj.output_scale"] = one.astype(ml_dtypes.bfloat16)

    source = quantised("fp8 blocks")
    before = jr.load_model(str(source[0])).leaves()
    after = jr.load_model(changed(source, tmp_path, change)).leaves()
    for leaf, values in before.items():
        np.testing.assert_array_equal(after[leaf], values, err_msg=leaf)


def test_biases_that_gptq_adds(quantised: Quantised, tmp_path: Path) -> None:
    """Of zeros, for layers that have none; one that is not zero is another model."""
    name, zeros = "model.layers.1.mlp.down_proj.bias", np.zeros(64, np.float16)
    source = quantised("gptq")
    jr.load_model(changed(source, tmp_path, lambda tensors: tensors.update({name: zeros})))
    with pytest.raises(ConversionError, match=f"unused {name}"):
        jr.load_model(changed(source, tmp_path, lambda tensors: tensors.update({name: zeros + 1})))
    with pytest.raises(ConversionError, match=f"unused {name}"):
        jr.load_model(
            changed(quantised("awq"), tmp_path, lambda tensors: tensors.update({name: zeros}))
        )


def test_a_group_that_is_larger_than_all(tiny_dir: Path, tmp_path: Path) -> None:
    """Is all: one scale an output."""
    config, make = CASES["gptq a channel"]
    _, numbers = quantise(tiny_dir, tmp_path, {**config, "group_size": 10**30}, make)
    found = dict(hf.to_hugging_face(jr.load_model(str(tmp_path))))
    np.testing.assert_array_equal(found[UP + "weight"], numbers[UP + "weight"])


def test_quantised_tensors_without_a_config_are_refused(
    quantised: Quantised, tmp_path: Path
) -> None:
    source, _ = quantised("gptq")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ConversionError, match=r"is stored as I32.*unless a quantization_config"):
        jr.load_model(str(tmp_path))
