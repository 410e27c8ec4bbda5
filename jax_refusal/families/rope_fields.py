"""The rotary embedding of a `config.json`, read strictly."""

import math
from collections.abc import Mapping
from typing import Any

from jax_refusal.families.registry import Config
from jax_refusal.models.spec import Rope, UnsupportedModel

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


def rope_settings(config: Config) -> dict[str, Any]:
    """The rope settings: transformers 5 writes all into rope_parameters, earlier two fields."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and new != old:
        raise UnsupportedModel(f"rope_parameters={new!r} and rope_scaling={old!r} differ.")
    return dict(new or old)
