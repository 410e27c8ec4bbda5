"""bitsandbytes: integers of 8 bits with a scale for each output, or 4-bit codes of a table.

Letters: O outputs, I inputs, N numbers of a weight. Of 8 bits, a weight [O, I] is its codes times
SCB / 127. Of 4 bits, all N numbers follow each other, two in a byte, the first in its high half;
`absmax` scales each block of them, and may be codes of 8 bits itself ("double quantisation").
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jax_refusal.checkpoints.quantised.codes import (
    as_slice,
    blocks,
    chunks,
    ranges,
    reshaped,
    scaled,
    whole,
)
from jax_refusal.checkpoints.quantised.config import Fields, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import FLOATS, Tensor

PART = re.compile(
    r"(.*)(\.weight|\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))|\.SCB|\.weight_format)"
)
STATES = {kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
DTYPES = {
    ".weight": {*FLOATS, "U8", "I8"},
    ".weight.absmax": {"F32", "U8"},
    ".weight.quant_map": {"F32"},
    ".weight.nested_absmax": {"F32"},
    ".weight.nested_quant_map": {"F32"},
    ".SCB": {"F32"},
    ".weight_format": {"U8"},
    **{name: {"U8"} for name in STATES.values()},
}
STATE_BYTES = 4096  # of JSON, at most
LARGEST_BLOCK = 4096
OUT = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
PER_127 = np.float32(7.874015718698502e-3)  # as bitsandbytes divides by 127


def read(given: Mapping[str, Any], vouched: Collection[str]) -> Format:
    fields = Fields(given, vouched)
    in_8 = bool(fields.get("load_in_8bit", "_load_in_8bit"))
    in_4 = bool(fields.get("load_in_4bit", "_load_in_4bit"))
    if in_8 == in_4:
        fields.wrong(("load_in_4bit",), in_4, "supported: one of load_in_4bit and load_in_8bit")
    if in_4:
        fields.one_of("bnb_4bit_quant_type", of=tuple(STATES), default="fp4")
    fields.empty("llm_int8_has_fp16_weight")
    fields.without_effect(
        """llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload
        bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
        load_in_8bit _load_in_8bit load_in_4bit _load_in_4bit"""
    )
    refuse("bitsandbytes", fields.finish())
    return Format(
        label=f"bitsandbytes ({4 if in_4 else 8} bits)",
        part=PART,
        whole=".weight",
        dtypes=DTYPES,
        build=_of_4_bits if in_4 else _of_8_bits,
        plain=".weight",
    )


def _of_8_bits(parts: Parts) -> Tensor:
    codes, scales = parts.need(".weight", ".SCB")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise ValueError(f"is {codes.dtype} of shape {codes.shape}, not I8 [outputs, inputs]")
    O, I = codes.shape
    parts.fit({".SCB": (O,)})
    if ".weight_format" in parts and whole(parts[".weight_format"]).any():
        raise ValueError("lies in another order than by rows (.weight_format is not 0)")
    times_127 = scaled(codes, reshaped(scales, (O, 1)), (1, I))

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        found = times_127[slices]
        found *= PER_127
        return found

    return Tensor((O, I), read)


@dataclasses.dataclass(frozen=True)
class State:
    """What the file says of a weight of 4 bits."""

    shape: tuple[int, int]
    block: int
    dtype: np.dtype
    nested_block: int
    offset: np.float32  # of `absmax`, where it is stored as codes


def _of_4_bits(parts: Parts) -> Tensor:
    kinds = [kind for kind, name in STATES.items() if name in parts]
    if len(kinds) != 1:
        raise ValueError(f"needs one of {list(STATES.values())}")
    packed, absmax, table = parts.need(".weight", ".weight.absmax", ".weight.quant_map")
    state = _state(parts[STATES[kinds[0]]])
    N = math.prod(state.shape)
    held = math.prod(packed.shape) * _itemsize(packed)
    if held != blocks(N, 2) or packed.shape[1:] != (1,):
        raise ValueError(f"has {held} bytes in shape {packed.shape} for {N} numbers of 4 bits")
    parts.fit({".weight.absmax": (blocks(N, state.block),), ".weight.quant_map": (16,)})
    if absmax.dtype == "U8":
        nested, nested_table = parts.need(".weight.nested_absmax", ".weight.nested_quant_map")
        count = blocks(absmax.shape[0], state.nested_block)
        parts.fit({".weight.nested_absmax": (count,), ".weight.nested_quant_map": (256,)})
        absmax = _nested(absmax, whole(nested), whole(nested_table), state)
    values = whole(table)

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        rows, columns = ranges(slices, state.shape)
        I = state.shape[1]
        found, done = np.empty((len(rows), len(columns)), state.dtype), 0
        for part in chunks(rows, I):
            first, last = part.start * I, (part[-1] + 1) * I
            numbers = _flat(packed, absmax, values, state.block, first, last)
            every = numbers.reshape(-1, I)[:: part.step, as_slice(columns)]
            with np.errstate(over="ignore"):  # the loader names what is not finite
                found[done : done + len(part)] = every
            done += len(part)
        return found

    return Tensor(state.shape, read)


def _flat(
    packed: Tensor, absmax: Tensor, table: np.ndarray, block: int, first: int, last: int
) -> np.ndarray:
    """The numbers first..last of a weight, in float32."""
    size = _itemsize(packed)
    low, high = first // 2 // size, blocks(blocks(last, 2), size)
    read = np.ascontiguousarray(packed[slice(low, high), slice(None)]).view(np.uint8).reshape(-1)
    codes = np.empty(2 * read.size, np.uint8)
    codes[::2], codes[1::2] = read >> 4, read & 15
    start = 2 * size * low
    values = np.take(table, codes[first - start : last - start])
    scales = absmax[(slice(first // block, blocks(last, block)),)]
    skipped = first - first // block * block
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.repeat(scales, block)[skipped : skipped + last - first]
    return values


def _nested(absmax: Tensor, nested: np.ndarray, table: np.ndarray, state: State) -> Tensor:
    def read(slices: tuple[slice, ...]) -> np.ndarray:
        (wanted,) = ranges(slices, absmax.shape)
        of_block = np.arange(wanted.start, wanted.stop) // state.nested_block
        return table[absmax[slices]] * nested[of_block] + state.offset

    return Tensor(absmax.shape, read)


def _itemsize(packed: Tensor) -> int:
    return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(packed.dtype, 1)


def _state(tensor: Tensor) -> State:
    """Its JSON; ValueError where that is none, or says what cannot be."""
    if len(tensor.shape) != 1 or tensor.shape[0] > STATE_BYTES:
        raise ValueError(f"its quant_state has shape {tensor.shape}")
    text = whole(tensor).tobytes()
    try:
        said = json.loads(text)
        shape = tuple(said["shape"])
        block, nested = said["blocksize"], said.get("nested_blocksize", 256)
        offset, dtype = said.get("nested_offset", 0.0), OUT[said["dtype"]]
        sizes = [*shape, block, nested]
        good = len(shape) == 2 and all(type(size) is int and size > 0 for size in sizes)
        if not (good and max(block, nested) <= LARGEST_BLOCK and math.isfinite(offset)):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"its quant_state says {text[:200]!r}, which cannot be") from None
    return State((shape[0], shape[1]), block, dtype, nested, np.float32(offset))
