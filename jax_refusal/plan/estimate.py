"""What each program of a run takes on a slice: memory by the TPU compiler, time by the roofline."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import STREAM
from jax_refusal.models.spec import Architecture, Attention, Moe, slots
from jax_refusal.plan.chips import Chip
from jax_refusal.plan.hlo import Collective, collectives
from jax_refusal.plan.programs import Program

GIB = 2**30
# What the compiler says where memory does not do: of the whole program, or of its temporaries.
OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([GM]) of |temporaries \(([\d.]+)([GM])\) exceeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One program on one chip of a slice."""

    program: Program
    arguments: float  # GiB
    temporaries: float  # GiB
    peak: float  # GiB; of a program that does not fit, what it would use
    fits: bool
    exchanges: tuple[Collective, ...]
    flops: float  # of one run, on each chip
    read: float  # bytes of weights and cache of one run, on each chip
    roofline: float  # s, what neither products nor memory can beat


def estimate(
    program: Program, arch: Architecture, chip: Chip, devices: int, width: int
) -> Estimate:
    """Compiles a program; width: bytes of a number in weights and cache."""
    flops = work(arch, program) / devices
    read = width * (weights_read(arch, program.tokens) + cache_read(arch, program)) / devices
    seconds = max(flops / (chip.flops * 1e12), read / (chip.bandwidth * 1e9))
    found = {"program": program, "flops": flops, "read": read, "roofline": seconds}
    try:
        compiled = program.lower().compile()
    except Exception as error:
        match = OUT_OF_MEMORY.search(str(error))
        if match is None:
            raise
        whole, unit, temporaries, its_unit = match.groups()
        used = float(whole or temporaries) / (1024 if (unit or its_unit) == "M" else 1)
        none = {"arguments": math.nan, "temporaries": math.nan, "exchanges": ()}
        return Estimate(**found, **none, peak=used, fits=False)
    memory: Any = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes / GIB
    temporaries = memory.temp_size_in_bytes / GIB
    outputs = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB
    peak = arguments + temporaries + max(0.0, outputs)
    exchanges = tuple(collectives(compiled.as_text()))
    return Estimate(
        **found,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        fits=peak <= chip.memory,
        exchanges=exchanges,
    )


def work(arch: Architecture, program: Program) -> float:
    """FLOPs of a program's products with weights, once for each token, and with the head."""
    head = arch.vocab * arch.width
    return 2.0 * (weights_of_a_token(arch) * program.tokens + head * program.logits)


def weights_of_a_token(arch: Architecture) -> float:
    """Numbers of the layers' matrices that one token is multiplied with: of its own experts."""
    return sum(size * share for size, share in _matrices(arch))


def weights_read(arch: Architecture, tokens: int) -> float:
    """Numbers of the weights that a pass over so many tokens reads, the head among them."""
    return arch.vocab * arch.width + sum(
        size * min(1.0, share * tokens) for size, share in _matrices(arch)
    )


def cache_read(arch: Architecture, program: Program) -> float:
    """Keys and values of every row's context, and states."""
    found = 0.0
    for spec in arch.specs:
        mixer = spec.mixer
        if isinstance(mixer, Attention) and mixer.remembers:
            context = min(program.context, mixer.window or program.context)
            found += 2 * mixer.kv_heads * mixer.head_width * context
    return found * program.rows


def _matrices(arch: Architecture) -> Iterable[tuple[int, float]]:
    """Size of each leaf with an axis of the stream and another one, of a layer; and the share of it
    that one token is multiplied with."""
    shares = {}
    for slot in slots(arch):
        for _, branch in slot.spec.branches:
            moe = branch if isinstance(branch, Moe) else getattr(branch, "moe", None)
            if moe is not None:
                shares[slot.name] = moe.experts_per_token / moe.experts
    for leaf in leaves(arch).values():
        own = [name for name, _ in leaf.param.axes]
        if leaf.layers and STREAM in own and len(own) > 1:
            group = leaf.path.rpartition(".")[0]
            share = shares.get(group, 1.0) if "experts" in own and len(own) > 2 else 1.0
            yield math.prod(leaf.shape), share
