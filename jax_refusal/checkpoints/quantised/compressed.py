"""compressed-tensors: integers of 4 and 8 bits, in words or in bytes, and floats of 8 bits.

Letters: O outputs, I inputs, G groups of inputs. A weight [O, I] is (codes - zeros) * scales. The
codes are `weight` [O, I], or `weight_packed` [O, I bits / 32] of `weight_shape`; zeros of packed
codes are packed along O. What is packed is unsigned, half its range above what it stands for.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from jax_refusal.checkpoints.quantised.codes import (
    SCALES,
    WORD,
    blocks,
    scale_grid,
    scaled,
    unpacked,
    whole,
)
from jax_refusal.checkpoints.quantised.config import Fields, is_block, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import FLOATS, Tensor

LABEL = "compressed-tensors"
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
STORED = {"int": "I8", "float": "F8_E4M3"}  # codes that are not packed
PART = re.compile(r"(.*)(\.weight|\.weight_(?:packed|shape|scale|zero_point|g_idx))")
DTYPES = {
    ".weight": {*FLOATS, *STORED.values()},
    ".weight_packed": {"I32"},
    ".weight_shape": {"I64", "I32"},
    ".weight_scale": set(SCALES),
    ".weight_zero_point": {"I8", "I32", *STORED.values(), *SCALES},
    ".weight_g_idx": {"I32", "I64"},
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How some modules' weights are quantised."""

    bits: int
    kind: str  # of the codes: "int" or "float"
    packed: bool
    symmetric: bool
    block: tuple[int, int]  # outputs and inputs that share a scale; -1 is all


def read(given: Mapping[str, Any], vouched: Collection[str]) -> Format:
    fields = Fields(given, vouched)
    form = fields.one_of("format", of=(*FORMATS, "mixed-precision"))
    fields.empty("transform_config")
    sparsity = fields.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        fields.wrong(("sparsity_config",), sparsity, "supported: none, or format='dense'")
    fields.without_effect(
        """kv_cache_scheme quantization_status global_compression_ratio version run_compressed
        use_optimized_inference"""
    )
    groups = fields.get("config_groups", default={})
    schemes, problems = [], []
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        fields.wrong(("config_groups",), groups, "supported: {name: {targets, weights, ...}}")
        groups = {}
    for name, group in groups.items():
        if group.get("weights") is not None:
            schemes.append(_scheme(group, form, f"config_groups.{name}.", vouched, problems))
    if not schemes and not fields.problems:
        problems.append("config_groups says nothing of weights, so that they are as they are")
    refuse(LABEL, fields.finish() + problems)
    bits = sorted({f"{scheme.bits} bits" for scheme in schemes})
    return Format(
        label=f"{LABEL} ({', '.join(bits)})",
        part=PART,
        whole=".weight",
        dtypes=DTYPES,
        build=partial(_build, [scheme for scheme in schemes if scheme is not None]),
        plain=".weight",
    )


def _scheme(
    group: Mapping[str, Any], form: str, where: str, vouched: Collection[str], problems: list[str]
) -> Scheme | None:
    """What a group says of weights; None, with problems added, where that is not computed."""
    outer = Fields(group, vouched, where)
    form = outer.one_of("format", of=FORMATS, default=form)
    outer.without_effect("targets weights input_activations output_activations")
    weights = group["weights"]
    if not isinstance(weights, Mapping):
        outer.wrong(("weights",), weights, "supported: {num_bits, type, ...}")
        weights = {}
    inner = Fields(weights, vouched, f"{where}weights.")
    kind = inner.one_of("type", of=tuple(STORED), default="int")
    bits = inner.one_of("num_bits", of=(8,) if kind == "float" else (4, 8), default=8)
    symmetric = inner.one_of("symmetric", of=(True, False), default=True)
    inner.one_of("dynamic", of=(False,), default=False)
    inner.without_effect("actorder observer observer_kwargs scale_dtype zp_dtype")
    block = _block(inner)
    problems += outer.finish() + inner.finish()
    if outer.problems or inner.problems:
        return None
    return Scheme(bits, kind, form == PACKED, symmetric, block)


def _block(weights: Fields) -> tuple[int, int]:
    size, structure = weights.get("group_size"), weights.get("block_structure")
    guessed = "tensor" if size is None else "channel" if size == -1 else "group"
    strategies = ("tensor", "channel", "group", "block")
    strategy = weights.one_of("strategy", of=strategies, default=guessed)
    if strategy == "group":
        return 1, weights.size("group_size", default=0)
    if strategy != "block":
        return (-1, -1) if strategy == "tensor" else (1, -1)
    if isinstance(structure, str) and re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", structure):
        structure = list(map(int, structure.split("x")))
    if not is_block(structure):
        weights.wrong(("block_structure",), structure, "supported: two whole numbers above 0")
        return 1, 1
    rows, columns = structure
    return rows, columns


def _build(schemes: list[Scheme], parts: Parts) -> Tensor:
    """By the first scheme that the parts fit: those that fit two are the same numbers by both."""
    problems = []
    for scheme in schemes:
        try:
            return _by(scheme, parts)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(", or ".join(dict.fromkeys(problems)))


def _by(scheme: Scheme, parts: Parts) -> Tensor:
    codes, _ = parts.need(".weight_packed" if scheme.packed else ".weight", ".weight_scale")
    if not scheme.symmetric:
        parts.need(".weight_zero_point")
    if ".weight" in parts and ".weight_packed" in parts:
        raise ValueError("is there twice, packed and not")
    O, I = shape = _shape(scheme, parts)
    if scheme.packed:
        parts.fit({".weight_packed": (O, blocks(I * scheme.bits, WORD))})
        codes = unpacked(codes, scheme.bits, 1, I, offset=-(2 ** (scheme.bits - 1)))
    elif codes.dtype != STORED[scheme.kind]:
        raise ValueError(f"its codes are stored as {codes.dtype}, not as {STORED[scheme.kind]}")
    rows, columns = scheme.block
    block = (O if rows == -1 else rows, I if columns == -1 else columns)
    scales = scale_grid(parts[".weight_scale"], shape, block)
    if scales is None:
        wanted = tuple(map(blocks, shape, block))
        raise ValueError(f"its scales have shape {parts['.weight_scale'].shape}, not {wanted}")
    zeros = 0
    if ".weight_zero_point" in parts:
        zeros = _zeros(scheme, parts[".weight_zero_point"], scales, shape, block)
    return scaled(codes, scales, block, zeros=zeros, groups=_groups(parts, I, block[1]))


def _shape(scheme: Scheme, parts: Parts) -> tuple[int, int]:
    """Outputs and inputs of the weight."""
    if scheme.packed:
        (said,) = parts.need(".weight_shape")
        if said.shape != (2,):
            raise ValueError(f"its .weight_shape has shape {said.shape}, not (2,)")
        shape = tuple(map(int, whole(said)))
    else:
        shape = parts[".weight"].shape
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"its shape is {shape}, not [outputs, inputs]")
    return shape


def _zeros(
    scheme: Scheme, zeros: Tensor, scales: Tensor, shape: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """As the scales lie: packed, in words as the codes are, or as they are."""
    O, G = scales.shape
    if zeros.dtype == "I32" and scheme.packed and shape[0] == O:
        wanted = (blocks(O * scheme.bits, WORD), G)
        if zeros.shape != wanted:
            raise ValueError(f"its packed zeros have shape {zeros.shape}, not {wanted}")
        return unpacked(zeros, scheme.bits, 0, O, offset=-(2 ** (scheme.bits - 1)))
    grid = scale_grid(zeros, shape, block)
    if grid is None:
        raise ValueError(f"its zeros have shape {zeros.shape}, not {scales.shape} as its scales")
    return grid


def _groups(parts: Parts, I: int, size: int) -> np.ndarray | None:
    """The group of each input, where they are not in order."""
    if ".weight_g_idx" not in parts:
        return None
    parts.fit({".weight_g_idx": (I,)})
    groups, count = whole(parts[".weight_g_idx"]), blocks(I, size)
    if (groups == -1).any():  # as the library leaves it where they are
        return None
    inside = groups.min() >= 0 and groups.max() < count
    if not inside or (np.bincount(groups, minlength=count) != size).any():
        raise ValueError(f"its .weight_g_idx does not make {count} groups of {size} inputs")
    return groups
