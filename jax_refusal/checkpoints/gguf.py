"""A GGUF file as if it were a Hugging Face checkpoint: config fields and tensors by those names."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.checkpoints.gguf_header import (
    COUNT,
    NUMBER,
    TEXT,
    TEXTS,
    Header,
    TensorInfo,
    checked,
)
from jax_refusal.checkpoints.sources import SourceError, gguf_header
from jax_refusal.checkpoints.tensors import ConversionError, Tensor
from jax_refusal.families.registry import FAMILIES, Family, Gguf, family_of
from jax_refusal.messages import shortened
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import Leaf
from jax_refusal.models.spec import Architecture, UnsupportedModel

ROTATED = ("q", "k", "q_bias", "k_bias")  # leaves of queries and keys
NORM = "_norm"  # what their leaves' names end in


def read_config(path: Path) -> dict[str, Any]:
    """config.json's fields of a GGUF file.

    Raises UnsupportedModel for an architecture of no family, SourceError for a broken file.
    """
    header = gguf_header(path)
    if header.order != "<":
        raise ConversionError(f"{path.name} has big-endian weights, which are not read.")
    config = _config(header, path)
    if (layers := config["num_hidden_layers"]) > len(header.tensors):
        raise SourceError(
            f"{path} says that it has {layers} blocks, and holds {len(header.tensors)} tensors. "
            "The file may be damaged: fetch it again."
        )
    return config


def read_tensors(path: Path, arch: Architecture) -> dict[str, Tensor]:
    """The tensors of a GGUF file under Hugging Face's names, unread; weights are dequantised.

    Raises ConversionError naming every tensor that the architecture does not have, and every one
    that does not lie in the file.
    """
    header, layout = gguf_header(path), family_of(arch).gguf
    assert layout is not None
    named = _names(arch)
    unknown = [tensor.name for tensor in header.tensors if tensor.name not in named]
    if unknown:
        raise ConversionError(
            f"{path.name} holds tensors that its {arch.family} model does not have: "
            f"{shortened(unknown)}."
        )
    problems = _misplaced(header)
    if problems:
        raise ConversionError(
            f"{path.name} is damaged or cut short: {shortened(problems)}. Fetch it again."
        )
    tensors = {}
    for stored in header.tensors:
        name, leaf = named[stored.name]
        tensors[name] = _tensor(stored, leaf, layout)
    return tensors


def _misplaced(header: Header) -> list[str]:
    """What is wrong about where the tensors lie: beyond the file, or in the place of another."""
    problems = []
    for file in header.files:
        size, end, last = file.stat().st_size, 0, ""
        for tensor in sorted((t for t in header.tensors if t.file == file), key=lambda t: t.offset):
            try:
                rows, row_bytes, _ = _rows(tensor)
            except ValueError as error:
                problems.append(str(error))
                continue
            if tensor.offset < end:
                problems.append(f"{tensor.name} overlaps {last}")
            end, last = tensor.offset + rows * row_bytes, tensor.name
            if end > size:
                problems.append(f"{tensor.name} ends at byte {end} of {size} in {file.name}")
    return problems


def _rows(stored: TensorInfo) -> tuple[int, int, Any]:
    """Rows, bytes of each, and type of a tensor; ValueError for what no tensor is."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ValueError(f"{stored.name} is of type {stored.kind}, which is not known") from None
    *outer, inner = stored.shape or (0,)
    if 0 in stored.shape or not inner or inner % block:
        raise ValueError(f"{stored.name} has shape {stored.shape}, whose rows are {kind.name}")
    return math.prod(outer), inner // block * size, kind


def _names(arch: Architecture) -> dict[str, tuple[str, Leaf]]:
    """llama.cpp's name -> Hugging Face's, and the leaf that the tensor is part of."""
    found = {}
    for leaf in leaves(arch).values():
        prefix = "blk.{layer}." if leaf.layers else ""
        for layer in (leaf.layers or (None,)) if leaf.param.gguf else ():
            theirs = (prefix + leaf.param.gguf).format(layer=layer)
            found[theirs] = leaf.stored.name.format(layer=layer), leaf
    return found


def _config(header: Header, path: Path) -> dict[str, Any]:
    def field(key: str, kind: str, default: Any = None, *, required: bool = True) -> Any:
        try:
            value = checked(header.metadata, key, kind)
        except ValueError as error:
            raise SourceError(
                f"{path}: {error}. The file is damaged, or says what is not read here: use the "
                "model's Hugging Face directory instead."
            ) from None
        if value is None and required and default is None:
            raise UnsupportedModel(f"{path.name} has no metadata field {key}.")
        return default if value is None else value

    def size(key: str, default: int | None = None) -> int:
        value = field(key, COUNT, default)
        if not 0 < value < 2**31:
            raise SourceError(f"{path}: {key} is {value}, which is no size of a model.")
        return value

    arch = field("general.architecture", TEXT)
    family, layout = _family(arch, path)
    heads, layers = size(f"{arch}.attention.head_count"), size(f"{arch}.block_count")
    width = size(f"{arch}.embedding_length")
    config = {
        "model_type": family.model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size(f"{arch}.attention.head_count_kv", heads),
        "head_dim": size(f"{arch}.attention.key_length", width // heads),
        "intermediate_size": size(f"{arch}.feed_forward_length"),
        "max_position_embeddings": size(f"{arch}.context_length"),
        "rms_norm_eps": field(f"{arch}.attention.layer_norm_rms_epsilon", NUMBER),
        "rope_theta": field(f"{arch}.rope.freq_base", NUMBER, layout.rope_base),
        "vocab_size": len(field("tokenizer.ggml.tokens", TEXTS)),
        "hidden_act": "silu",
        **layout.constants,
    }
    for theirs, key in layout.fields.items():
        value = field(f"{arch}.{key}", NUMBER, required=key != "rope.freq_base_swa")
        if value is not None:
            config[theirs] = value
    if layout.wide_layers:
        wide = config["num_hidden_layers"] == layout.wide_layers
        config["query_pre_attn_scalar"] = width // heads if wide else config["head_dim"]
    # llama.cpp computes in other dtypes; the file's epsilon is the float32 nearest to the config's.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    scaling = field(f"{arch}.rope.scaling.type", TEXT, required=False)
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": field(f"{arch}.rope.scaling.factor", NUMBER),
        }
    names = {tensor.name for tensor in header.tensors}
    if "rope_freqs.weight" in names:
        raise UnsupportedModel(
            f"{path.name} carries its rope scaling as a tensor (rope_freqs.weight), which is not "
            "read. Use the model's Hugging Face directory instead."
        )
    if layout.bias_field:
        config[layout.bias_field] = any(name.endswith(".attn_q.bias") for name in names)
    config["tie_word_embeddings"] = "output.weight" not in names
    return config


def _family(arch: str, path: Path) -> tuple[Family, Gguf]:
    """The family whose files llama.cpp calls by this name."""
    known = {f.gguf.architecture: (f, f.gguf) for f in FAMILIES.values() if f.gguf is not None}
    if arch not in known:
        raise UnsupportedModel(
            f"{path.name} is of GGUF architecture {arch!r}; supported are {sorted(known)}. "
            "Use the model's Hugging Face directory instead."
        )
    return known[arch]


def _tensor(stored: TensorInfo, leaf: Leaf, layout: Gguf) -> Tensor:
    import gguf

    shape = stored.shape
    interleaved = layout.interleaved and leaf.param.name in ROTATED
    shifted = layout.norms_plus_one and leaf.param.name.endswith(NORM)

    def whole() -> np.ndarray:
        rows, row_bytes, kind = _rows(stored)
        data = np.memmap(stored.file, mode="r", offset=stored.offset, shape=(rows, row_bytes))
        with np.errstate(all="ignore"):  # the loader names what is not finite
            values = gguf.dequantize(np.asarray(data), kind).reshape(shape)
        if shifted:
            values = values - np.float32(1)
        if not interleaved:
            return values
        # llama.cpp interleaves the two rotary halves of each head; undo it.
        heads = leaf.shape[1]  # [L, H or G, K, ...]
        pairs = values.reshape(heads, -1, 2, math.prod(shape[1:]))
        return pairs.swapaxes(1, 2).reshape(shape)

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        try:
            return whole()[slices]
        except (ValueError, NotImplementedError) as error:
            raise ConversionError(
                f"{stored.name} of {stored.file.name} cannot be read: {error}."
            ) from None

    return Tensor(shape, read)
