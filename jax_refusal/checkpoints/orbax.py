"""The decoder's own checkpoint: leaves in an Orbax folder, reloaded straight onto a mesh.

A directory like a Hugging Face one, with `orbax/` in place of the safetensors files; every process
reads the parts of it that its devices hold, without transposing anything.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.checkpoints.folder import SourceError, read_json
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.files import atomic_write
from jax_refusal.messages import listed
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture


def save(model: Transformer, folder: Path) -> None:
    """Writes the leaves to a folder that does not exist yet, and beside it which files it holds."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), model.leaves())
    atomic_write(_listing(folder), json.dumps(_sizes(folder), indent=2).encode() + b"\n")


def _listing(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.files.json")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_files(folder: Path) -> None:
    """Raises ConversionError for a file that is lost or cut short.

    Orbax would find out in the middle of many reads, and leave the others behind unawaited.
    """
    try:
        listed = read_json(_listing(folder))
    except SourceError:
        raise ConversionError(
            f"{_listing(folder)} is missing or damaged, so {folder} cannot be checked. Convert the "
            "model again."
        ) from None
    there = _sizes(folder)
    lost = [name for name, size in listed.items() if there.get(name) != size]
    if lost:
        raise ConversionError(
            f"{folder} is damaged: {lost[:5]} missing or of another size. Convert the model again."
        )


def load(arch: Architecture, folder: Path, mesh: Mesh, dtype: np.dtype) -> Transformer:
    """The model on the mesh; ConversionError where the leaves are not those of the architecture."""
    import orbax.checkpoint as ocp

    _check_files(folder)
    target = {}
    for path, leaf in leaves(arch).items():
        placed = sharding.named(mesh, leaf.axes, leaf.shape)
        target[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored: Any = checkpointer.metadata(folder.absolute()).item_metadata
            there = {path: tuple(leaf.shape) for path, leaf in stored.tree.items()}
        except Exception as error:  # of any kind, where its files of JSON are not what they were
            raise ConversionError(
                f"{folder} is not a complete Orbax checkpoint. Convert the model again."
            ) from error
        expected = {path: leaf.shape for path, leaf in target.items()}
        if there != expected:
            differ = sorted(p for p in there | expected if there.get(p) != expected.get(p))
            pairs = (f"{p} is {there.get(p)}, not {expected.get(p)}" for p in differ)
            raise ConversionError(
                f"{folder} does not hold the leaves of its {arch.family} config: "
                f"{listed(pairs)}. Convert the model again."
            )
        try:
            arrays = checkpointer.restore(folder.absolute(), target)
        except Exception as error:  # Orbax raises plain exceptions, whose text is long
            raise ConversionError(f"{folder} is damaged. Convert the model again.") from error
    broken = sorted(path for path, array in arrays.items() if not bool(jnp.isfinite(array).all()))
    if broken:
        raise ConversionError(
            f"Leaves that are not finite (NaN or infinite): {listed(broken, ', ')}."
        )
    return Transformer(arch, arrays)
