"""Rotary frequencies of published settings, one by one, against transformers.

A tiny model has too few channels for what happens between those that are kept and those that are
stretched. Letters: K head width.
"""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jax_refusal.families.rope_fields import read_rope
from jax_refusal.models.rope import frequencies
from tests.tolerances import PARITY

K, CONTEXT = 128, 131072
SETTINGS: dict[str, dict[str, Any]] = {
    "llama-3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "gemma-3": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "gemma-4": {
        "rope_type": "proportional",
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 0.25,
    },
    "gemma-4, longer": {
        "rope_type": "proportional",
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 0.25,
        "factor": 8.0,
    },
    "qwen-2.5": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "olmo-3": {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    },
    "ministral-3": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 16384,
    },
    "whole channels": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "phi-4-mini": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + i / 10 for i in range(K // 2)],
        "long_factor": [9.0] * (K // 2),
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies(name: str) -> None:
    settings = SETTINGS[name]
    config_class = Phi3Config if settings["rope_type"] == "longrope" else LlamaConfig
    config = config_class(
        hidden_size=2 * K,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(settings),
        pad_token_id=0,
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config)
    rope = read_rope(settings, 10000.0, CONTEXT)
    np.testing.assert_allclose(frequencies(rope, K), theirs.numpy(), rtol=PARITY)
    np.testing.assert_allclose(rope.attention_factor, factor, rtol=PARITY)


def test_no_rotation_is_exact() -> None:
    rope = read_rope({}, 10000.0, CONTEXT)
    assert frequencies(rope, K)[0] == 1.0
    still = type(rope)(base=rope.base, kind="none")
    np.testing.assert_array_equal(frequencies(still, K), 0.0)
