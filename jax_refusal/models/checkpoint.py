"""The decoder's own checkpoint: leaves in an Orbax folder, reloaded straight onto a mesh.

A directory like a Hugging Face one, with `orbax/` in place of the safetensors files; every process
reads the parts of it that its devices hold, without transposing anything.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.models import transformer
from jax_refusal.models.convert import ConversionError
from jax_refusal.models.families import Architecture
from jax_refusal.models.transformer import Transformer


def save(model: Transformer, folder: Path) -> None:
    """Writes the leaves to a folder that does not exist yet."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), model.leaves())


def load(arch: Architecture, folder: Path, mesh: Mesh, dtype: np.dtype) -> Transformer:
    """The model on the mesh; ConversionError where the leaves are not those of the architecture."""
    import orbax.checkpoint as ocp

    target = {}
    for path, logical in transformer.axes(arch).items():
        shape = transformer.shape(arch, logical)
        placed = sharding.named(mesh, logical, shape)
        target[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    with ocp.StandardCheckpointer() as checkpointer:
        stored: Any = checkpointer.metadata(folder.absolute()).item_metadata
        if stored is None:
            raise ConversionError(f"{folder} is not a complete Orbax checkpoint. Make it again.")
        there = {path: tuple(leaf.shape) for path, leaf in stored.tree.items()}
        expected = {path: leaf.shape for path, leaf in target.items()}
        if there != expected:
            differ = sorted(p for p in there | expected if there.get(p) != expected.get(p))
            shown = [f"{p} is {there.get(p)}, not {expected.get(p)}" for p in differ[:20]]
            raise ConversionError(
                f"{folder} does not hold the leaves of its {arch.family} config: "
                f"{'; '.join(shown)}. Convert the model again."
            )
        try:
            leaves = checkpointer.restore(folder.absolute(), target)
        except Exception as error:  # Orbax raises plain exceptions, whose text is long
            raise ConversionError(f"{folder} is damaged. Convert the model again.") from error
    broken = sorted(path for path, leaf in leaves.items() if not bool(jnp.isfinite(leaf).all()))
    if broken:
        raise ConversionError(f"Leaves that are not finite (NaN or infinite): {broken}.")
    return Transformer(arch, leaves)
