"""The manifest of a workdir: what a run's results depend on, and the files that are complete.

It is read as a stranger's: whatever it holds, the answer is a manifest or one WorkdirError.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from jax_refusal.files import read_file

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest and of the files that it lists
# What of the identity is no field of the config: hashes.
HASHES = ("model", "adapter", "data", "template", "tokenizer")
# What reading a JSON value and taking it for what it should be may raise.
MISREAD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


class WorkdirError(ValueError):
    """The workdir belongs to another run, is in use or damaged, or cannot be written."""


def read(path: epath.Path) -> dict[str, Any]:
    """The manifest in a file; WorkdirError where it is none, or of another layout."""
    try:
        manifest = json.loads(read_file(path))
        json.dumps(manifest, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
        layout, problem = manifest["format"], _problem(manifest)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read ({error.strerror or error}).") from error
    except MISREAD as error:
        layout, problem = None, f"{type(error).__name__}: {error}"
    if type(layout) is int and layout != FORMAT:
        age = "an older" if layout < FORMAT else "a newer"
        raise WorkdirError(
            f"{path.parent} was written by {age} version of this program: its files have layout "
            f"{layout}, and this version reads and writes layout {FORMAT} alone. Choose "
            "another --workdir, or use that version."
        )
    if problem:
        raise WorkdirError(
            f"{path} is not a manifest of this program ({problem[:300]}). Put back a copy of it, "
            "or choose another --workdir: without it nobody knows what made the files beside it."
        )
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str:
    """What is wrong with a JSON value as a manifest; empty where nothing is."""
    if type(manifest["format"]) is not int:
        return '"format" is no number'
    identity, stages = manifest["identity"], manifest["stages"]
    if not isinstance(identity, dict) or not isinstance(stages, dict):
        return '"identity" and "stages" have to be objects'
    for name in HASHES:
        if not isinstance(identity.get(name, ""), str):
            return f"the hash {name!r} is {identity[name]!r}"
    for stage, entry in stages.items():
        for name, digest in entry["files"].items():
            if not is_inside(name):
                return f"stage {stage!r} lists a file that would lie outside: {name!r}"
            if not isinstance(digest, str):
                return f"the hash of {name!r} is {digest!r}"
        if type(entry["seconds"]) not in (int, float):
            return f"the seconds of stage {stage!r} are {entry['seconds']!r}"
    return ""


def is_inside(name: str) -> bool:
    """Whether the name of a file says that it lies in the workdir."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
