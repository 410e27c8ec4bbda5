"""Candidate directions: differences of means (Arditi et al. 2024, eq. 1 and 2).

Letters: P post-instruction tokens, L layers, D residual width.
"""

from pathlib import Path

import numpy as np

from jax_refusal.checkpoints import arrays

# Below this share of the means' own length a difference is rounding, not a direction. (Block 0
# reads the embedding of template tokens that all prompts share: its difference is zero.)
ROUNDING = 1e-5

# Where a run leaves the direction that it chose.
IN_WORKDIR = "selection/direction.safetensors"


class DirectionError(ValueError):
    """A file that holds no direction, or one of another width; the message says which."""


def difference(
    harmful: np.ndarray,  # [P, L, D] mean activations
    harmless: np.ndarray,  # [P, L, D]
) -> np.ndarray:  # [P, L, D]
    """Mean on harmful minus mean on harmless instructions; exactly zero where that is rounding."""
    harmful, harmless = np.asarray(harmful, np.float64), np.asarray(harmless, np.float64)
    if harmful.shape != harmless.shape or harmful.ndim != 3:
        raise ValueError(
            f"Means [P, L, D] of one shape are needed; given are {harmful.shape} and "
            f"{harmless.shape}."
        )
    gap = harmful - harmless
    length = np.linalg.norm(gap, axis=-1, keepdims=True)
    scale = np.maximum(
        np.linalg.norm(harmful, axis=-1, keepdims=True),
        np.linalg.norm(harmless, axis=-1, keepdims=True),
    )
    return np.where(length <= ROUNDING * scale, 0.0, gap)


def read_direction(path: str | Path, tensor: str = "") -> np.ndarray:  # [D], or a grid [P, L, D]
    """A direction, or a grid of them, in float64: from a `.pt`, `.safetensors`, `.npy` or `.npz`
    file, or from the workdir of a run.

    tensor: which one, where the file holds several: the way to it through dicts and lists, such as
    "15" or "resid/15", and to a cell of a grid, such as "-1/15". No code of a file is run. A vector
    that lies as [1, D] is read as [D]. Raises DirectionError or TorchFileError.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / IN_WORKDIR
        if not path.is_file():
            raise DirectionError(
                f"{path.parents[1]} has no {IN_WORKDIR}: it is not the workdir of a run that got "
                "as far as its selection."
            )
    if path.suffix not in arrays.SUFFIXES:
        raise DirectionError(
            f"{path}: a direction is a file {', '.join(arrays.SUFFIXES)}, or a workdir."
        )
    if not path.is_file():
        raise DirectionError(f"{path}: there is no such file.")
    try:
        found = arrays.pick(arrays.read_arrays(path), tensor, path)
    except (arrays.ArrayError, OSError) as error:
        raise DirectionError(str(error)) from None
    direction = np.array(found, np.float64)
    if not np.isfinite(direction).all():
        raise DirectionError(f"{path} holds NaN or infinity; a finite direction is needed.")
    return direction.reshape(-1) if set(direction.shape[:-1]) == {1} else direction


def cosine(
    one: np.ndarray,  # [..., D]
    other: np.ndarray,  # [..., D], leading axes as numpy broadcasts them
) -> np.ndarray:  # [...], NaN where either is zero
    """Cosine of the angle between directions; DirectionError for those of another width."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape[-1:] != other.shape[-1:] or not one.ndim:
        raise DirectionError(
            f"The directions have shapes {one.shape} and {other.shape}: the last axis is the width "
            "of the residual stream, and it differs between models."
        )
    if min(one.ndim, other.ndim) > 1 and one.shape != other.shape:
        raise DirectionError(f"Grids of shapes {one.shape} and {other.shape} have other cells.")
    along = (one * other).sum(-1)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.divide(along, lengths, out=np.full_like(along, np.nan), where=lengths > 0)


def check_width(direction: np.ndarray, width: int, where: str) -> np.ndarray:  # [D]
    """The direction, if it is one vector of this width."""
    if direction.shape != (width,):
        advice = "A direction belongs to the model that it was found in."
        if direction.shape[-1:] == (width,):
            last = "/".join(str(n - 1) for n in direction.shape[:-1])
            advice = f"Say which of them is meant: the tensor {last!r} is the last."
        raise DirectionError(
            f"{where} holds shape {direction.shape}, and the model's residual stream takes "
            f"({width},). {advice}"
        )
    return direction
