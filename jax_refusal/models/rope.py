"""Rotary embedding: its settings out of a `config.json`, and its frequencies.

Letters: K head width, W rotated channels of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_refusal.models.architecture import Rope, UnsupportedModel

# Kind -> field of the file -> field of `Rope`, "" where it is used here or says nothing.
ORIGINAL = {"original_max_position_embeddings": "original_context"}
REQUIRED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **ORIGINAL,
    },
    "yarn": {"factor": "factor", **ORIGINAL},
    "longrope": {"short_factor": "short_factor", "long_factor": "", **ORIGINAL},
    "proportional": {},
}
OPTIONAL: dict[str, dict[str, str]] = {
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "",
        "mscale": "",
        "mscale_all_dim": "",
    },
    "longrope": {"factor": "", "attention_factor": ""},
    "proportional": {"partial_rotary_factor": "share", "factor": "factor"},
}


def read_rope(
    fields: Mapping[str, Any],  # of rope_parameters or rope_scaling
    default_base: float,
    context: int,  # tokens, of the whole model
    rename: Mapping[str, str] | None = None,  # kinds that the family calls by another name
) -> Rope:
    """The settings of one rotary embedding; UnsupportedModel names what is not computed."""
    fields = dict(fields)
    base = fields.pop("rope_theta", None)
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    kind = (rename or {}).get(kind, kind)
    if kind not in REQUIRED:
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported; supported are {sorted(REQUIRED)}."
        )
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, {})
    unknown, missing = set(fields) - set(required) - set(optional), set(required) - set(fields)
    if unknown or missing:
        raise UnsupportedModel(
            f"rope type {kind!r}: unknown fields {sorted(unknown)}, missing {sorted(missing)}."
        )
    values: dict[str, Any] = {
        ours: tuple(value) if isinstance(value, list) else value
        for theirs, ours in (required | optional).items()
        if ours and (value := fields.get(theirs)) is not None
    }
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = _attention_factor(kind, fields, context)
    return Rope(base=float(default_base if base is None else base), kind=kind, **values)


def _attention_factor(kind: str, fields: Mapping[str, Any], context: int) -> float:
    """How much longer queries and keys are made, so that attention stays as sharp."""
    given = fields.get("attention_factor")
    if given is not None:
        return float(given)
    original = fields["original_max_position_embeddings"]
    if kind == "longrope":
        factor = fields.get("factor") or context / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(fields["factor"]) + 1.0 if fields["factor"] > 1 else 1.0

    one, every = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(one) / scale(every) if one and every else scale(1.0)


def frequencies(rope: Rope, width: int) -> np.ndarray:  # [W / 2] float32, radians per token
    """Rotary frequencies with the scaling of their kind; zeros, which turn nothing, for "none".

    In float32 and rounded where Hugging Face rounds: far into a prompt the last digit of a
    frequency is many last digits of an angle.
    """
    channels = np.arange(0, width, 2, dtype=np.float32)
    powers = np.power(np.float32(rope.base), channels / np.float32(width))
    plain = 1 / powers
    if rope.kind == "none":
        return np.zeros_like(plain)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "proportional":
        turning = int(rope.share * width // 2)
        return np.where(channels / 2 < turning, plain, 0) / np.float32(rope.factor)
    if rope.kind == "longrope":
        if len(rope.short_factor) != len(plain):
            raise UnsupportedModel(
                f"rope type 'longrope': short_factor has {len(rope.short_factor)} numbers for "
                f"{len(plain)} frequencies."
            )
        return 1 / (np.array(rope.short_factor, np.float32) * powers)
    factor = np.float32(rope.factor)
    if rope.kind == "llama3":
        # Wavelengths (tokens per turn) beyond the original context are stretched by `factor`,
        # those well inside it are kept, and those between are blended.
        turns = np.float32(rope.original_context) / (np.float32(2 * math.pi) / plain)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return (1 - keep) * plain / factor + keep * plain
    if rope.kind == "yarn":
        # The same idea with a ramp over channels, between those that make `beta_fast` and
        # `beta_slow` turns within the original context.
        def channel(turns: float) -> float:
            ratio = math.log(rope.original_context / (turns * 2 * math.pi))
            return width * ratio / (2 * math.log(rope.base))

        low, high = channel(rope.beta_fast), channel(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high  # the library's own guard
        ramp = (channels / 2 - np.float32(low)) / np.float32(high - low)
        keep = 1 - np.clip(ramp, 0, 1)
        return 1 / (factor * powers) * (1 - keep) + plain * keep
    return plain


def frequencies_by_length(rope: Rope, width: int) -> np.ndarray:  # [N, W / 2]
    """Dynamic NTK as Qwen-1 has it, for prompts of up to 1, 2, 4, ... original contexts.

    The base is multiplied by a ** (W / (W - 2)), where a = 2 ** ceil(log2(length / original) + 1)
    - 1 is 1, 3, 7, ...
    """
    steps = range(math.ceil(math.log2(rope.factor)) + 1)
    bases = [rope.base * (2 ** (step + 1) - 1) ** (width / (width - 2)) for step in steps]
    return np.stack([frequencies(Rope(base=base), width) for base in bases])
