"""Hugging Face tensors to the decoder's leaves, as a table; read slice by slice.

A row is: Hugging Face name, leaf path, layout of the Hugging Face tensor in the leaf's axis names,
where `(heads head_width)` is one dimension holding both. The leaf's own order is in
`transformer.axes`. Everything else (which slice of which tensor a device needs, transposes, shape
checks, missing and unused tensors) follows from the table.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.models import transformer
from jax_refusal.models.families import Architecture

BLOCK = "model.layers.{layer}."
TABLE = (
    ("model.embed_tokens.weight", "embed", "vocab embed"),
    ("model.norm.weight", "final_norm", "embed"),
    ("lm_head.weight", "head", "vocab embed"),
    (BLOCK + "input_layernorm.weight", "blocks.attn_norm", "embed"),
    (BLOCK + "self_attn.q_proj.weight", "blocks.q", "(heads head_width) embed"),
    (BLOCK + "self_attn.k_proj.weight", "blocks.k", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.v_proj.weight", "blocks.v", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.o_proj.weight", "blocks.o", "embed (heads head_width)"),
    (BLOCK + "self_attn.q_proj.bias", "blocks.q_bias", "(heads head_width)"),
    (BLOCK + "self_attn.k_proj.bias", "blocks.k_bias", "(kv_heads head_width)"),
    (BLOCK + "self_attn.v_proj.bias", "blocks.v_bias", "(kv_heads head_width)"),
    (BLOCK + "self_attn.o_proj.bias", "blocks.o_bias", "embed"),
    (BLOCK + "post_attention_layernorm.weight", "blocks.mlp_norm", "embed"),
    (BLOCK + "mlp.gate_proj.weight", "blocks.gate", "mlp embed"),
    (BLOCK + "mlp.up_proj.weight", "blocks.up", "mlp embed"),
    (BLOCK + "mlp.down_proj.weight", "blocks.down", "embed mlp"),
    (BLOCK + "mlp.gate_proj.bias", "blocks.gate_bias", "mlp"),
    (BLOCK + "mlp.up_proj.bias", "blocks.up_bias", "mlp"),
    (BLOCK + "mlp.down_proj.bias", "blocks.down_bias", "embed"),
)

# Buffers of old checkpoints that the config already states.
IGNORED = (re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),)

FLOATS = {"F64", "F32", "F16", "BF16"}


class ConversionError(ValueError):
    """The tensors do not make the model that the config describes; all failures together."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk: `read(slices)` returns that part of it as a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.read(slices)


def safetensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of some safetensors files, unread."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            handle = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} is not a complete safetensors file ({error}). Fetch it again."
            ) from None
        for name in handle.keys():  # noqa: SIM118 (a handle, not a dict)
            part = handle.get_slice(name)
            if part.get_dtype() not in FLOATS:
                raise ConversionError(
                    f"{name} in {path.name} is stored as {part.get_dtype()}; supported are "
                    f"{sorted(FLOATS)}. Quantised weights have to be dequantised first."
                )
            tensors[name] = Tensor(tuple(part.get_shape()), part.__getitem__)
    return tensors


def load(
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    mesh: Mesh,
    dtype: np.dtype,
) -> transformer.Transformer:
    """Builds the model on the mesh, reading only the slices that this process's devices need.

    Raises ConversionError naming every missing, unused, misshapen or non-finite tensor.
    """
    check(arch, tensors)
    broken: list[str] = []
    leaves = {}
    for name, path, layout in rows(arch):
        logical = transformer.axes(arch)[path]
        shape = transformer.shape(arch, logical)
        parts: dict[str, np.ndarray] = {}  # replicas of one slice are read once

        def part(index, *, name=name, logical=logical, layout=layout, shape=shape, parts=parts):
            ranges = [range(*i.indices(size)) for i, size in zip(index, shape, strict=True)]
            key = str(index)
            if key not in parts:
                parts[key] = _read(arch, tensors, name, layout, logical, ranges, dtype, broken)
            return parts[key]

        leaves[path] = jax.make_array_from_callback(
            shape, sharding.named(mesh, logical, shape), part
        )
    if broken:
        raise ConversionError(f"Weights that are not finite (NaN or infinite): {sorted(broken)}.")
    return transformer.Transformer(arch, leaves)


def rows(arch: Architecture) -> list[tuple[str, str, list[list[str]]]]:
    """The rows of TABLE that this architecture has; layouts as lists of axis names."""
    paths = transformer.axes(arch)
    return [(name, path, _layout(layout)) for name, path, layout in TABLE if path in paths]


def check(arch: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor there, of the right shape, and none left over."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, _, layout in rows(arch):
        sizes = tuple(math.prod(transformer.shape(arch, group)) for group in layout)
        for layer in range(arch.layers) if "{layer}" in name else [0]:
            expected[name.format(layer=layer)] = sizes
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name in expected:
            if tensor.shape != expected[name]:
                problems.append(f"{name} has shape {tensor.shape}, not {expected[name]}")
        elif name == "lm_head.weight" and arch.tied_head:
            every = (slice(None), slice(None))
            if not np.array_equal(tensor[every], tensors["model.embed_tokens.weight"][every]):
                problems.append(
                    "lm_head.weight differs from the embedding it is said to be tied to"
                )
        elif not any(pattern.fullmatch(name) for pattern in IGNORED):
            problems.append(f"unused {name} {tensor.shape}")
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ConversionError(
            f"The checkpoint does not fit its {arch.family} config: " + "; ".join(shown) + "."
        )


def _read(
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    name: str,
    layout: list[list[str]],
    logical: tuple[str, ...],
    ranges: list[range],  # of every axis of the leaf
    dtype: np.dtype,
    broken: list[str],
) -> np.ndarray:
    """One slice of a leaf; appends the names of tensors with NaN or infinity to `broken`."""
    wanted = dict(zip(logical, ranges, strict=True))
    if logical[0] == "layers":
        pieces = [(name.format(layer=layer), logical[1:]) for layer in wanted["layers"]]
    else:
        pieces = [(name, logical)]
    blocks = []
    for full_name, own in pieces:
        slices = []
        for first, *rest in layout:
            inner = math.prod(transformer.shape(arch, rest))
            slices.append(slice(wanted[first].start * inner, wanted[first].stop * inner))
        block = tensors[full_name][tuple(slices)].astype(dtype)
        if not np.isfinite(block.astype(np.float32) if dtype != np.float32 else block).all():
            broken.append(full_name)
        names = [axis for group in layout for axis in group]
        firsts = {group[0] for group in layout}
        block = block.reshape(
            [len(wanted[a]) if a in firsts else transformer.shape(arch, [a])[0] for a in names]
        ).transpose([names.index(axis) for axis in own])
        blocks.append(
            block[
                tuple(
                    slice(None) if a in firsts else slice(wanted[a].start, wanted[a].stop)
                    for a in own
                )
            ]
        )
    return np.stack(blocks) if logical[0] == "layers" else np.ascontiguousarray(blocks[0])


def _layout(text: str) -> list[list[str]]:
    """'(heads head_width) embed' -> [['heads', 'head_width'], ['embed']]."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", text)]


def numpy_dtype(name: str) -> np.dtype:
    """'float32' or 'bfloat16' as numpy knows it."""
    dtypes = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    if name not in dtypes:
        raise ValueError(f"dtype={name!r} is not supported; supported are {sorted(dtypes)}.")
    return dtypes[name]
