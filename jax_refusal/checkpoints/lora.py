"""Low-rank adapters (LoRA, Hu et al. 2021) in the Hugging Face PEFT format, merged into weights.

Letters: L layers that a leaf is stacked on, E experts, M rank, I inputs and O outputs of a
projection as Hugging Face flattens them (weights are [O, I]). The merged weight is W + scale B A
with A [M, I] and B [O, M]; in DoRA (Liu et al. 2024), its rows are brought to given magnitudes.
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

from jax_refusal.checkpoints import hf, lora_config, lora_modules
from jax_refusal.checkpoints.lora_config import AdapterError, Settings
from jax_refusal.checkpoints.lora_modules import MAGNITUDES, PREFIX, A, B, Given, Spot
from jax_refusal.checkpoints.sources import file_sha256
from jax_refusal.checkpoints.tensors import read_safetensors
from jax_refusal.messages import listed
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import Leaf
from jax_refusal.models.spec import Architecture

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """Path of a leaf -> A [L, M, I] and B [L, O, M], of experts [L, E, M, I] and [L, E, O, M];
    zeros where a layer has none. Magnitudes [L, O] of DoRA; NaN where a layer has none."""

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: float = dataclasses.field(metadata={"static": True})
    magnitudes: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


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
        leaf, weight = leaves(model.arch)[path], arrays[path]
        size = dict(zip(leaf.axes, leaf.shape, strict=True))
        a, b = (x.astype(jnp.float32) for x in (adapter.a[path], adapter.b[path]))
        delta = adapter.scale * jnp.einsum("...om,...mi->...oi", b, a, precision="highest")
        axes = lora_modules.unfolded(leaf)
        back = [axes.index(axis) for axis in leaf.axes]
        folded = [size[axis] for axis in axes]
        merged = weight.astype(jnp.float32) + delta.reshape(folded).transpose(back)
        if path in adapter.magnitudes:
            rows = merged.transpose([leaf.axes.index(axis) for axis in axes]).reshape(delta.shape)
            share = adapter.magnitudes[path] / jnp.linalg.norm(rows, axis=-1)
            rows *= jnp.where(jnp.isnan(adapter.magnitudes[path]), 1.0, share)[..., None]
            merged = rows.reshape(folded).transpose(back)
        arrays[path] = merged.astype(weight.dtype)
    return Transformer(model.arch, arrays)


def locate(adapter: str) -> Path:
    """The directory of an adapter: a path, or "builtin:NAME" for one that ships with us."""
    if not adapter.startswith("builtin:"):
        try:
            return Path(adapter).expanduser()
        except RuntimeError as error:  # ~name of a user that there is not
            raise AdapterError(f"model.adapter={adapter!r}: {error}") from None
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
    try:
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        pickle = WEIGHTS in missing and (path / PICKLE).is_file()
    except OSError as error:
        raise AdapterError(f"model.adapter={str(path)!r} cannot be read: {error}.") from None
    if missing:
        hint = f" Its {PICKLE} is a pickle, which is never opened: save it anew with PEFT." * pickle
        raise AdapterError(
            f"model.adapter={str(path)!r} lacks {missing}; a PEFT LoRA directory is needed.{hint}"
        )


def read(adapter: str, arch: Architecture) -> Adapter:
    """A PEFT adapter directory; AdapterError names everything in it that is not computed here."""
    path = locate(adapter)
    _check_files(path)
    settings = lora_config.read(path / CONFIG)
    given, problems = lora_modules.sort_out(read_safetensors([path / WEIGHTS]), arch)
    spots, contradictions = lora_modules.fit(given, settings, arch)
    found, broken = _stacked(given, settings, spots)
    problems += contradictions + broken
    if not found.a and not problems:
        problems = ["it holds nothing for the text model"]
    if problems:
        raise AdapterError(
            f"The adapter {path} cannot be used: {listed(problems)}. If it is what it should be, "
            f"{lora_config.MERGE}."
        )
    return found


def _stacked(
    given: Given, settings: Settings, spots: Mapping[str, Spot]
) -> tuple[Adapter, list[str]]:
    """The matrices of all layers, and names of those that no weights can hold.

    An adapter of lower rank than others is filled up with zeros. Where scales differ, each is in
    its B.
    """
    scales = {name: settings.scale_of(spot.key) for name, spot in spots.items()}
    rank = max((settings.rank_of(spot.key) for spot in spots.values()), default=1)
    scale = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    magnitudes: dict[str, np.ndarray] = {}
    problems = []
    for name, spot in spots.items():
        files = {
            part: tensor[(slice(None),) * len(tensor.shape)].astype(np.float32)
            for part, tensor in given.parts[name].items()
        }
        peaks = {part: float(np.abs(x).max()) for part, x in files.items()}
        if broken := [part for part, peak in peaks.items() if not math.isfinite(peak)]:
            problems += [f"{PREFIX}{name}.{part} is not finite" for part in broken]
            continue
        most = math.prod(max(1.0, x) for x in (*peaks.values(), scales[name] * rank))
        if most > LARGEST:
            problems.append(f"{name} changes weights by more than float32 can hold")
            continue
        own_a, own_b = spot.halves(files[A], files[B] * np.float32(scales[name] / scale))
        for part in spot.group.parts:
            stack = part.shape[: len(part.counted) + len(part.dimensions) - 2]
            rows = spot.outputs(part)
            _put(a, part.path, (*stack, rank, own_a.shape[2]), spot.place, own_a)
            _put(b, part.path, (*stack, len(rows), rank), spot.place, own_b[:, rows])
            if MAGNITUDES in files:
                unknown = np.full((*stack, len(rows)), np.nan, np.float32)
                magnitudes.setdefault(part.path, unknown)[spot.place] = files[MAGNITUDES][rows]
    return Adapter(_placed(a), _placed(b), scale, _placed(magnitudes)), problems


def _placed(stacks: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jnp.asarray(stacks[path]) for path in sorted(stacks)}


def _put(
    stacks: dict[str, np.ndarray],
    path: str,
    shape: tuple[int, ...],  # of the leaf's stack
    place: tuple[int, ...],
    values: np.ndarray,  # [E, ...], E = 1 for a matrix
) -> None:
    if path not in stacks:
        stacks[path] = np.zeros(shape, np.float32)
    target = stacks[path][place]
    target = target[..., : values.shape[-2], : values.shape[-1]]
    target[...] = values.reshape(target.shape)


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
                "adapter of a fused projection is read, and not made here."
            )
    if not found:
        allowed = list(dict.fromkeys(group.parts[0].target for group in projections))
        raise AdapterError(f"{target!r} is no projection of this model; there are {allowed}.")
    return [leaf for (leaf,) in found]


def _name(leaf: Leaf, layer: int, half: str) -> str:
    module = leaf.stored.name.removesuffix(".weight").format(layer=layer)
    return f"{PREFIX}{module}.lora_{half}.weight"
