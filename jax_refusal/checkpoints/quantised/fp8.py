"""8-bit floats with scales: one for each block of a weight, each output, or the whole.

Letters: E experts, O outputs and I inputs of a projection. A weight [O, I], or [E, O, I], of floats
of 8 bits lies beside NAME_scale_inv (DeepSeek-V3, Qwen3) or NAME_scale, by which it is multiplied.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from jax_refusal.checkpoints.quantised.codes import (
    SCALES,
    blocks,
    entry,
    scale_grid,
    scaled,
    stacked,
)
from jax_refusal.checkpoints.quantised.config import Fields, is_block, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import FLOATS, Tensor

CODES = {"F8_E4M3", "F8_E5M2"}
EXPONENTS = {"U8", "F8_E8M0"}  # of 2, from -127 on
BLOCK = (128, 128)  # where the config says nothing
PART = re.compile(r"(.*\.(?:weight|experts\.\w+?))(|_scale_inv|_scale)")
SCALE = frozenset({*SCALES, *EXPONENTS})
DTYPES = {"": FLOATS | CODES, "_scale_inv": SCALE, "_scale": SCALE}
EXACT = np.dtype(np.float32)  # as transformers multiplies, whatever the scales are stored as


def read(given: Mapping[str, Any], vouched: Collection[str]) -> Format:
    fields = Fields(given, vouched)
    fields.one_of("fmt", of=("e4m3", "e5m2"), default="e4m3")
    fields.one_of("scale_fmt", of=("float", "ue8m0"), default="float")
    fields.one_of("expert_dtype", of=("fp8",), default="fp8")
    fields.without_effect("activation_scheme kv_cache_scheme weight_block_size")
    block = given.get("weight_block_size", BLOCK)
    if not (block is None or is_block(block)):
        fields.wrong(("weight_block_size",), block, "supported: two whole numbers above 0")
    refuse("FP8", fields.finish())
    sizes: list[tuple[int, int] | None] = [None if block is None else (block[0], block[1])]
    if "weight_block_size" not in given:  # nor have all configs from before there were blocks
        sizes.append(None)
    return Format(
        label="FP8",
        part=PART,
        whole="",
        dtypes=DTYPES,
        build=partial(_build, sizes),
        plain="",
    )


def _build(
    sizes: list[tuple[int, int] | None],  # of blocks; None is a whole row or tensor
    parts: Parts,
) -> Tensor:
    (codes,) = parts.need("")
    scales = [parts[name] for name in ("_scale_inv", "_scale") if name in parts]
    if len(scales) != 1:
        raise ValueError(f"has {len(scales)} of _scale_inv and _scale, of which it needs one")
    if codes.dtype not in CODES:
        raise ValueError(f"has a scale and is stored as {codes.dtype}, not as {sorted(CODES)}")
    if len(codes.shape) == 2:
        return _scaled(sizes, codes, scales[0])
    if len(codes.shape) != 3 or len(scales[0].shape) < 1 or scales[0].shape[0] != codes.shape[0]:
        raise ValueError(f"has shape {codes.shape}, and its scale {scales[0].shape}")
    experts = range(codes.shape[0])
    return stacked([_scaled(sizes, entry(codes, e), entry(scales[0], e)) for e in experts])


def _scaled(sizes: list[tuple[int, int] | None], codes: Tensor, scales: Tensor) -> Tensor:
    O, I = codes.shape
    tried = [b for size in sizes for b in ([size] if size else [(O, I), (1, I)])]
    for block in tried:
        grid = scale_grid(scales, (O, I), block)
        if grid is not None:
            return scaled(codes, _powers(grid), block, dtype=EXACT)
    wanted = sorted({(blocks(O, block[0]), blocks(I, block[1])) for block in tried})
    raise ValueError(
        f"has shape {(O, I)} and scales of shape {scales.shape}, not one of {wanted} "
        f"(weight_block_size={sizes[0]})"
    )


def _powers(scales: Tensor) -> Tensor:
    """The scales as floats, where they are stored as exponents."""
    if scales.dtype != "U8":
        return scales

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        with np.errstate(over="ignore"):  # the loader names what is not finite
            return np.ldexp(np.float32(1), scales[slices].astype(np.int32) - 127)

    return Tensor(scales.shape, read, "F32")
