"""How checkpoints name and lay out their tensors, as a table of rows for each naming.

A row is: Hugging Face name, leaf path, layout of the Hugging Face tensor in the leaf's axis names,
where `(heads head_width)` is one dimension holding both. Rows that share a name are the parts of
one fused tensor, in this order along its first dimension (after that of experts); a star says that
they alternate along its last, entry by entry. The leaf's own
order of axes is in `declaration.axes`. Which slice of which tensor a device needs, transposes,
shape checks, missing and unused tensors, and the way back to Hugging Face follow from the table.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from jax_refusal.models import declaration, kinds
from jax_refusal.models.architecture import Architecture

# What stands for a number in a name, and the axis of the leaf that it counts along.
NUMBERS = {
    "layers": "layer",
    "experts": "expert",
    **{axis: axis.removesuffix("s") for axis in kinds.SOME_LAYERS},
}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = (
    (EMBEDDING, "embed", "vocab embed"),
    ("model.norm.weight", "final_norm", "embed"),
    (HEAD, "head", "vocab embed"),
)
BLOCK = "model.layers.{layer}."
ATTENTION = (
    (BLOCK + "self_attn.q_proj.weight", "blocks.q", "(heads head_width) embed"),
    (BLOCK + "self_attn.k_proj.weight", "blocks.k", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.v_proj.weight", "blocks.v", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.o_proj.weight", "blocks.o", "embed (heads head_width)"),
    (BLOCK + "self_attn.q_proj.bias", "blocks.q_bias", "(heads head_width)"),
    (BLOCK + "self_attn.k_proj.bias", "blocks.k_bias", "(kv_heads head_width)"),
    (BLOCK + "self_attn.v_proj.bias", "blocks.v_bias", "(kv_heads head_width)"),
    (BLOCK + "self_attn.o_proj.bias", "blocks.o_bias", "embed"),
)
HEAD_NORMS = (
    (BLOCK + "self_attn.q_norm.weight", "blocks.q_norm", "head_width"),
    (BLOCK + "self_attn.k_norm.weight", "blocks.k_norm", "head_width"),
)
PROJECTION_NORMS = (
    (BLOCK + "self_attn.q_norm.weight", "blocks.q_norm", "(heads head_width)"),
    (BLOCK + "self_attn.k_norm.weight", "blocks.k_norm", "(kv_heads head_width)"),
)
MLP = (
    (BLOCK + "mlp.gate_proj.weight", "blocks.gate", "mlp embed"),
    (BLOCK + "mlp.up_proj.weight", "blocks.up", "mlp embed"),
    (BLOCK + "mlp.down_proj.weight", "blocks.down", "embed mlp"),
    (BLOCK + "mlp.gate_proj.bias", "blocks.gate_bias", "mlp"),
    (BLOCK + "mlp.up_proj.bias", "blocks.up_bias", "mlp"),
    (BLOCK + "mlp.down_proj.bias", "blocks.down_bias", "embed"),
)
PRE_NORMS = (
    (BLOCK + "input_layernorm.weight", "blocks.attn_norm", "embed"),
    (BLOCK + "post_attention_layernorm.weight", "blocks.mlp_norm", "embed"),
)
# With norms of what is written, `post_attention_layernorm` is what its name says.
POST_NORMS = (
    (BLOCK + "post_attention_layernorm.weight", "blocks.attn_post_norm", "embed"),
    (BLOCK + "post_feedforward_layernorm.weight", "blocks.mlp_post_norm", "embed"),
)
FOUR_NORMS = (
    (BLOCK + "input_layernorm.weight", "blocks.attn_norm", "embed"),
    (BLOCK + "pre_feedforward_layernorm.weight", "blocks.mlp_norm", "embed"),
    *POST_NORMS,
)
MIXTRAL_EXPERT = BLOCK + "block_sparse_moe.experts.{expert}."
MIXTRAL = (
    (BLOCK + "block_sparse_moe.gate.weight", "blocks.router", "experts embed"),
    (MIXTRAL_EXPERT + "w1.weight", "blocks.expert_gate", "mlp embed"),
    (MIXTRAL_EXPERT + "w3.weight", "blocks.expert_up", "mlp embed"),
    (MIXTRAL_EXPERT + "w2.weight", "blocks.expert_down", "embed mlp"),
)
EXPERT = BLOCK + "mlp.experts.{expert}."
EXPERTS = (
    (BLOCK + "mlp.gate.weight", "blocks.router", "experts embed"),
    (EXPERT + "gate_proj.weight", "blocks.expert_gate", "mlp embed"),
    (EXPERT + "up_proj.weight", "blocks.expert_up", "mlp embed"),
    (EXPERT + "down_proj.weight", "blocks.expert_down", "embed mlp"),
)
# As transformers 5 holds experts in memory, and stores them if told to.
FUSED_EXPERTS = (
    (BLOCK + "mlp.gate.weight", "blocks.router", "experts embed"),
    (BLOCK + "mlp.experts.gate_up_proj", "blocks.expert_gate", "experts mlp embed"),
    (BLOCK + "mlp.experts.gate_up_proj", "blocks.expert_up", "experts mlp embed"),
    (BLOCK + "mlp.experts.down_proj", "blocks.expert_down", "experts embed mlp"),
)
# Experts lie [in, out], as they multiply; a gate and its up are neighbours.
GPT_OSS = (
    (BLOCK + "self_attn.sinks", "blocks.sinks", "heads"),
    (BLOCK + "mlp.router.weight", "blocks.router", "experts embed"),
    (BLOCK + "mlp.router.bias", "blocks.router_bias", "experts"),
    (BLOCK + "mlp.experts.gate_up_proj", "blocks.expert_gate", "experts embed mlp*"),
    (BLOCK + "mlp.experts.gate_up_proj", "blocks.expert_up", "experts embed mlp*"),
    (BLOCK + "mlp.experts.gate_up_proj_bias", "blocks.expert_gate_bias", "experts mlp*"),
    (BLOCK + "mlp.experts.gate_up_proj_bias", "blocks.expert_up_bias", "experts mlp*"),
    (BLOCK + "mlp.experts.down_proj", "blocks.expert_down", "experts mlp embed"),
    (BLOCK + "mlp.experts.down_proj_bias", "blocks.expert_down_bias", "experts embed"),
)
QWEN1_BLOCK = "transformer.h.{layer}."
QWEN1 = (
    ("transformer.wte.weight", "embed", "vocab embed"),
    ("transformer.ln_f.weight", "final_norm", "embed"),
    (HEAD, "head", "vocab embed"),
    (QWEN1_BLOCK + "ln_1.weight", "blocks.attn_norm", "embed"),
    (QWEN1_BLOCK + "ln_2.weight", "blocks.mlp_norm", "embed"),
    (QWEN1_BLOCK + "attn.c_attn.weight", "blocks.q", "(heads head_width) embed"),
    (QWEN1_BLOCK + "attn.c_attn.weight", "blocks.k", "(kv_heads head_width) embed"),
    (QWEN1_BLOCK + "attn.c_attn.weight", "blocks.v", "(kv_heads head_width) embed"),
    (QWEN1_BLOCK + "attn.c_attn.bias", "blocks.q_bias", "(heads head_width)"),
    (QWEN1_BLOCK + "attn.c_attn.bias", "blocks.k_bias", "(kv_heads head_width)"),
    (QWEN1_BLOCK + "attn.c_attn.bias", "blocks.v_bias", "(kv_heads head_width)"),
    (QWEN1_BLOCK + "attn.c_proj.weight", "blocks.o", "embed (heads head_width)"),
    (QWEN1_BLOCK + "mlp.w2.weight", "blocks.gate", "mlp embed"),  # the second is activated
    (QWEN1_BLOCK + "mlp.w1.weight", "blocks.up", "mlp embed"),
    (QWEN1_BLOCK + "mlp.c_proj.weight", "blocks.down", "embed mlp"),
)

FUSED = (
    (BLOCK + "self_attn.qkv_proj.weight", "blocks.q", "(heads head_width) embed"),
    (BLOCK + "self_attn.qkv_proj.weight", "blocks.k", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.qkv_proj.weight", "blocks.v", "(kv_heads head_width) embed"),
    (BLOCK + "self_attn.o_proj.weight", "blocks.o", "embed (heads head_width)"),
    (BLOCK + "mlp.gate_up_proj.weight", "blocks.gate", "mlp embed"),
    (BLOCK + "mlp.gate_up_proj.weight", "blocks.up", "mlp embed"),
    (BLOCK + "mlp.down_proj.weight", "blocks.down", "embed mlp"),
)
# Where layers differ in shape, {local_layer} stands for the number of a local one, and so on.
GEMMA4_KINDS = tuple(
    (f"model.layers.{{{own}{kind}_layer}}.self_attn.{name}.weight", f"{kind}.{leaf}", layout)
    for kind, heads, width in (
        ("local", "kv_heads", "head_width"),
        ("global", "global_kv_heads", "global_head_width"),
    )
    for own, name, leaf, layout in (
        ("", "q_proj", "q", f"(heads {width}) embed"),
        ("own_", "k_proj", "k", f"({heads} {width}) embed"),
        ("own_", "v_proj", "v", f"({heads} {width}) embed"),
        ("", "o_proj", "o", f"embed (heads {width})"),
        ("", "q_norm", "q_norm", width),
        ("own_", "k_norm", "k_norm", width),
    )
)
GEMMA4_MLPS = tuple(
    (f"model.layers.{{{part}_layer}}.mlp.{leaf}_proj.weight", f"{part}.{leaf}", layout)
    for part, narrow in (("own", "mlp"), ("sharing", "wide_mlp"))
    for leaf, layout in (
        ("gate", f"{narrow} embed"),
        ("up", f"{narrow} embed"),
        ("down", f"embed {narrow}"),
    )
)
GEMMA4 = (
    *GEMMA4_KINDS,
    *GEMMA4_MLPS,
    (BLOCK + "router.proj.weight", "blocks.router", "experts embed"),
    (BLOCK + "router.scale", "blocks.router_scale", "embed"),
    (BLOCK + "router.per_expert_scale", "blocks.expert_scale", "experts"),
    (BLOCK + "experts.gate_up_proj", "blocks.expert_gate", "experts expert_mlp embed"),
    (BLOCK + "experts.gate_up_proj", "blocks.expert_up", "experts expert_mlp embed"),
    (BLOCK + "experts.down_proj", "blocks.expert_down", "experts embed expert_mlp"),
    (BLOCK + "pre_feedforward_layernorm_2.weight", "blocks.expert_norm", "embed"),
    (BLOCK + "post_feedforward_layernorm_2.weight", "blocks.expert_post_norm", "embed"),
    (BLOCK + "post_feedforward_layernorm_1.weight", "blocks.dense_post_norm", "embed"),
    (BLOCK + "per_layer_input_gate.weight", "blocks.per_layer_gate", "per_layer embed"),
    (BLOCK + "per_layer_projection.weight", "blocks.per_layer_out", "embed per_layer"),
    (BLOCK + "post_per_layer_input_norm.weight", "blocks.per_layer_post_norm", "embed"),
    (BLOCK + "layer_scalar", "blocks.scale", "scalar"),
    (
        "model.embed_tokens_per_layer.weight",
        "per_layer_embed",
        "per_layer_vocab (layers per_layer)",
    ),
    (
        "model.per_layer_model_projection.weight",
        "per_layer_context",
        "(layers per_layer) embed",
    ),
    ("model.per_layer_projection_norm.weight", "per_layer_norm", "per_layer"),
)

NAMING = {
    "llama": (*TOP, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *MLP),
    "gemma2": (*TOP, *FOUR_NORMS, *ATTENTION, *HEAD_NORMS, *MLP),
    "gemma4": (*TOP, *FOUR_NORMS, *MLP, *GEMMA4),
    "olmo2": (*TOP, *POST_NORMS, *ATTENTION, *PROJECTION_NORMS, *MLP),
    "phi3": (*TOP, *PRE_NORMS, *FUSED),
    "qwen": QWEN1,
    "mixtral": (*TOP, *PRE_NORMS, *ATTENTION, *MIXTRAL),
    "qwen3_moe": (*TOP, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *EXPERTS),
    "gpt_oss": (*TOP, *PRE_NORMS, *ATTENTION, *GPT_OSS),
    "fused_experts": (*TOP, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *FUSED_EXPERTS),
}

# Buffers of old checkpoints that the config already states.
IGNORED = re.compile(
    r"(model\.layers\.\d+\.self_attn|transformer(\.h\.\d+\.attn)?)\.rotary_emb\.inv_freq"
)

# In a multimodal checkpoint: what stands for `model.` and `lm_head.` around the text model, as the
# hub's files and as newer ones have it, and where the other modalities lie.
PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHER_MODALITIES = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio"
    r"|vision_embedder)\..*"
)
# Gemma 4's files hold these of layers that read another layer's keys too, and nothing uses them.
UNREAD = re.compile(r"model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight")


# Halves of a tensor that lies in MXFP4; see `mxfp4`.
PACKED = re.compile(r"(.*)_(blocks|scales)")


class Row(NamedTuple):
    name: str  # Hugging Face's, with {layer} and {expert} for numbers
    path: str  # of the leaf
    layout: list[list[str]]  # for each dimension of this part, the leaf's axes that it holds
    alternates: bool = False  # with the other parts of its tensor, along the last dimension


def rows(arch: Architecture) -> list[Row]:
    """The rows that this architecture has."""
    paths = declaration.axes(arch)
    return [
        Row(name, path, _layout(layout), layout.endswith("*"))
        for name, path, layout in NAMING[arch.naming]
        if path in paths
    ]


def sizes(arch: Architecture, row: Row) -> tuple[int, ...]:
    """The dimensions of a row's part as Hugging Face stores it."""
    return tuple(math.prod(declaration.shape(arch, group)) for group in row.layout)


def parts(arch: Architecture, name: str) -> list[Row]:
    """The rows of one tensor, in their order along its fused dimension."""
    return [row for row in rows(arch) if row.name == name]


def along(row: Row) -> int:
    """The dimension along which the parts of a fused tensor follow each other."""
    if row.alternates:
        return len(row.layout) - 1
    return int(row.layout[0] == ["experts"] and len(row.layout) > 1)


def where(arch: Architecture, row: Row, start: int, stop: int) -> slice:
    """Where the entries start..stop of a row's part lie along that dimension."""
    fused = parts(arch, row.name)
    index = [part.path for part in fused].index(row.path)
    if row.alternates:
        return slice(len(fused) * start + index, len(fused) * stop, len(fused))
    begin = sum(sizes(arch, part)[along(part)] for part in fused[:index])
    return slice(begin + start, begin + stop)


def full_sizes(arch: Architecture, name: str) -> tuple[int, ...]:
    """The dimensions of a whole tensor."""
    fused = parts(arch, name)
    whole = list(sizes(arch, fused[0]))
    whole[along(fused[0])] = sum(sizes(arch, row)[along(row)] for row in fused)
    return tuple(whole)


def numbered(arch: Architecture, row: Row) -> list[str]:
    """The leaf's axes that a row's name counts along: each number is a tensor of its own."""
    axes = declaration.axes(arch)[row.path]
    return [axis for axis in axes if f"{{{NUMBERS.get(axis)}}}" in row.name]


def number(arch: Architecture, axis: str, index: int) -> int:
    """What stands in a name for one place along an axis: of some layers, the layer's number."""
    return kinds.members(arch)[axis][index] if axis in kinds.SOME_LAYERS else index


def counts(arch: Architecture, row: Row) -> list[range]:
    """The places along each of those axes."""
    return [range(size) for size in declaration.shape(arch, numbered(arch, row))]


Stored = TypeVar("Stored")


def as_stored(arch: Architecture, tensors: Mapping[str, Stored]) -> Architecture:
    """The architecture, named as this checkpoint names it: experts may lie fused."""
    if not any("{expert}" in name for name, _, _ in NAMING[arch.naming]):
        return arch  # they lie in one tensor as it is, and gpt-oss's own names are among these
    fused = {name for name, path, _ in FUSED_EXPERTS if path == "blocks.expert_down"}
    if any(name.format(layer=0) in tensors for name in fused):
        return dataclasses.replace(arch, naming="fused_experts")
    return arch


def unwrapped(arch: Architecture, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without what is no part of the model; the text model's own names in a multimodal one."""
    found = {}
    for name, tensor in tensors.items():
        if arch.wrapped:
            if OTHER_MODALITIES.fullmatch(name):
                continue
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            name = PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        unread = UNREAD.fullmatch(name) if arch.kv_of_layer else None
        if unread and int(unread[1]) >= arch.cache_layers:
            continue
        if not IGNORED.fullmatch(name):
            found[name] = tensor
    return found


def _layout(text: str) -> list[list[str]]:
    """'(heads head_width) embed' -> [['heads', 'head_width'], ['embed']]."""
    return [group.strip("()*").split() for group in re.findall(r"\([^)]*\)|\S+", text)]
