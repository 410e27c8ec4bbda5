"""Low-rank adapters (LoRA, Hu et al. 2021) in the Hugging Face PEFT format, merged into weights.

Letters: L layers that a leaf is stacked on, M rank, I inputs and O outputs of a projection as
Hugging Face flattens them (weights are [O, I]). The merged weight is W + scale B A with A [M, I]
and B [O, M].
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.sources import file_sha256, read_json
from jax_refusal.checkpoints.tensors import read_safetensors
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import Leaf
from jax_refusal.models.spec import Architecture

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
    """Path of a leaf -> A [L, M, I] and B [L, O, M]; zeros where a layer has none."""

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
    for leaf in (leaf for target in targets for leaf in _targeted(arch, target)):
        (out, into), layers = leaf.sizes, len(leaf.layers)
        key, use = jax.random.split(key)
        bound = 1 / math.sqrt(into)
        a[leaf.path] = jax.random.uniform(use, (layers, rank, into), minval=-bound, maxval=bound)
        b[leaf.path] = jnp.zeros((layers, out, rank))
    return Adapter(a, b, alpha / rank)


def merge(model: Transformer, adapter: Adapter) -> Transformer:
    """A model with scale * B A added to the adapted weights; differentiable in the adapter."""
    arrays = model.leaves()
    for path in adapter.a:
        leaf = leaves(model.arch)[path]
        size = dict(zip(leaf.axes, leaf.shape, strict=True))
        a, b = (x.astype(jnp.float32) for x in (adapter.a[path], adapter.b[path]))
        delta = adapter.scale * jnp.einsum("lom,lmi->loi", b, a, precision="highest")
        axes = ["layers", *(axis for dimension in leaf.dimensions for axis in dimension)]
        delta = delta.reshape([size[axis] for axis in axes])
        delta = delta.transpose([axes.index(axis) for axis in leaf.axes])
        weight = arrays[path]
        arrays[path] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
    return Transformer(model.arch, arrays)


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
    halves = _halves(arch)
    parts: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name, tensor in read_safetensors([path / WEIGHTS]).items():
        if name not in halves:
            problems.append(f"tensor {name} belongs to no projection of this model")
            continue
        leaf, at, half = halves[name]
        expected = _shape(leaf, config.get("r"), half)
        if tensor.shape != expected:
            problems.append(f"{name} has shape {tensor.shape}, not {expected}")
            continue
        values = tensor[(slice(None), slice(None))].astype(np.float32)
        if not np.isfinite(values).all():
            problems.append(f"{name} is not finite")
        parts.setdefault(leaf.path, {"A": {}, "B": {}})[half][at] = values
    for leaf_path, given in parts.items():
        if given["A"].keys() != given["B"].keys():
            target = leaves(arch)[leaf_path].target
            problems.append(f"{target} has A and B for different layers")
    if problems or not parts:
        raise AdapterError(
            f"The adapter {path} cannot be used: " + ("; ".join(problems) or "it is empty") + "."
        )
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def stacked(half: str) -> dict[str, jax.Array]:
        found = {}
        for leaf_path in sorted(parts):
            leaf, given = leaves(arch)[leaf_path], parts[leaf_path][half]
            zero = np.zeros(_shape(leaf, rank, half), np.float32)
            layers = [given.get(at, zero) for at in range(len(leaf.layers))]
            found[leaf_path] = jnp.asarray(np.stack(layers))
        return found

    return Adapter(stacked("A"), stacked("B"), scale)


def files(
    adapter: Adapter, arch: Architecture, base_model: str, dtype: str = "bfloat16"
) -> dict[str, bytes]:
    """The two files of a PEFT adapter directory, as bytes by name."""
    from safetensors.numpy import save

    rank = next(iter(adapter.a.values())).shape[1]
    tensors: dict[str, np.ndarray] = {}
    for half, stacks in (("A", adapter.a), ("B", adapter.b)):
        for path, stack in stacks.items():
            leaf = leaves(arch)[path]
            for layer, values in zip(leaf.layers, np.asarray(stack), strict=True):
                tensors[_name(leaf, layer, half)] = values.astype(hf.numpy_dtype(dtype))
    config: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({leaves(arch)[path].target for path in adapter.a}),
        "inference_mode": True,
    }
    return {
        CONFIG: json.dumps(config, indent=2).encode() + b"\n",
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def _targeted(arch: Architecture, target: str) -> list[Leaf]:
    """The leaves of a projection that is named as PEFT names it."""
    projections = [group for group in hf.groups(arch) if group.parts[0].target]
    found = [group.parts for group in projections if group.parts[0].target == target]
    for parts in found:
        if len(parts) > 1:
            raise AdapterError(
                f"{target!r} of this model holds {[leaf.path for leaf in parts]} in one tensor; an "
                "adapter of a fused projection is not read."
            )
    if not found:
        allowed = list(dict.fromkeys(group.parts[0].target for group in projections))
        raise AdapterError(f"{target!r} is no projection of this model; there are {allowed}.")
    return [leaf for (leaf,) in found]


def _halves(arch: Architecture) -> dict[str, tuple[Leaf, int, str]]:
    """Every tensor that an adapter may hold -> its leaf, where in the stack, and "A" or "B"."""
    single = [group.parts[0] for group in hf.groups(arch) if len(group.parts) == 1]
    return {
        _name(leaf, layer, half): (leaf, at, half)
        for leaf in single
        if leaf.target
        for at, layer in enumerate(leaf.layers)
        for half in "AB"
    }


def _name(leaf: Leaf, layer: int, half: str) -> str:
    module = leaf.stored.name.removesuffix(".weight").format(layer=layer)
    return f"{PREFIX}{module}.lora_{half}.weight"


def _shape(leaf: Leaf, rank: Any, half: str) -> tuple[Any, Any]:
    out, into = leaf.sizes
    return (rank, into) if half == "A" else (out, rank)
