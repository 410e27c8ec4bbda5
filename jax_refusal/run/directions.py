"""Directions of runs and of files, side by side."""

from pathlib import Path

import numpy as np

from jax_refusal.run.workdir import MANIFEST, Workdir
from jax_refusal.study.directions import DirectionError, cosine, read_direction


def compare(one: str | Path, other: str | Path, tensor: str = "") -> list[str]:
    """What can be said of two stored directions or grids (see `read_direction`), as lines.

    tensor: which one of a file's; a workdir has one direction.
    """
    found = {
        path: read_direction(path, "" if Path(path).expanduser().is_dir() else tensor)
        for path in (one, other)
    }
    lines = [
        f"{path}: " + (f"norm {np.linalg.norm(x):.4g}" if x.ndim == 1 else f"grid {x.shape}")
        for path, x in found.items()
    ]
    similar = cosine(*(found[path] for path in (one, other)))
    if np.isnan(similar).all():
        raise DirectionError(f"{one} or {other} is zero everywhere: there is no angle.")
    models = {model_of(path) for path in (one, other)}
    if len(models) == 2 and None not in models:
        lines.append("these are runs of different weights, whose streams need not have like axes")
    if not similar.ndim:
        return [*lines, f"cosine {similar:.6f}"]
    if any(x.ndim == 1 for x in found.values()):
        cell = np.unravel_index(np.nanargmax(np.abs(similar)), similar.shape)
        where = ", ".join(str(int(i)) for i in cell)
        if len(cell) == 2:  # a grid of candidates; positions are counted from the end
            where = f"position {cell[0] - similar.shape[0]}, layer {cell[1]}"
        return [*lines, f"nearest cell ({where}): cosine {similar[cell]:.6f}"]
    least, median, most = np.nanquantile(similar, (0, 0.5, 1))
    return [*lines, f"cosine of equal cells: {least:.6f} to {most:.6f}, median {median:.6f}"]


def model_of(path: str | Path) -> str | None:
    """The fingerprint of a workdir's model; None for a file, which does not say."""
    path = Path(path).expanduser()
    if not (path / MANIFEST).is_file():
        return None
    return Workdir.existing(path).manifest["identity"].get("model")
