"""What the jobs of launch/bench.py cannot do without: products, weights, key/value cache."""

import math

from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture, Attention
from jax_refusal.runtime.batching import Prompts
from jax_refusal.study import selection


def block_weights(arch: Architecture) -> int:
    """Matmul weights of all blocks: what a token is multiplied with, without the head."""
    return sum(math.prod(leaf.shape) for leaf in leaves(arch).values() if leaf.target)


def kv_weights(arch: Architecture) -> int:
    """Of these, what makes the keys and values of the last layer."""
    mixer = arch.specs[-1].mixer
    assert isinstance(mixer, Attention)
    return 2 * arch.width * mixer.kv_heads * mixer.head_width


def head_weights(arch: Architecture) -> int:
    return arch.vocab * arch.width


def weight_bytes(arch: Architecture) -> int:
    """All weights in float32, a tied head once."""
    return 4 * sum(math.prod(leaf.shape) for leaf in leaves(arch).values())


def cache_bytes(arch: Architecture, rows: int, context: float) -> float:
    """Keys and values of `context` tokens in float32."""
    mixers = [s.mixer for s in arch.specs if isinstance(s.mixer, Attention)]
    own = sum(m.kv_heads * m.head_width for m in mixers if m.remembers)
    return 4 * 2 * own * context * rows


def tokens(prompts: Prompts) -> int:
    """Real tokens, the shared prefix once."""
    return sum(map(len, prompts.ids)) - (len(prompts.ids) - 1) * prompts.prefix


def collect_flops(arch: Architecture, tokens: int) -> float:
    """What enters the last layer needs all layers before it."""
    return 2.0 * block_weights(arch) * (arch.layers - 1) / arch.layers * tokens


def score_flops(arch: Architecture, prompts: Prompts, start: int = 0) -> float:
    """Logits at the last token of every prompt, from layer `start` on: the last layer needs keys
    and values of all tokens, and the rest of it at these."""
    layer = block_weights(arch) / arch.layers
    keys = kv_weights(arch)
    each = layer * (arch.layers - 1 - start) + keys
    return 2.0 * (each * tokens(prompts) + (layer - keys + head_weights(arch)) * len(prompts.ids))


def select_flops(
    arch: Architecture, table: list[selection.Candidate], harmful: Prompts, harmless: Prompts
) -> float:
    """What the scores in a table need; an addition at layer l needs the layers from l on."""
    flops = score_flops(arch, harmless)  # unedited: KL, induce
    for c in table:
        for score, prompts, start in (
            (c.kl_div_score, harmless, 0),
            (c.refusal_score, harmful, 0),
            (c.steering_score, harmless, c.layer),
        ):
            if score is not None:
                flops += score_flops(arch, prompts, start)
    return flops
