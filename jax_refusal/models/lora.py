"""Low-rank adapters (LoRA, Hu et al. 2021) in the Hugging Face PEFT format, merged into weights.

Letters: L layers, M rank, I inputs and O outputs of a projection as Hugging Face flattens them
(weights are [O, I]). The merged weight is W + scale B A with A [M, I] and B [O, M].
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.models import convert, declaration
from jax_refusal.models.architecture import Architecture
from jax_refusal.models.names import rows
from jax_refusal.models.decoder import Transformer
from jax_refusal.sources import file_sha256, read_json

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of adapter_config.json that change the weights, and the values that are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "layer_replication": (None,),
}
# Fields that say nothing about the merged weights, or are read below. Any other field has to be
# empty: it may be a variant of LoRA that is not computed here.
KNOWN = {
    *FIXED,
    *"r lora_alpha use_rslora target_modules exclude_modules layers_to_transform".split(),
    *"layers_pattern task_type auto_mapping peft_version base_model_name_or_path".split(),
    *"revision inference_mode lora_dropout init_lora_weights megatron_core".split(),
    *"loftq_config eva_config corda_config lora_ga_config qalora_group_size".split(),
    *"runtime_config ensure_weight_tying".split(),
}


class AdapterError(ValueError):
    """An adapter that cannot be read or does not fit the model; all reasons together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """Target ("q_proj", ...) -> A [L, M, I] and B [L, O, M]; zeros where a layer has none."""

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: float = dataclasses.field(metadata={"static": True})


def initial(
    arch: Architecture,
    targets: tuple[str, ...],
    rank: int,
    alpha: float,
    key: jax.Array,
) -> Adapter:
    """An adapter that changes nothing yet: A uniform in +-1/sqrt(I), as PEFT; B zero."""
    a, b = {}, {}
    for target in targets:
        out, into = _sizes(arch, target)
        key, use = jax.random.split(key)
        bound = 1 / math.sqrt(into)
        a[target] = jax.random.uniform(use, (arch.layers, rank, into), minval=-bound, maxval=bound)
        b[target] = jnp.zeros((arch.layers, out, rank))
    return Adapter(a, b, alpha / rank)


def merge(model: Transformer, adapter: Adapter) -> Transformer:
    """A model with scale * B A added to the adapted weights; differentiable in the adapter."""
    leaves = model.leaves()
    for target in adapter.a:
        path, layout = _row(model.arch, target)
        logical = declaration.axes(model.arch)[path][1:]
        a, b = (x.astype(jnp.float32) for x in (adapter.a[target], adapter.b[target]))
        delta = adapter.scale * jnp.einsum("lom,lmi->loi", b, a, precision="highest")
        names = [axis for group in layout for axis in group]
        delta = delta.reshape(model.arch.layers, *declaration.shape(model.arch, names))
        delta = delta.transpose(0, *(1 + names.index(axis) for axis in logical))
        weight = leaves[path]
        leaves[path] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
    return Transformer(model.arch, leaves)


def locate(adapter: str) -> Path:
    """The directory of an adapter: a path, or "builtin:NAME" for one that ships with us."""
    if not adapter.startswith("builtin:"):
        return Path(adapter).expanduser()
    folder = Path(__file__).parents[1] / "adapters"
    names = sorted(path.name for path in folder.glob("*") if (path / CONFIG).is_file())
    name = adapter.removeprefix("builtin:")
    if name not in names:
        raise AdapterError(f"model.adapter={adapter!r}: there is none; builtin are {names}.")
    return folder / name


def fingerprint(adapter: str) -> str:
    """A hash of the adapter's two files; empty for no adapter."""
    if not adapter:
        return ""
    path = locate(adapter)
    _check_files(path)
    return "".join(file_sha256(path / name)[:32] for name in (CONFIG, WEIGHTS))


def _check_files(path: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise AdapterError(
            f"model.adapter={str(path)!r} lacks {missing}; a PEFT LoRA directory is needed."
        )


def read(adapter: str, arch: Architecture) -> Adapter:
    """A PEFT adapter directory; AdapterError names everything in it that is not computed here."""
    path = locate(adapter)
    _check_files(path)
    config = read_json(path / CONFIG)
    problems = [
        f"{field}={config[field]!r} (supported: {list(allowed)})"
        for field, allowed in FIXED.items()
        if field in config and config[field] not in allowed
    ]
    problems += [
        f"{field}={value!r} is not known"
        for field, value in config.items()
        if field not in KNOWN and value
    ]
    tensors = convert.safetensors([path / WEIGHTS])
    parts: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    pattern = re.compile(
        re.escape(PREFIX) + r"model\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight"
    )
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if not match or int(match[1]) >= arch.layers or not _known(arch, match[2]):
            problems.append(f"tensor {name} belongs to no projection of this model")
            continue
        target, half = match[2], match[3]
        out, into = _sizes(arch, target)
        expected = (config.get("r"), into) if half == "A" else (out, config.get("r"))
        if tensor.shape != expected:
            problems.append(f"{name} has shape {tensor.shape}, not {expected}")
            continue
        values = tensor[(slice(None), slice(None))].astype(np.float32)
        if not np.isfinite(values).all():
            problems.append(f"{name} is not finite")
        parts.setdefault((target, half), {})[int(match[1])] = values
    targets = sorted({target for target, _ in parts})
    for target in targets:
        if parts.get((target, "A"), {}).keys() != parts.get((target, "B"), {}).keys():
            problems.append(f"{target} has A and B for different layers")
    if problems or not targets:
        raise AdapterError(
            f"The adapter {path} cannot be used: " + ("; ".join(problems) or "it is empty") + "."
        )
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def stacked(target: str, half: str) -> jax.Array:
        out, into = _sizes(arch, target)
        shape = (rank, into) if half == "A" else (out, rank)
        given = parts[target, half]
        zero = np.zeros(shape, np.float32)
        return jnp.asarray(np.stack([given.get(layer, zero) for layer in range(arch.layers)]))

    return Adapter(
        {t: stacked(t, "A") for t in targets}, {t: stacked(t, "B") for t in targets}, scale
    )


def files(
    adapter: Adapter, arch: Architecture, base_model: str, dtype: str = "bfloat16"
) -> dict[str, bytes]:
    """The two files of a PEFT adapter directory, as bytes by name."""
    from safetensors.numpy import save

    rank = next(iter(adapter.a.values())).shape[1]
    tensors: dict[str, np.ndarray] = {}
    for half, stacks in (("A", adapter.a), ("B", adapter.b)):
        for target, stack in stacks.items():
            module = _module(arch, target)
            for layer, values in enumerate(np.asarray(stack)):
                name = f"{PREFIX}{module.format(layer=layer)}.lora_{half}.weight"
                tensors[name] = values.astype(convert.numpy_dtype(dtype))
    config: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapter.a),
        "inference_mode": True,
    }
    return {
        CONFIG: json.dumps(config, indent=2).encode() + b"\n",
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def _row(arch: Architecture, target: str) -> tuple[str, list[list[str]]]:
    """Leaf path and Hugging Face layout of a projection named as PEFT names it."""
    every = [row for row in rows(arch) if row.name.endswith(".weight") and len(row.layout) == 2]
    every = [row for row in every if "{layer}" in row.name and "{expert}" not in row.name]
    found = [row for row in every if row.name.endswith(f".{target}.weight")]
    if len(found) > 1:
        raise AdapterError(
            f"{target!r} of this model holds {[row.path for row in found]} in one tensor; an "
            "adapter of a fused projection is not read."
        )
    if found:
        return found[0].path, found[0].layout
    allowed = [row.name.split(".")[-2] for row in every]
    raise AdapterError(f"{target!r} is no projection of this model; there are {allowed}.")


def _known(arch: Architecture, target: str) -> bool:
    try:
        return len(_row(arch, target)[1]) == 2
    except AdapterError:
        return False


def _module(arch: Architecture, target: str) -> str:
    """'model.layers.{layer}.self_attn.q_proj' of 'q_proj'."""
    path, _ = _row(arch, target)
    name = next(n for n, p, *_ in rows(arch) if p == path and n.endswith(".weight"))
    return name.removesuffix(".weight")


def _sizes(arch: Architecture, target: str) -> tuple[int, int]:
    """(O, I) of a projection."""
    _, (out, into) = _row(arch, target)
    return math.prod(declaration.shape(arch, out)), math.prod(declaration.shape(arch, into))
