"""The rotary embedding of a `config.json`, read strictly."""

import math
from collections.abc import Mapping
from typing import Any

from jax_refusal.families.fields import ill_typed
from jax_refusal.families.registry import Config
from jax_refusal.messages import shown
from jax_refusal.models.spec import Rope, UnsupportedModel

# Kind -> field of the file -> field of `Rope`, "" where it is used here or says nothing.
ORIGINAL = {"original_max_position_embeddings": "original_context"}
REQUIRED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": ""},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **ORIGINAL,
    },
    "yarn": {"factor": "factor", **ORIGINAL},
    "longrope": {"short_factor": "short_factor", "long_factor": "long_factor", **ORIGINAL},
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
# What may be null, and is then as if the file did not say it.
NULLABLE: dict[str, frozenset[str]] = {
    "yarn": frozenset(OPTIONAL["yarn"]) - {"truncate"},
    "longrope": frozenset(OPTIONAL["longrope"]),
}
BESIDE = ("rope_theta", "partial_rotary_factor")  # what earlier files say outside of rope_scaling


def read_rope(
    fields: Mapping[str, Any],  # of rope_parameters or rope_scaling
    default_base: float,
    context: int,  # tokens, of the whole model
    rename: Mapping[str, str] | None = None,  # kinds that the family calls by another name
) -> Rope:
    """The settings of one rotary embedding; UnsupportedModel names what is not computed.

    Dynamic NTK is what transformers makes of it: up to the context it changes nothing.
    """
    fields = _by_one_name(fields)
    kind = fields.pop("rope_type", "default")
    kind = (rename or {}).get(kind, kind)
    if kind not in REQUIRED:
        raise UnsupportedModel(
            f"rope type {shown(kind)} is not supported; supported are {sorted(REQUIRED)}."
        )
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, {})
    known = {"rope_theta", *required, *optional}
    unknown, missing = set(fields) - known, set(required) - set(fields)
    if unknown or missing:
        raise UnsupportedModel(
            f"rope type {kind!r}: unknown fields {sorted(unknown)}, missing {sorted(missing)}."
        )
    if problems := ill_typed(fields, NULLABLE.get(kind, frozenset())):
        raise UnsupportedModel(f"rope type {kind!r}: " + "; ".join(problems) + ".")
    fields = {name: value for name, value in fields.items() if value is not None}
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise UnsupportedModel(
            f"rope type 'llama3': high_freq_factor={fields['high_freq_factor']} is not above "
            f"low_freq_factor={fields['low_freq_factor']}."
        )
    values: dict[str, Any] = {
        ours: tuple(fields[theirs]) if isinstance(fields[theirs], list) else fields[theirs]
        for theirs, ours in (required | optional).items()
        if ours and theirs in fields
    }
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = _attention_factor(kind, fields, context)
    base = float(fields.get("rope_theta", default_base))
    return Rope(base=base, kind="default" if kind == "dynamic" else kind, **values)


def _attention_factor(kind: str, fields: Mapping[str, Any], context: int) -> float:
    """How much longer queries and keys are made, so that attention stays as sharp."""
    if "attention_factor" in fields:
        return float(fields["attention_factor"])
    original = fields["original_max_position_embeddings"]
    if kind == "longrope":
        factor = fields.get("factor") or context / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(fields["factor"]) + 1.0 if fields["factor"] > 1 else 1.0

    one, every = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(one) / scale(every) if one and every else scale(1.0)


def rope_settings(config: Config, default_base: float) -> dict[str, Any]:
    """The settings of a model's rotary embedding, with the base among them.

    transformers 5 writes all into rope_parameters; earlier it was rope_scaling, with the base (and
    the share of channels) beside it. A file may have both where they say the same.
    """
    beside = {name: config[name] for name in BESIDE if config.get(name) is not None}
    usual = {"rope_type": "default", "rope_theta": default_base, **beside}
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = _by_one_name(config.get(name) or {})
        for other, value in beside.items():
            if given.get(other, value) != value:
                raise UnsupportedModel(
                    f"{name}={shown(config[name])} and {other}={shown(value)} differ."
                )
        if given:
            found[name] = usual | given
    new, old = found.get("rope_parameters"), found.get("rope_scaling")
    if new and old and new != old:
        raise UnsupportedModel(
            f"rope_parameters={shown(config['rope_parameters'])} and rope_scaling="
            f"{shown(config['rope_scaling'])} differ, with {beside} beside them: leave one out."
        )
    settings = new or old or usual
    if problems := ill_typed({name: settings[name] for name in BESIDE if name in settings}):
        raise UnsupportedModel("Rotary embedding: " + "; ".join(problems) + ".")
    return settings


def _by_one_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With `type`, as earlier files have it, called rope_type."""
    fields = dict(fields)
    kinds = [fields.pop(name) for name in ("rope_type", "type") if name in fields]
    if any(not isinstance(kind, str) or kind != kinds[0] for kind in kinds):
        raise UnsupportedModel(f"rope type {' and '.join(map(shown, kinds))}: one name is needed.")
    return {"rope_type": kinds[0], **fields} if kinds else fields
