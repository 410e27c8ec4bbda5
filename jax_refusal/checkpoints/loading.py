"""From a model source to a model on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.checkpoints import gguf, hf, lora, orbax
from jax_refusal.checkpoints.quantised.registry import quantisation
from jax_refusal.checkpoints.sources import Source, locate
from jax_refusal.checkpoints.tensors import Tensor, floats, read_safetensors
from jax_refusal.families.registry import architecture
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import Architecture


def load_model(
    source: str | Source,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    adapter: str | None = None,
    *,
    ignore_config_fields: tuple[str, ...] = (),
) -> Transformer:
    """A chat model from a hub id, a Hugging Face directory, a GGUF file, or an installed package.

    dtype: "float32" or "bfloat16", of weights and activations.
    mesh: from `sharding.make_mesh`; one device without.
    adapter: directory of a PEFT LoRA adapter to merge into the weights.
    Raises SourceError, UnsupportedModel, ConversionError or AdapterError: each says what is wrong,
    and what to do.
    """
    found = locate(source) if isinstance(source, str) else source
    mesh = sharding.make_mesh() if mesh is None else mesh
    arch, tensors = read_checkpoint(found, ignore_config_fields)
    numpy_dtype = hf.numpy_dtype(dtype)
    # What does not fit is refused before weights are read.
    change = lora.read(adapter, arch) if adapter else None
    if found.orbax is not None:
        model = orbax.load(arch, found.orbax, mesh, numpy_dtype)
    else:
        model = hf.load(arch, tensors, mesh, numpy_dtype, donatable=change is not None)
    if change is not None:
        # Jitted: the change is computed where the weights lie, and takes the place of the old ones.
        model = jax.jit(lora.merge, donate_argnums=0)(model, change)
    return model


def read_config(source: Source) -> dict[str, Any]:
    """The fields of config.json, or what a GGUF file says of them."""
    return source.config() if source.gguf is None else gguf.read_config(source.gguf)


def read_checkpoint(
    source: Source, ignore_config_fields: tuple[str, ...] = ()
) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture and the unread tensors of a source; those of Orbax have no such form."""
    config = read_config(source)
    arch = architecture(config, ignore_config_fields)  # refuse before touching any weight
    quantised = quantisation(config, ignore_config_fields)
    if source.orbax is not None:
        return arch, {}
    if source.gguf is not None:
        return arch, gguf.read_tensors(source.gguf, arch)
    tensors = read_safetensors(source.weight_files(), quantised.allowed if quantised else floats)
    if quantised is None:
        return arch, tensors
    tensors = quantised.dequantised(tensors)
    return arch, _without_zero_biases(arch, tensors) if quantised.zero_biases else tensors


def _without_zero_biases(arch: Architecture, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases that the model does not have and that are zero."""
    biases = hf.unwrapped(arch, {name: name for name in tensors if name.endswith(".bias")})
    extra = {name for own, name in biases.items() if own not in hf.expected(arch)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in extra or len(tensor.shape) != 1 or tensor[(slice(None),)].any()
    }
