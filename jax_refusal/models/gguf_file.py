"""A GGUF file as if it were a Hugging Face checkpoint: config fields and tensors by those names."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.gguf_header import Header, TensorInfo, read_header
from jax_refusal.models.convert import ConversionError, Tensor
from jax_refusal.models.families import UnsupportedModel
from jax_refusal.sources import SourceError

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's fields and the tensors of a Llama-shaped GGUF file; weights are dequantised.

    Raises UnsupportedModel for another architecture, SourceError for a broken file.
    """
    header = _header(path)
    if header.order != "<":
        raise ConversionError(f"{path.name} has big-endian weights, which are not read.")
    config = _config(header, path)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors = {}
    for stored in header.tensors:
        name = _hugging_face_name(stored.name, path)
        tensors[name] = _tensor(stored, heads.get(name.rsplit(".", 2)[-2][0], 0), path)
    config["attention_bias"] = any(name.endswith("q_proj.bias") for name in tensors)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config, tensors


def _config(header: Header, path: Path) -> dict[str, Any]:
    def field(key: str, default: Any = None, *, required: bool = True) -> Any:
        if key in header.metadata:
            return header.metadata[key]
        if required and default is None:
            raise UnsupportedModel(f"{path.name} has no metadata field {key}.")
        return default

    arch = field("general.architecture")
    if arch != "llama":
        raise UnsupportedModel(
            f"{path.name} is of GGUF architecture {arch!r}; supported is 'llama'. "
            "Use the model's Hugging Face directory instead."
        )
    heads = field(f"{arch}.attention.head_count")
    width = field(f"{arch}.embedding_length")
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": field(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(f"{arch}.attention.head_count_kv", heads),
        "head_dim": field(f"{arch}.attention.key_length", width // heads),
        "intermediate_size": field(f"{arch}.feed_forward_length"),
        "max_position_embeddings": field(f"{arch}.context_length"),
        "rms_norm_eps": field(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_act": "silu",
    }
    # llama.cpp computes in other dtypes; the file's epsilon is the float32 nearest to the config's.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    scaling = field(f"{arch}.rope.scaling.type", required=False)
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": field(f"{arch}.rope.scaling.factor"),
        }
    if any(t.name == "rope_freqs.weight" for t in header.tensors):
        raise UnsupportedModel(
            f"{path.name} carries its rope scaling as a tensor (rope_freqs.weight), which is not "
            "read. Use the model's Hugging Face directory instead."
        )
    return config


def _hugging_face_name(name: str, path: Path) -> str:
    layer, inner = "", name
    if name.startswith("blk."):
        _, number, inner = name.split(".", 2)
        layer = f"model.layers.{number}."
    if inner not in NAMES:
        raise ConversionError(f"{path.name} holds a tensor that is not known: {name}.")
    return layer + NAMES[inner]


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except ValueError as error:
        raise SourceError(f"{error}.") from None


def _tensor(stored: TensorInfo, heads: int, path: Path) -> Tensor:
    import gguf

    shape = stored.shape

    def whole() -> np.ndarray:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
        data = np.memmap(path, mode="r", offset=stored.offset, shape=(rows, row_bytes))
        values = gguf.dequantize(np.asarray(data), kind).reshape(shape)
        if not heads:
            return values
        # llama.cpp interleaves the two rotary halves of each head; undo it.
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
