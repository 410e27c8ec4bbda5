"""A model source's tokenizer, and what its files say of where a reply and a prompt end.

Whatever is damaged or of another type is one SourceError that names the file. Nothing of a
checkpoint runs.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_refusal.checkpoints.gguf_header import read_header
from jax_refusal.checkpoints.sources import Source, SourceError, read_json
from jax_refusal.data import qwen_tokenizer

OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
EOS = "eos_token_id"


@dataclasses.dataclass(frozen=True)
class Read:
    """What a source has. stop_ids: the ends of a reply that any file states. context: tokens of the
    longest prompt, 0 when no file says."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    context: int


def read(source: Source) -> Read:
    """Raises SourceError."""
    if source.gguf is not None:
        return _read_gguf(source)
    assert source.directory is not None
    config = _object(source.file("config.json"))
    if not isinstance(config.get("model_type", ""), str):
        raise SourceError(f"{source.name}: the model_type is {config['model_type']!r:.80}.")
    generation = _object(source.directory / "generation_config.json")
    _check_settings(source.directory)
    with _errors_of(source), quiet():
        tokenizer = _from_directory(source, config)
        _ = tokenizer.all_special_ids  # recurses where the unknown token is itself unknown
    text = config.get("text_config")  # of a multimodal model's config
    text = text if isinstance(text, dict) else {}
    rows = config.get("vocab_size", text.get("vocab_size"))
    count = max(len(tokenizer), rows if isinstance(rows, int) else 0)
    stops = {
        *token_ids(tokenizer.eos_token_id, "the tokenizer's eos_token", count),
        *token_ids(config.get(EOS), f"{source.directory / 'config.json'}: {EOS}", count),
        *token_ids(
            generation.get(EOS), f"{source.directory / 'generation_config.json'}: {EOS}", count
        ),
    }
    field = "max_position_embeddings"
    context = _context(config.get(field, text.get(field)), f"{source.name}: {field}")
    return Read(tokenizer, tuple(sorted(stops)), context)


def token_ids(stated: Any, place: str, count: int) -> list[int]:
    """The tokens that a file states: none, one, or a list; SourceError for what is no token.

    A number that is written as text ("2") or as 2.0 can mean one thing only.
    """
    if stated is None:
        return []
    found = []
    for value in stated if isinstance(stated, list) else [stated]:
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise SourceError(
                f"{place} is {str(stated)[:80]!r}: a token, or a list of tokens, is needed, each a "
                f"number from 0 to {count - 1}. Mend it, or take it out."
            )
        found.append(number)
    return found


def _context(stated: Any, place: str) -> int:
    if stated is None:
        return 0
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 <= stated < 2**53:
        raise SourceError(f"{place} is {str(stated)[:80]!r}: a number of tokens is needed.")
    return int(stated)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (RecursionError, OSError) as error:
        raise SourceError(f"{path} cannot be read: {_words(error)}.") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path} is not a JSON object, and one is needed.")
    return found


def _check_settings(folder: Path) -> None:
    """What transformers would take as it is, to fail on later."""
    path = folder / "tokenizer_config.json"
    settings = _object(path)
    longest = settings.get("model_max_length", 0)
    if isinstance(longest, bool) or not isinstance(longest, int | float | None):
        raise SourceError(f"{path}: model_max_length is {longest!r:.80}: a number is needed.")
    own = settings.get("chat_template")
    several = own.items() if isinstance(own, dict) else []
    if isinstance(own, list):
        rows = (row if isinstance(row, dict) else {} for row in own)
        several = [(row.get("name"), row.get("template")) for row in rows]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in several):
        raise SourceError(
            f'{path}: a list of chat templates has the form [{{"name": "default", "template": ...}}'
            f", ...], all of them texts, and it is {str(own)[:80]!r}."
        )
    if own is not None and not isinstance(own, str | list | dict):
        raise SourceError(f"{path}: chat_template is {str(own)[:80]!r}: a text is needed.")


def _read_gguf(source: Source) -> Read:
    from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf

    assert source.gguf is not None
    with _errors_of(source), quiet():
        tokenizer = tokenizer_from_gguf(source.gguf)
        metadata = read_header(source.gguf).metadata
    field = f"{metadata.get('general.architecture')}.context_length"
    eos: Any = tokenizer.eos_token_id
    context = _context(metadata.get(field), f"{source.name}: {field}")
    return Read(tokenizer, () if eos is None else (eos,), context)


def _from_directory(source: Source, config: Mapping[str, Any]) -> Any:
    assert source.directory is not None
    # Qwen-1's own tokenizer is a program that its checkpoints ship.
    if (source.directory / qwen_tokenizer.FILE).is_file():
        return qwen_tokenizer.tokenizer_from_tiktoken(source.directory)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoTokenizer

    given = {"trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(source.directory, **given)
    except StrictDataclassError:
        # A field of the config of another type, which is not the tokenizer's: what matters of
        # the config is read, and judged, by this library.
        plain = AutoConfig.for_model(config["model_type"])
        plain.tokenizer_class = config.get("tokenizer_class")
        return AutoTokenizer.from_pretrained(source.directory, config=plain, **given)


@contextlib.contextmanager
def _errors_of(source: Source) -> Iterator[None]:
    """Whatever goes wrong while a tokenizer is made is one SourceError."""
    try:
        yield
    except SourceError:
        raise
    except BaseException as error:
        # The tokenizers library raises plain Exception for a broken file, or panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise SourceError(
                f"{source.name} has no tokenizer but a program of its own, which is never run. A "
                f"tokenizer.json is needed, or for Qwen-1 its {qwen_tokenizer.FILE}."
            ) from None
        damage = _damage(source.directory) if source.directory else ""
        advice = " Fetch tokenizer_config.json and the files beside it again." * bool(
            source.directory
        )
        raise SourceError(
            f"{source.name} has no usable tokenizer: {damage or _words(error)}.{advice}"
        ) from error


def _damage(folder: Path) -> str:
    """The first file that a tokenizer cannot be read from, and why; empty where all seem well."""
    if not any((folder / name).is_file() for name in (*VOCABULARIES, qwen_tokenizer.FILE)):
        return f"there is none of {', '.join(VOCABULARIES)}"
    for path in (folder / name for name in (*OBJECTS, "tokenizer.json")):
        try:
            _object(path)
        except SourceError as error:
            return str(error).rstrip(".")
    for path in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        try:
            _ = path.is_file() and path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({_words(error)})"
    return ""


def _words(error: BaseException) -> str:
    """An error of another library in a line; with its kind where its text alone says little."""
    text = " ".join(str(error).split()).rstrip(".")[:300]
    plain = isinstance(error, ValueError | OSError) and text
    return text if plain else f"{type(error).__name__} {text}".rstrip()


# Of what transformers says while it loads and uses a tokenizer, the user does not need: that there
# is no PyTorch; what it thinks of a config that this library reads by itself; which of its classes
# it takes; that it does not do what it should not do.
OF_A_CONFIG = ("configuration", "rope")
NOTHING_NEW = ("is ByteLevel; loading", "Ignoring clean_up_tokenization_spaces")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' words to what concerns the user, unless TRANSFORMERS_VERBOSITY is set."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    handlers = logging.getLogger(transformers.__name__).handlers
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        handlers = []
    for handler in handlers:
        handler.addFilter(_concerns_the_user)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_concerns_the_user)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        return True
    text = record.getMessage()
    return not any(part in record.name for part in OF_A_CONFIG) and not any(
        part in text for part in NOTHING_NEW
    )
