"""Every leaf of a model, out of the declarations of its layers.

Letters: V vocabulary, D residual width.
"""

from functools import cache

from jax_refusal.models import block, gated_input
from jax_refusal.models.params import READS, WRITES, Leaf, Param
from jax_refusal.models.spec import Architecture, Slot, Stored, slots


def top_params(arch: Architecture) -> list[Param]:
    """What lies beside the layers."""
    table, stream = (("vocab", arch.vocab), ("embed", arch.width)), (("embed", arch.width),)
    found = [
        Param("embed", table, WRITES, "model.embed_tokens.weight", gguf="token_embd.weight"),
        Param("final_norm", stream, READS, "model.norm.weight", gguf="output_norm.weight"),
    ]
    if not arch.tied_head:
        found.append(Param("head", table, READS, "lm_head.weight", gguf="output.weight"))
    return found + gated_input.top_params(arch)


@cache
def leaves(arch: Architecture) -> dict[str, Leaf]:
    """Path -> leaf, exactly those that a model of this architecture has."""
    found = [_leaf(arch, param) for param in top_params(arch)]
    for slot in slots(arch):
        found += [_leaf(arch, param, slot) for param in block.params(slot.spec, arch)]
    return {leaf.path: leaf for leaf in found}


def _leaf(arch: Architecture, param: Param, slot: Slot | None = None) -> Leaf:
    usual = Stored(name=param.hf, layout=param.layout)
    named = arch.naming.of_leaf.get(param.name, usual)
    layout = named.layout or param.layout or " ".join(axis for axis, _ in param.axes)
    if slot is None:
        return Leaf(param.name, param, (), Stored(name=named.name, layout=layout))
    name = arch.naming.layer + named.name
    path = f"{slot.name}.{param.name}"
    return Leaf(path, param, slot.layers, Stored(name=name, layout=layout))
