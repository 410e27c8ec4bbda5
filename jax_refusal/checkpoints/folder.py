"""The files of a checkpoint's folder: found in it and nowhere else, and JSON read with bounds.

Whoever made a checkpoint chose what its links and its index say, so neither leads out of its folder
here. It lies on the lowest floor: everything that reads a file of a checkpoint finds it through
`inside`.
"""

import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from jax_refusal.messages import shortened

JSON_BYTES = 2**22  # more than any config has; a list of tensors may be longer
DEEPEST = 32  # objects and lists inside each other
# A file of the hub's cache, from the folder of all repositories on: a repository keeps its files
# once for all its revisions, and newer clients once for all repositories.
HUB_BLOB = re.compile(r"(?P<repository>models--[^/]+)/blobs/[^/]+|blobs/[0-9a-f]{2}/[0-9a-f]{64}")
# Folders of a checkpoint whose files are read by pattern.
FOLDERS = ("orbax", "additional_chat_templates")


class SourceError(ValueError):
    """A model source that cannot be found or read; the message says what would be."""


def inside(folder: Path, name: str) -> Path:
    """Where a file of a folder lies, if it is there; SourceError for one that lies elsewhere.

    The folder may itself be a link: the user named it. A link in it may lead to another place in
    it, and in a snapshot of the hub's cache to what the cache keeps of that repository.
    """
    given = PurePosixPath(name)
    if not name or "\0" in name or given.is_absolute() or ".." in given.parts:
        raise SourceError(
            f"{folder} names a file {name!r}, which is not below this folder. Only files of the "
            "folder are read: fetch the checkpoint again, or mend the name."
        )
    path = folder / name
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise SourceError(f"{path} cannot be followed ({error}).") from None
    if not (real.is_relative_to(root) or _in_the_hubs_cache(root, real)):
        raise SourceError(
            f"{path} is or lies behind a link to {real}, outside of {folder}. Only files of the "
            "folder are read: copy the file into it, or give the folder where it lies."
        )
    return path


def _in_the_hubs_cache(root: Path, real: Path) -> bool:
    """Whether a file belongs to the repository of the hub's cache whose snapshot a folder is."""
    snapshots = next((p for p in (root, *root.parents) if p.parent.name == "snapshots"), None)
    if snapshots is None:
        return False
    repository = snapshots.parent.parent
    if not real.is_relative_to(repository.parent):
        return False
    found = HUB_BLOB.fullmatch(real.relative_to(repository.parent).as_posix())
    return found is not None and found["repository"] in (None, repository.name)


def check_links(folder: Path) -> None:
    """Raises SourceError for a link to a file outside of the folder: programs that are handed the
    folder, such as a tokenizer's, would follow it."""
    try:
        found = [path for path in folder.iterdir() if path.name in FOLDERS or not path.is_dir()]
        for name in FOLDERS:
            found += (folder / name).rglob("*") if (folder / name).is_dir() else ()
        for path in sorted(path for path in found if path.is_symlink()):
            inside(folder, path.relative_to(folder).as_posix())
    except OSError as error:
        raise SourceError(f"{folder} cannot be read ({error}).") from None


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds; SourceError for anything else, or more than `most` bytes.

    A name that stands twice in an object is an error: readers differ in which one they take.
    """
    try:
        if (size := path.stat().st_size) > most:
            raise SourceError(f"{path} has {size} bytes; at most {most} are read.")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}).") from None


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """`read_json` of what lies in a part of a file."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise SourceError(f"{where} nests deeper than {DEEPEST} levels.") from None
    except ValueError as error:  # also numbers of thousands of digits, and what is not UTF-8
        raise SourceError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where} holds a {type(value).__name__} where an object is expected.")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        nested = (x for x in level if isinstance(x, dict | list))
        level = [y for x in nested for y in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return value
    raise SourceError(f"{where} nests deeper than {DEEPEST} levels.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = [name[:200] for name, count in counts.items() if count > 1]
        raise ValueError(f"one object says {shortened(twice)} twice")
    return found
