"""Every kind of rotary embedding in every family, against transformers' own module.

The angles are compared at prompts shorter than the original context, as long, and longer; whole
models are in test_longrope.py and tests/fuzz/. Letters: T token, W rotated channels of a head.
"""

import importlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from jax_refusal.families.registry import architecture
from jax_refusal.models.cache import Tokens
from jax_refusal.models.context import _angles
from jax_refusal.models.spec import Attention
from tests.families.configs import hf_config
from tests.tiny_families import FAMILIES, INSIDE
from tests.tolerances import PARITY, assert_close

ORIGINAL, CONTEXT = 16, 64  # tokens
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
NESTED = ("gemma3_text", "olmo3", "gemma4_text", "gemma4_unified_text")
HAVE_SHARE = (
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)  # for which proportional has no name
TEXT = sorted(set(FAMILIES) - set(INSIDE))
# What transformers refuses, too, or has no whole setting for.
NOT_HERE = {
    *(("phi3", kind) for kind in KINDS if kind not in ("default", "longrope")),
    *((family, "proportional") for family in TEXT if family not in NESTED),
    *((family, "longrope") for family in TEXT if family.startswith("gemma4")),
}
PAIRS = [(family, kind) for family in TEXT for kind in KINDS if (family, kind) not in NOT_HERE]


def settings(family: str, kind: str, width: int) -> dict[str, Any]:
    """Of one rotary embedding that turns so many channels."""
    found = {**KINDS[kind], "rope_theta": 500000.0}
    if kind == "longrope":
        half = width // 2
        found["short_factor"] = np.linspace(1, 2, half).tolist()
        found["long_factor"] = np.linspace(3, 9, half).tolist()
    if family == "ministral3":
        found |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": ORIGINAL}
    return found


def configured(family: str, kind: str) -> PreTrainedConfig:
    own = FAMILIES[family][1]
    width = own.get("head_dim", 8)
    share = 0.25 if family in HAVE_SHARE else 1.0
    rope: dict[str, Any] = settings(family, kind, int(width * share))
    changed: dict[str, Any] = {"original_max_position_embeddings": ORIGINAL}
    if family in NESTED:
        wide = own.get("global_head_dim", width)
        local = {"rope_type": "default", "rope_theta": 500000.0}
        changed["layer_types"] = own.get("layer_types", [SLIDING, FULL] * 2)
        rope = {FULL: settings(family, kind, wide), SLIDING: local}
    if family == "mixtral":
        changed["head_dim"] = width
    if family == "granitemoehybrid":
        changed["position_embedding_type"] = "rope"
    if family != "phi3":
        del changed["original_max_position_embeddings"]
    return hf_config(family, rope_parameters=rope, **changed)


def theirs(config: PreTrainedConfig, length: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of layer ("" where all are alike) -> cosines and sines [T, W / 2]."""
    name = type(config).__module__.replace("configuration", "modeling")
    module = importlib.import_module(name)
    (rotary,) = [
        value
        for key, value in vars(module).items()
        if key.endswith("RotaryEmbedding") and "Vision" not in key and "Audio" not in key
    ]
    embedding, found = rotary(config), {}
    types = sorted(set(config.layer_types)) if isinstance(embedding.rope_type, dict) else [""]
    for kind in types:
        own = {"layer_type": kind} if kind else {}
        cos, sin = embedding(torch.zeros(1), torch.arange(length)[None], **own)
        assert cos.shape[:2] == (1, length)
        half = cos.shape[-1] // (1 if "gpt_oss" in name else 2)
        found[kind] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    return found


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_angles(family: str, kind: str) -> None:
    config = configured(family, kind)
    arch = architecture(json.loads(config.to_json_string()))
    assert arch.context == CONTEXT
    for length in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, CONTEXT):
        tokens = Tokens.padded(jnp.zeros((1, length), jnp.int32))
        ours, expected = _angles(arch, tokens), theirs(config, length)
        for spec in set(arch.specs):
            if isinstance(spec.mixer, Attention) and arch.ropes[spec.mixer.rope].kind != "none":
                name = (SLIDING if spec.mixer.window else FULL) if "" not in expected else ""
                for x, y in zip(ours[spec.mixer.rope], expected[name], strict=True):
                    assert_close(x[0, :, 0], y, PARITY, f"{family} {kind} {length}")


def test_every_kind_and_every_family_is_there() -> None:
    assert len(PAIRS) > 150 and {family for family, _ in PAIRS} == set(TEXT)
