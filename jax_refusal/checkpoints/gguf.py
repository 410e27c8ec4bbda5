"""A GGUF file as if it were a Hugging Face checkpoint: config fields and tensors by those names."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.checkpoints.gguf_header import Header, TensorInfo, read_header
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.checkpoints.tensors import ConversionError, Tensor
from jax_refusal.families.registry import FAMILIES, Family, Gguf, family_of
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import Leaf
from jax_refusal.models.spec import Architecture, UnsupportedModel

ROTATED = ("q", "k", "q_bias", "k_bias")  # leaves of queries and keys
NORM = "_norm"  # what their leaves' names end in


def read_config(path: Path) -> dict[str, Any]:
    """config.json's fields of a GGUF file.

    Raises UnsupportedModel for an architecture of no family, SourceError for a broken file.
    """
    header = _header(path)
    if header.order != "<":
        raise ConversionError(f"{path.name} has big-endian weights, which are not read.")
    return _config(header, path)


def read_tensors(path: Path, arch: Architecture) -> dict[str, Tensor]:
    """The tensors of a GGUF file under Hugging Face's names, unread; weights are dequantised.

    Raises ConversionError naming every tensor that the architecture does not have.
    """
    header, layout = _header(path), family_of(arch).gguf
    assert layout is not None
    named = _names(arch)
    unknown = [tensor.name for tensor in header.tensors if tensor.name not in named]
    if unknown:
        raise ConversionError(
            f"{path.name} holds tensors that its {arch.family} model does not have: {unknown}."
        )
    tensors = {}
    for stored in header.tensors:
        name, leaf = named[stored.name]
        tensors[name] = _tensor(stored, leaf, layout, path)
    return tensors


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
    def field(key: str, default: Any = None, *, required: bool = True) -> Any:
        if key in header.metadata:
            return header.metadata[key]
        if required and default is None:
            raise UnsupportedModel(f"{path.name} has no metadata field {key}.")
        return default

    arch = field("general.architecture")
    family, layout = _family(arch, path)
    heads = field(f"{arch}.attention.head_count")
    width = field(f"{arch}.embedding_length")
    config = {
        "model_type": family.model_type,
        "hidden_size": width,
        "num_hidden_layers": field(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(f"{arch}.attention.head_count_kv", heads),
        "head_dim": field(f"{arch}.attention.key_length", width // heads),
        "intermediate_size": field(f"{arch}.feed_forward_length"),
        "max_position_embeddings": field(f"{arch}.context_length"),
        "rms_norm_eps": field(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(f"{arch}.rope.freq_base", layout.rope_base),
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_act": "silu",
        **layout.constants,
    }
    for theirs, key in layout.fields.items():
        value = field(f"{arch}.{key}", required=key != "rope.freq_base_swa")
        if value is not None:
            config[theirs] = value
    if layout.wide_layers:
        wide = config["num_hidden_layers"] == layout.wide_layers
        config["query_pre_attn_scalar"] = width // heads if wide else config["head_dim"]
    # llama.cpp computes in other dtypes; the file's epsilon is the float32 nearest to the config's.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    scaling = field(f"{arch}.rope.scaling.type", required=False)
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": field(f"{arch}.rope.scaling.factor"),
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


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except ValueError as error:
        raise SourceError(f"{error}.") from None


def _tensor(stored: TensorInfo, leaf: Leaf, layout: Gguf, path: Path) -> Tensor:
    import gguf

    shape = stored.shape
    interleaved = layout.interleaved and leaf.param.name in ROTATED
    shifted = layout.norms_plus_one and leaf.param.name.endswith(NORM)

    def whole() -> np.ndarray:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
        data = np.memmap(path, mode="r", offset=stored.offset, shape=(rows, row_bytes))
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
                f"{stored.name} of {path.name} cannot be read: {error}."
            ) from None

    return Tensor(shape, read)
