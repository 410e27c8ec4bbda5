"""Which safetensors files hold a model's weights: those that Hugging Face would take.

That is one file before several, and of several those that the index names. An index and files that
do not belong together are an error: which weights were meant is not known.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jax_refusal.checkpoints.folder import SourceError, inside, read_json
from jax_refusal.checkpoints.tensors import names_in
from jax_refusal.messages import shortened

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 2**25  # some 250,000 tensors
# Parts of tensors, as PyTorch's distributed checkpoints have them: taken before any other file.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all of them present.

    Raises SourceError for a folder without such, and for an index that its files do not bear out;
    ConversionError for a file that is damaged.
    """
    parts = sorted(p.name for p in folder.iterdir() if DISTRIBUTED.fullmatch(p.name))
    if parts:
        raise SourceError(
            f"{folder} holds a distributed checkpoint of PyTorch ({shortened(parts, 2)}), which is "
            "not read. Save the model with save_pretrained, or take those files away."
        )
    if (whole := inside(folder, WHOLE)).is_file():
        return [whole]
    if (index := inside(folder, INDEX)).is_file():
        return _indexed(folder, index)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    hint = f" Its {shortened(pickles)} are pickles, which are never opened: convert them."
    raise SourceError(f"{folder} has no {WHOLE} and no index of shards.{hint * bool(pickles)}")


def _indexed(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, each with the tensors that the index says are in it."""
    weight_map = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(
            f"{index} has no weight_map of tensors to files, which an index is. Fetch it again."
        )
    wrong = [f"{n}: {f!r}"[:200] for n, f in weight_map.items() if not _is_file_name(f)]
    if wrong:
        raise SourceError(
            f"{index} names no .safetensors file for {len(wrong)} tensors: {shortened(wrong)}. "
            "Fetch it again."
        )
    files = {name: inside(folder, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} of {len(files)} shards that its index "
            f"names: {shortened(missing)}. Fetch the checkpoint again."
        )
    _check_together(index, weight_map, files)
    return list(files.values())


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors")


def _check_together(index: Path, weight_map: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Raises SourceError where a tensor is not, or not alone, in the file that the index says."""
    held: dict[str, list[str]] = {}
    for file, path in files.items():
        for name in names_in(path):
            held.setdefault(name, []).append(file)
    problems = [
        f"{name} is in {held.get(name) or 'none'}, not in {file}"
        for name, file in weight_map.items()
        if file not in held.get(name, [])
    ]
    problems += [f"{name} is in {found}" for name, found in held.items() if len(found) > 1]
    if problems:
        raise SourceError(
            f"{index} and its files do not belong together, as when they are of two revisions: "
            f"{shortened(problems)}. Fetch the checkpoint again."
        )
