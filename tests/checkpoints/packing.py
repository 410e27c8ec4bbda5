"""Random quantised weights, packed one number at a time by the formats' descriptions.

Letters: O outputs, I inputs of a projection. Each function gives the tensors of a weight by how
their names end behind the module's, and the weight [O, I] that they stand for.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

F16, BF16, F8 = np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of a word from its low end, as AutoAWQ packs them
Random = np.random.Generator
Quantised = tuple[dict[str, np.ndarray], np.ndarray]
Maker = Callable[[Random, int, int], Quantised]


def pack(
    numbers: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None
) -> np.ndarray:
    """Whole numbers from 0 on in words of 32 bits along an axis, the first in the lowest bits."""
    rows = np.moveaxis(numbers, axis, 0).astype(np.uint64)
    each = 32 // bits
    words = np.zeros((-(-len(rows) // each), *rows.shape[1:]), np.uint64)
    for word in range(len(words)):
        for place in range(each):
            row = word * each + (order[place] if order else place)
            if row < len(rows):
                words[word] |= rows[row] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis))


def random_scales(random: Random, shape: tuple[int, ...], largest: float, dtype: Any) -> np.ndarray:
    """So that the weights are of an ordinary size, where codes go up to `largest`."""
    return (random.uniform(0.1, 0.4, shape) / largest).astype(dtype)


def spread(values: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The value of each block at each of its numbers, in float32."""
    every = np.empty(shape, np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            rows = slice(row * block[0], (row + 1) * block[0])
            columns = slice(column * block[1], (column + 1) * block[1])
            every[rows, columns] = values[row, column]
    return every


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def fp8(
    block: tuple[int, int] | None = (32, 48),
    dtype: Any = np.float32,
    name: str = "weight_scale_inv",
    scale: tuple[int, ...] | None = None,  # its shape, where it is of no blocks
) -> Maker:
    def make(random: Random, O: int, I: int) -> Quantised:
        codes = np.clip(random.normal(size=(O, I)) * 100, -448, 448).astype(F8)
        size = block or ((1, I) if scale and scale[0] == -1 else (O, I))
        scales = random_scales(random, grid((O, I), size), 150, dtype)
        weight = codes.astype(np.float32) * spread(scales, (O, I), size)
        if scale is not None:
            scales = scales.reshape(scale)
        return {"weight": codes, name: scales}, weight

    return make


def fp8_powers(random: Random, O: int, I: int) -> Quantised:
    """Scales of 32 inputs, stored as exponents of 2."""
    codes = np.clip(random.normal(size=(O, I)) * 100, -448, 448).astype(F8)
    exponents = random.integers(116, 120, (O, I // 32), dtype=np.uint8)
    scales = 2.0 ** (exponents.astype(np.float64) - 127)
    weight = codes.astype(np.float32) * spread(scales, (O, I), (1, 32))
    return {"weight": codes, "weight_scale_inv": exponents}, weight


def awq(group: int = 32) -> Maker:
    def make(random: Random, O: int, I: int) -> Quantised:
        size = I if group == -1 else group
        codes, zeros = random.integers(16, size=(O, I)), random.integers(16, size=(O, I // size))
        scales = random_scales(random, (O, I // size), 8, F16)
        weight = codes - spread(zeros, (O, I), (1, size))
        weight = (weight * spread(scales, (O, I), (1, size))).astype(F16)
        parts = {
            "qweight": pack(codes.T, 4, 1, AWQ_ORDER),
            "qzeros": pack(zeros.T, 4, 1, AWQ_ORDER),
            "scales": np.ascontiguousarray(scales.T),
        }
        return parts, weight.astype(np.float32)

    return make


def gptq(
    bits: int = 4, group: int = 32, v2: bool = False, order: str = "", dtype: Any = F16
) -> Maker:
    """order: of g_idx; "" for none, "blocks", or "shuffled"."""

    def make(random: Random, O: int, I: int) -> Quantised:
        size = I if group == -1 else group
        of = np.arange(I) // size
        if order == "shuffled":
            of = random.permutation(of)
        codes = random.integers(2**bits, size=(O, I))
        zeros = random.integers(0 if v2 else 1, 2**bits, size=(O, I // size))
        scales = random_scales(random, (O, I // size), 2 ** (bits - 1), dtype)
        weight = np.empty((O, I), np.float32)
        for column in range(I):
            exact = (codes[:, column] - zeros[:, of[column]]) * scales[:, of[column]].astype("f4")
            weight[:, column] = exact.astype(dtype)
        parts = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(zeros.T - (not v2), bits, 1),
            "scales": np.ascontiguousarray(scales.T),
        }
        return parts | ({"g_idx": of.astype(np.int32)} if order else {}), weight

    return make


def compressed(
    bits: int = 4,
    block: tuple[int, int] = (1, 32),  # -1 is all
    packed: bool = True,
    zeros: str = "",  # "" for none, "packed" or "bytes"
    order: bool = False,
    dtype: Any = BF16,
    flat: bool = False,  # scales without the dimension of size 1
) -> Maker:
    def make(random: Random, O: int, I: int) -> Quantised:
        size = (O if block[0] == -1 else block[0], I if block[1] == -1 else block[1])
        half, of = 2 ** (bits - 1), np.arange(I) // size[1]
        if order:
            of = random.permutation(of)
        codes = random.integers(-half, half, (O, I))
        shape = grid((O, I), size)
        zero = random.integers(-half, half, shape) if zeros else np.zeros(shape, np.int64)
        scales = random_scales(random, shape, half, dtype)
        weight = np.empty((O, I), np.float32)
        for column in range(I):
            rows = np.arange(O) // size[0]
            exact = codes[:, column] - zero[rows, of[column]]
            exact = exact.astype("f4") * scales[rows, of[column]].astype("f4")
            weight[:, column] = exact.astype(dtype)
        parts = {"weight_scale": scales.reshape(-1) if flat else scales}
        if packed:
            parts["weight_packed"] = pack(codes + half, bits, 1)
            parts["weight_shape"] = np.array([O, I])
        else:
            parts["weight"] = codes.astype(np.int8)
        if zeros:
            whole = pack(zero + half, bits, 0) if zeros == "packed" else zero.astype(np.int8)
            parts["weight_zero_point"] = whole
        if order:
            parts["weight_g_idx"] = of.astype(np.int32)
        return parts, weight

    return make


def compressed_floats(block: tuple[int, int], dtype: Any = BF16) -> Maker:
    def make(random: Random, O: int, I: int) -> Quantised:
        size = (O if block[0] == -1 else block[0], I if block[1] == -1 else block[1])
        made = fp8(size, dtype, "weight_scale")
        parts, weight = made(random, O, I)
        if block == (-1, -1):
            parts["weight_scale"] = parts["weight_scale"].reshape(1)
        return parts, weight.astype(dtype).astype(np.float32)

    return make


def bnb8(random: Random, O: int, I: int) -> Quantised:
    codes = random.integers(-127, 128, (O, I), dtype=np.int8)
    largest = random.uniform(0.1, 0.4, O).astype(np.float32)
    weight = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
    return {"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}, weight


def bnb4(
    kind: str = "nf4", block: int = 64, nested: bool = False, dtype: Any = BF16, stored: Any = "u1"
) -> Maker:
    def make(random: Random, O: int, I: int) -> Quantised:
        table = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
        codes = random.integers(16, size=O * I)
        count = -(-O * I // block)
        parts = {}
        if nested:
            nested_table = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            absmax = random.integers(256, size=count, dtype=np.uint8)
            nested_absmax = random.uniform(0.01, 0.1, -(-count // 256)).astype(np.float32)
            scales = np.empty(count, np.float32)
            for i in range(count):
                scales[i] = nested_table[absmax[i]] * nested_absmax[i // 256] + np.float32(0.25)
            parts = {"weight.nested_absmax": nested_absmax, "weight.nested_quant_map": nested_table}
        else:
            absmax = scales = random.uniform(0.1, 0.4, count).astype(np.float32)
        weight = np.empty(O * I, np.float32)
        for i in range(count):
            own = slice(i * block, (i + 1) * block)
            weight[own] = table[codes[own]] * scales[i]
        state = {"quant_type": kind, "blocksize": block, "dtype": np.dtype(dtype).name}
        state["shape"] = [O, I]
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        pairs = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
        parts |= {
            "weight": pairs.view(stored)[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": table,
            f"weight.quant_state.bitsandbytes__{kind}": np.frombuffer(
                json.dumps(state).encode(), np.uint8
            ),
        }
        return parts, weight.reshape(O, I).astype(dtype).astype(np.float32)

    return make


def of_compressed(form: str, *weights: dict[str, Any]) -> dict[str, Any]:
    """The config of compressed-tensors, as its library writes it."""
    groups = {
        f"group_{i}": {
            "targets": ["Linear"],
            "weights": {"dynamic": False, "observer": "minmax", "symmetric": True, **each},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
        for i, each in enumerate(weights)
    }
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": form,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }


def _int(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", **more}


GROUP = {"strategy": "group", "group_size": 32}
FLOAT = {"num_bits": 8, "type": "float"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}

SEVERAL = of_compressed("mixed-precision", {**FLOAT, "strategy": "channel"}, _int(4, **GROUP))
SEVERAL["config_groups"]["group_0"]["format"] = "float-quantized"
SEVERAL["config_groups"]["group_1"]["format"] = "pack-quantized"

# What lies in `quantization_config`, and how the weights are made.
CASES: dict[str, tuple[dict[str, Any], Maker]] = {
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 48]}, fp8()),
    "fp8 blocks, bfloat16 scales": (
        {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"},
        fp8(dtype=BF16),
    ),
    "fp8 a tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None, scale=())),
    "fp8 of before": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8(None, name="weight_scale", scale=(1,)),
    ),
    "fp8 a channel": ({"quant_method": "fp8"}, fp8(None, name="weight_scale", scale=(-1, 1))),
    "mxfp8": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, fp8_powers),
    "compressed 4 bits": (
        of_compressed("pack-quantized", _int(4, **GROUP)),
        compressed(),
    ),
    "compressed 4 bits, zeros": (
        of_compressed("pack-quantized", _int(4, symmetric=False, **GROUP)),
        compressed(zeros="packed", dtype=F16),
    ),
    "compressed 4 bits, zeros in bytes": (
        of_compressed("pack-quantized", _int(4, symmetric=False, **GROUP)),
        compressed(zeros="bytes"),
    ),
    "compressed 4 bits, by activation": (
        of_compressed("pack-quantized", _int(4, actorder="group", symmetric=False, **GROUP)),
        compressed(zeros="packed", order=True),
    ),
    "compressed 4 bits a channel": (
        of_compressed("pack-quantized", _int(4, strategy="channel", symmetric=False)),
        compressed(block=(1, -1), zeros="packed"),
    ),
    "compressed 8 bits, packed": (
        of_compressed("pack-quantized", _int(8, strategy="channel")),
        compressed(bits=8, block=(1, -1)),
    ),
    "compressed 8 bits": (
        of_compressed("int-quantized", _int(8, strategy="channel")),
        compressed(bits=8, block=(1, -1), packed=False, dtype=np.float32),
    ),
    "compressed 8 bits, zeros": (
        of_compressed("naive-quantized", _int(8, symmetric=False, **GROUP)),
        compressed(bits=8, packed=False, zeros="bytes"),
    ),
    "compressed floats a tensor": (
        of_compressed("float-quantized", {**FLOAT, "strategy": "tensor"}),
        compressed_floats((-1, -1)),
    ),
    "compressed floats a channel": (
        of_compressed("naive-quantized", {**FLOAT, "strategy": "channel"}),
        compressed_floats((1, -1)),
    ),
    "compressed floats in blocks": (
        of_compressed(
            "float-quantized", {**FLOAT, "strategy": "block", "block_structure": "32x48"}
        ),
        compressed_floats((32, 48)),
    ),
    "compressed, several ways": (SEVERAL, compressed()),
    "awq": (AWQ, awq()),
    "awq a channel": ({**AWQ, "group_size": -1}, awq(-1)),
    "gptq": (GPTQ, gptq()),
    "gptq of 8 bits": ({**GPTQ, "bits": 8}, gptq(8)),
    "gptq a channel": ({**GPTQ, "group_size": -1, "checkpoint_format": "gptq"}, gptq(group=-1)),
    "gptq, version 2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(v2=True, order="blocks")),
    "gptq by activation": ({**GPTQ, "desc_act": True}, gptq(order="shuffled", dtype=BF16)),
    "bitsandbytes 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "bitsandbytes nf4": (BNB4, bnb4()),
    "bitsandbytes fp4, nested": (
        {**BNB4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        bnb4("fp4", 32, nested=True, dtype=np.float32),
    ),
    "bitsandbytes in bfloat16": ({**BNB4, "bnb_4bit_quant_storage": "bfloat16"}, bnb4(stored=BF16)),
}
