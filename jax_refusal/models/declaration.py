"""The leaves of a model, declared once: path and logical axes. Shape and sharding follow."""

from collections.abc import Sequence

from jax_refusal.models import experts, gemma4, kinds
from jax_refusal.models.architecture import Architecture


def axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """Path -> logical axes, of the leaves that a model of this architecture has.

    Outputs come first, as in Hugging Face's linear layers (see `layers.linear`); kernels of experts
    have them last, as the product of rows that are sorted by expert takes them.
    """
    block = {
        "q": ("heads", "head_width", "embed"),
        "k": ("kv_heads", "head_width", "embed"),
        "v": ("kv_heads", "head_width", "embed"),
        "o": ("embed", "heads", "head_width"),
    }
    if arch.experts:
        block |= experts.axes(arch)
    else:
        block |= {"gate": ("mlp", "embed"), "up": ("mlp", "embed"), "down": ("embed", "mlp")}
    if arch.pre_norm:
        block |= {"attn_norm": ("embed",), "mlp_norm": ("embed",)}
    if arch.post_norm:
        block |= {"attn_post_norm": ("embed",), "mlp_post_norm": ("embed",)}
    if arch.qk_norm:
        whole = arch.qk_norm == "projection"
        block |= {
            "q_norm": ("heads", "head_width") if whole else ("head_width",),
            "k_norm": ("kv_heads", "head_width") if whole else ("head_width",),
        }
    if arch.qkv_bias:
        block |= {
            "q_bias": ("heads", "head_width"),
            "k_bias": ("kv_heads", "head_width"),
            "v_bias": ("kv_heads", "head_width"),
        }
    if arch.sinks:
        block |= {"sinks": ("heads",)}
    if arch.out_bias:
        block |= {"o_bias": ("embed",)}
    if arch.mlp_bias:
        block |= {"gate_bias": ("mlp",), "up_bias": ("mlp",), "down_bias": ("embed",)}
    top = {"embed": ("vocab", "embed"), "final_norm": ("embed",)}
    if not arch.tied_head:
        top["head"] = ("vocab", "embed")
    top, block = top | gemma4.top_axes(arch), block | gemma4.block_axes(arch)
    found = top | {f"blocks.{name}": ("layers", *a) for name, a in block.items()}
    if arch.global_head_width:
        apart = kinds.axes(arch)
        names = {path.split(".")[1] for path in apart}
        found = {path: a for path, a in found.items() if path.split(".")[-1] not in names} | apart
    return found


def shape(arch: Architecture, logical: Sequence[str]) -> tuple[int, ...]:
    sizes = {
        "layers": arch.layers,
        "embed": arch.width,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "head_width": arch.head_width,
        "mlp": arch.mlp_width,
        "experts": arch.experts,
        "vocab": arch.vocab,
        **gemma4.sizes(arch),
        **kinds.sizes(arch),
    }
    return tuple(sizes[name] for name in logical)
