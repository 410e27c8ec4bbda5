"""Config files of every family as transformers writes them, of tiny models without weights."""

import copy
import json
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests import qwen1
from tests.tiny_families import FAMILIES, INSIDE

USUAL = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EVERY = [*FAMILIES, "qwen"]  # transformers has no Qwen-1


def hf_config(family: str, **changed: Any) -> PreTrainedConfig:
    """Of the text model alone, where there is more."""
    name, own = FAMILIES[family]
    fields = copy.deepcopy({**USUAL, **own, **changed})
    config_class = getattr(transformers, name).config_class
    if family not in INSIDE:
        return config_class(**fields)
    outer = {name: fields.pop(name) for name in INSIDE[family]}
    return config_class(text_config=fields, **outer)


def written(family: str, **changed: Any) -> dict[str, Any]:
    """config.json."""
    if family == "qwen":
        return {**qwen1.CONFIG, "vocab_size": 31, **changed}
    return json.loads(hf_config(family, **changed).to_json_string())


def text(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model, to be looked at or changed."""
    inside = config.get("text_config")
    return inside if isinstance(inside, dict) else config
