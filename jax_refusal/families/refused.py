"""Models that are known and not computed, with what that would take."""

from jax_refusal.families.registry import REFUSED

OTHER_MIXER = (
    "mixes layers of linear attention or state-space models with attention. That takes a mixer of "
    "its own, as models/delta_net.py and models/mamba.py are, with a recurrent state and a short "
    "convolution beside the key/value cache"
)

# By `model_type`.
REFUSED |= dict.fromkeys(
    """
    qwen4_exp olmo_hybrid kimi_linear bamba jamba falcon_h1 nemotron_h zamba zamba2 lfm2 lfm2_moe
    lfm3 minimax bailing_hybrid recurrent_gemma
    """.split(),
    OTHER_MIXER,
)
