"""Random config files of every family: sound ones, and ones that were changed at random.

A case is a function of the seed and its number alone.
"""

import copy
import json
import math
import random
from functools import cache
from typing import Any

from jax_refusal.families.fields import KINDS, NO_EFFECT
from jax_refusal.families.registry import FAMILIES, FIXED
from tests.families.configs import EVERY, text, written
from tests.models.cases import CASES, fields
from tests.models.test_ropes import KINDS as ROPES

Config = dict[str, Any]
DEEP: Any = []
for _ in range(50):
    DEEP = [DEEP]
HOSTILE = [
    *(None, True, False, math.nan, math.inf, -math.inf, 0, -1, 1, 2, 3, 7, 8, 64, -0.0, 0.5, 1.0),
    *(2.5, 1e-9, 1e-300, 1e300, 10**6, 10**12, 2**31, 10**400, "", "auto", "x" * 10**5),
    *("full_attention", "silu", "linear", [], {}, [None], [0, 1], [[1]], {"a": {}}, DEEP),
    *(["full_attention"] * 4, ["sliding_attention"] * 4, [1.0] * 4, [1.0] * 10**5),
]
# Sound values of fields, where a config has them.
SOUND: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 2, 3],
    "hidden_size": [32, 48],
    "intermediate_size": [16, 40],
    "vocab_size": [31, 50],
    "head_dim": [4, 8, 12],
    "rms_norm_eps": [1e-6, 1e-5, 1e-3],
    "max_position_embeddings": [24, 64, 512],
    "sliding_window": [3, 7, 100],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "attention_out_bias": [True, False],
    "mlp_bias": [True, False],
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [1, 2, 3],
    "moe_intermediate_size": [12, 20],
    "query_pre_attn_scalar": [4, 24],
    "attn_logit_softcapping": [1.5, 50.0],
    "final_logit_softcapping": [1.5, 30.0],
    "swiglu_limit": [0.7, 7.0],
    "no_rope_layer_interval": [2, 3],
    "residual_multiplier": [0.3, 1.0],
    "embedding_multiplier": [2.0, 12],
    "logits_scaling": [0.5, 8],
    "attention_multiplier": [0.1, 0.3],
    "linear_conv_kernel_dim": [2, 4],
    "mamba_d_conv": [2, 4],
}
LAYERED = ("layer_types", "no_rope_layers", "per_layer_config", "num_kv_shared_layers")


@cache
def bases() -> tuple[str, ...]:
    """As JSON: the smallest of each family, and those with a switch at work."""
    found = [written(family) for family in EVERY]
    for name in CASES:
        case = fields(name, vocab_size=31)
        found.append(written(case.pop("architecture"), **case))
    return tuple(map(json.dumps, found))


def generator(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {number}")


def sound(rng: random.Random) -> Config:
    """A config that is to be read, and computed as transformers does; of no Qwen-1."""
    config: Config = json.loads(rng.choice([base for base in bases() if "kv_channels" not in base]))
    own = text(config)
    kept = {*FIXED, *FAMILIES[own["model_type"]].fixed}
    if any(name in own for name in LAYERED):
        kept.add("num_hidden_layers")
    if "linear_key_head_dim" in own:  # a quarter of a head is turned, and a narrow state is little
        kept |= {"head_dim", "rms_norm_eps"}
    for name, values in SOUND.items():
        if own.get(name) is not None and name not in kept and rng.random() < 0.4:
            own[name] = rng.choice(values)
    rope = own.get("rope_parameters") or {}
    if "rope_theta" in rope:
        rope["rope_theta"] = rng.choice([50.0, 1e4, 1e6])
    if rng.random() < 0.3:
        own |= {"unk_token_id": 3, "_name_or_path": "somewhere", "temperature": 0.7}
    return config


def changed(rng: random.Random) -> Config:
    """A config in which up to four things are not as they were."""
    config: Config = json.loads(rng.choice(bases()))
    for _ in range(rng.randint(1, 4)):
        _change(rng, _inside(rng, config))
    return config


def _inside(rng: random.Random, config: Config) -> Config:
    """The config, or an object in it."""
    found = [text(config)] * 6 + [config]
    for value in text(config).values():
        if isinstance(value, dict):
            found += [value] * 3 + [each for each in value.values() if isinstance(each, dict)] * 3
    return rng.choice(found)


def _change(rng: random.Random, fields: Config) -> None:
    names = list(fields) or ["hidden_size"]
    name = rng.choice(names)
    kind = rng.random()
    if kind < 0.45:
        fields[name] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind < 0.55:
        fields.pop(name, None)
    elif kind < 0.65 and isinstance(fields.get(name), int | float):
        fields[name] = rng.choice(
            [fields[name] * 2, fields[name] // 2, fields[name] + 1, -fields[name]]
        )
    elif kind < 0.72 and isinstance(fields.get(name), list):
        _change_list(rng, fields[name])
    elif kind < 0.8:
        fields[name] = copy.deepcopy(fields.get(rng.choice(names)))
    elif kind < 0.9:
        known = [*KINDS, *sorted(NO_EFFECT), *FIXED, "x", "rope_scaling", "rope_parameters"]
        fields[rng.choice(known)] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind < 0.95:
        where = rng.choice(["rope_scaling", "rope_parameters"])
        fields[where] = {**rng.choice([*ROPES.values()]), "rope_theta": rng.choice([1e4, 50.0])}
    else:
        other = text(json.loads(rng.choice(bases())))
        taken = rng.choice(list(other))
        fields[taken] = other[taken]


def _change_list(rng: random.Random, values: list[Any]) -> None:
    if values and rng.random() < 0.5:
        values.pop(rng.randrange(len(values)))
    values.insert(rng.randint(0, len(values)), copy.deepcopy(rng.choice([*values, *HOSTILE])))
