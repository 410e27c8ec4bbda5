"""A GGUF file as if it were a Hugging Face checkpoint: config fields and tensors by those names."""

import dataclasses
import math
from collections.abc import Mapping
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
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
FOUR_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How llama.cpp's files of one architecture differ from Hugging Face's."""

    model_type: str
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES)
    # Field of config.json -> metadata key, without the architecture in front.
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias_field: str = ""  # field of config.json that says whether there are attention biases
    interleaved: bool = False  # the two rotary halves of each head, in queries and keys
    norms_plus_one: bool = False  # the weights of norms are the gain, not its distance from 1
    rope_base: float = 10000.0  # where the file says none
    wide_layers: int = 0  # with so many layers, scores are scaled by D / H and not by K


GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOW = {"sliding_window": "attention.sliding_window"}

# By GGUF architecture. The 27B models of Gemma 2 and 3 are known by their number of layers, as
# llama.cpp knows them: no file says how scores are scaled.
LAYOUTS = {
    "llama": Layout(model_type="llama", interleaved=True, bias_field="attention_bias"),
    "qwen2": Layout(model_type="qwen2"),
    "qwen3": Layout(model_type="qwen3"),
    "gemma": Layout(model_type="gemma", constants=GELU, norms_plus_one=True),
    "gemma2": Layout(
        model_type="gemma2",
        names=NAMES | FOUR_NORMS,
        fields=CAPS | WINDOW,
        constants=GELU,
        norms_plus_one=True,
        wide_layers=46,
    ),
    "gemma3": Layout(
        model_type="gemma3_text",
        names=NAMES | FOUR_NORMS,
        fields={**WINDOW, "rope_local_base_freq": "rope.freq_base_swa"},
        constants=GELU,
        norms_plus_one=True,
        rope_base=1e6,
        wide_layers=62,
    ),
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's fields and the tensors of a GGUF file; weights are dequantised.

    Raises UnsupportedModel for an architecture that LAYOUTS lacks, SourceError for a broken file.
    """
    header = _header(path)
    if header.order != "<":
        raise ConversionError(f"{path.name} has big-endian weights, which are not read.")
    layout, config = _config(header, path)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for stored in header.tensors:
        name = _hugging_face_name(stored.name, layout, path)
        projection = name.split(".")[-2]
        tensors[name] = _tensor(
            stored,
            heads.get(projection, 0) if layout.interleaved else 0,
            1.0 if layout.norms_plus_one and projection.endswith("norm") else 0.0,
            path,
        )
    if layout.bias_field:
        config[layout.bias_field] = any(name.endswith("q_proj.bias") for name in tensors)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config, tensors


def _config(header: Header, path: Path) -> tuple[Layout, dict[str, Any]]:
    def field(key: str, default: Any = None, *, required: bool = True) -> Any:
        if key in header.metadata:
            return header.metadata[key]
        if required and default is None:
            raise UnsupportedModel(f"{path.name} has no metadata field {key}.")
        return default

    arch = field("general.architecture")
    if arch not in LAYOUTS:
        raise UnsupportedModel(
            f"{path.name} is of GGUF architecture {arch!r}; supported are {sorted(LAYOUTS)}. "
            "Use the model's Hugging Face directory instead."
        )
    layout = LAYOUTS[arch]
    heads = field(f"{arch}.attention.head_count")
    width = field(f"{arch}.embedding_length")
    config = {
        "model_type": layout.model_type,
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
    if any(t.name == "rope_freqs.weight" for t in header.tensors):
        raise UnsupportedModel(
            f"{path.name} carries its rope scaling as a tensor (rope_freqs.weight), which is not "
            "read. Use the model's Hugging Face directory instead."
        )
    return layout, config


def _hugging_face_name(name: str, layout: Layout, path: Path) -> str:
    prefix, inner = "", name
    if name.startswith("blk."):
        _, number, inner = name.split(".", 2)
        prefix = f"model.layers.{number}."
    if inner not in layout.names:
        raise ConversionError(f"{path.name} holds a tensor that is not known: {name}.")
    return prefix + layout.names[inner]


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except ValueError as error:
        raise SourceError(f"{error}.") from None


def _tensor(stored: TensorInfo, heads: int, shift: float, path: Path) -> Tensor:
    import gguf

    shape = stored.shape

    def whole() -> np.ndarray:
        kind = gguf.GGMLQuantizationType(stored.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
        data = np.memmap(path, mode="r", offset=stored.offset, shape=(rows, row_bytes))
        values = gguf.dequantize(np.asarray(data), kind).reshape(shape)
        if shift:
            values = values - np.float32(shift)
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
