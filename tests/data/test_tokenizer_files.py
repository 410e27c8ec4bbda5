"""What a tokenizer's files say is read, or refused in one line that names the file."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.data.chat import Chat, ChatError, load_chat
from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf
from jax_refusal.data.tokenizer_files import quiet
from tests import tiny
from tests.test_gguf_tokenizer import TINY, write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with a config.json, and no weights."""
    tiny.write_tokenizer(tmp_path)
    change(tmp_path / "config.json", max_position_embeddings=64, eos_token_id=2, vocab_size=409)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | fields))


# Where a reply ends


@pytest.mark.parametrize("model_type", ["llama", ""])  # whose fields transformers checks, or none
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("stated", "stops"),
    [
        (5, (2, 5)),
        ([5, 7], (2, 5, 7)),
        ("5", (2, 5)),
        (["5", " 7 "], (2, 5, 7)),
        (5.0, (2, 5)),
        (408, (2, 408)),
        ([], (2,)),
        (None, (2,)),
    ],
)
def test_ends_of_a_reply(
    file: str, stated: Any, stops: tuple[int, ...], model_type: str, folder: Path
):
    change(folder / "config.json", model_type=model_type)
    change(folder / file, eos_token_id=stated)
    assert load_chat(str(folder)).stop_ids == stops


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "stated", ["<|im_end|>", "", "two", "²", 2.5, True, -1, 409, [2, [3]], [None], {"id": 2}, 1e400]
)
def test_what_is_no_token(file: str, stated: Any, folder: Path):
    change(folder / "config.json", model_type="llama")
    change(folder / file, eos_token_id=stated)
    with pytest.raises(SourceError) as error:
        load_chat(str(folder))
    for words in (file, "eos_token_id is", "a number from 0 to 408"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_of_the_model_beyond_the_tokenizer_are_tokens(folder: Path):
    change(folder / "config.json", vocab_size=512, eos_token_id=500)
    assert load_chat(str(folder)).stop_ids == (2, 500)


# How long a prompt may be


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 64.0}, 64),
        ({"max_position_embeddings": None}, 0),
        ({"max_position_embeddings": 0}, 0),
    ],
)
def test_context(fields: dict, context: int, folder: Path):
    change(folder / "config.json", **fields)
    assert load_chat(str(folder)).context == context


def test_the_context_of_a_multimodal_models_text(folder: Path):
    text = {"max_position_embeddings": 48, "vocab_size": 409}
    (folder / "config.json").write_text(json.dumps({"text_config": text}))
    assert load_chat(str(folder)).context == 48


@pytest.mark.parametrize("stated", ["64", -1, True, [64], 1e300, float("nan")])
def test_what_is_no_context(stated: Any, folder: Path):
    change(folder / "config.json", max_position_embeddings=stated)
    with pytest.raises(SourceError, match=r"max_position_embeddings is .* a number of tokens"):
        load_chat(str(folder))


# Damage

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
LEGACY = ("special_tokens_map.json", "added_tokens.json")
CONTENTS = {
    "cut short": b'{"eos_token": "<|im_',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "another program": b"\x00\x01\x02",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_file_is_named(file: str, name: str, folder: Path):
    (folder / file).write_bytes(CONTENTS[name])
    refused(folder, file)


@pytest.mark.parametrize("file", LEGACY)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_file_of_an_older_form_is_named(file: str, name: str, folder: Path):
    """transformers reads them where tokenizer_config.json lists no added tokens."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / file).write_bytes(CONTENTS[name])
    refused(folder, file)


def refused(folder: Path, words: str) -> None:
    with pytest.raises((SourceError, ChatError)) as error:
        load_chat(str(folder))
    assert words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_folder_without_a_tokenizer(folder: Path):
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no usable tokenizer: there is none of tokenizer.json")


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_file_that_is_no_text(file: str, folder: Path):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"{{ \xff }}")
    refused(folder, file)


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": 3},
        {"chat_template": ["text"]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [{"name": 3, "template": "x"}]},
        {"chat_template": {"default": 3}},
        {"chat_template": "{% for"},
        {"eos_token": 3},
        {"eos_token": {"content": 3}},
        {"added_tokens_decoder": {"one": {"content": "x"}}},
        {"added_tokens_decoder": {"5": 3}},
        {"added_tokens_decoder": [3]},
        {"extra_special_tokens": 3},
        {"auto_map": 3},
        {"tokenizer_class": 3},
        {"init_inputs": 3},
        {"model_max_length": "long"},
    ],
)
def test_settings_of_another_type(fields: dict, folder: Path):
    change(folder / "tokenizer_config.json", **fields)
    refused(folder, "")


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "c"]]}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}},
        {"added_tokens": [{"id": 3}]},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
    ],
)
def test_a_tokenizer_of_other_parts(fields: dict, folder: Path):
    change(folder / "tokenizer.json", **fields)
    refused(folder, "")


def test_a_tokenizer_that_does_not_tell_instructions_apart(folder: Path):
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    change(folder / "tokenizer.json", model=model)
    refused(folder, "The tokenizer makes the same tokens of different instructions")


def test_gguf_metadata_of_another_kind(tmp_path: Path):
    for i, change in enumerate(
        [
            {"tokens": "abc"},
            {"tokens": [1, 2, 3]},
            {"merges": "a b"},
            {"merges": [3]},
            {"token_type": ["1", "1", "1"]},
            {"token_type": 1},
            {"model": 3},
            {"pre": ["gpt-2"]},
            {"bos_token_id": "1"},
            {"eos_token_id": [1]},
            {"add_bos_token": "false"},
            {"model": "llama", "scores": [float("nan"), 0.0, 0.0]},
            {"model": "llama", "scores": [0.0] * 3, "tokens": ["a" * 9999, "b" * 9999, "c"]},
        ]
    ):
        path = write_gguf(tmp_path / f"{i}.gguf", **(TINY | change))
        with pytest.raises(ValueError, match=r"Hugging Face directory|cannot read its header"):
            tokenizer_from_gguf(path)
        with pytest.raises(SourceError, match=r"Hugging Face directory|cannot read its header"):
            load_chat(str(path))


# Prompts of megabytes


def test_a_prompt_of_megabytes_is_refused_from_its_start(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[int] = []
    inner = Chat._encoded

    def counted(self: Chat, texts: list[str]) -> list[list[int]]:
        encoded.append(sum(map(len, texts)))
        return inner(self, texts)

    monkeypatch.setattr(Chat, "_encoded", counted)
    for text in ("word " * 1_000_000, "日本" * 1_000_000, "\0" * 5_000_000):
        with pytest.raises(ChatError, match=r"Instruction 1 .* than 512 tokens; .* context is 512"):
            chat.encode(["fine", text])
    assert sum(encoded) < 100_000


def test_a_long_prompt_of_long_tokens_is_no_long_prompt(folder: Path):
    """64 tokens may be 5000 characters."""
    added = [{"id": 409, "content": "=" * 200, "special": False, "single_word": False}]
    added[0] |= {"lstrip": False, "rstrip": False, "normalized": False}
    written = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", added_tokens=written["added_tokens"] + added)
    (prompt,) = load_chat(str(folder)).encode(["=" * 5000])
    assert len(prompt) <= 64 and prompt.count(409) == 25


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character(text: str, chat: Chat):
    with pytest.raises(ChatError, match=r"Instruction 0 .* half of a character"):
        chat.encode([text])


@pytest.mark.parametrize("system", [3, ["Be brief."], b"Be brief."])
def test_a_system_text_is_a_text(system: Any, folder: Path):
    with pytest.raises(ChatError, match=r"model\.system=.*: a text is needed"):
        load_chat(str(folder), system=system)


# What is printed


def noisy(folder: Path) -> Path:
    """A config that transformers has much to say about."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 1, "unknown": 2}
    change(folder / "config.json", model_type="llama", rope_scaling=scaling, hidden_size=32)
    change(folder / "config.json", max_position_embeddings=512)
    change(folder / "tokenizer_config.json", clean_up_tokenization_spaces=True, model_max_length=8)
    return folder


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What transformers says."""
    printed = io.StringIO()
    monkeypatch.setattr(
        logging.getLogger("transformers"), "handlers", [logging.StreamHandler(printed)]
    )
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    return printed


def use(folder: Path) -> None:
    chat = load_chat(str(folder))
    chat.decode(chat.encode(["a " * 60])[0])


def test_nothing_is_printed(folder: Path, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    use(noisy(folder))
    assert printed.getvalue() == ""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    use(folder)
    assert printed.getvalue() != ""  # there was something to say


def test_what_concerns_the_user_is_printed(printed: io.StringIO):
    with quiet():
        for name, text in (
            ("transformers.tokenization_utils_tokenizers", "an incorrect regex pattern"),
            ("transformers.modeling_rope_utils", "Unrecognized keys in `rope_parameters`"),
            ("transformers.configuration_utils", "You are using a model of type a"),
        ):
            logging.getLogger(name).warning(text)
        logging.getLogger("transformers.configuration_utils").error("broken")
    said = printed.getvalue()
    assert "an incorrect regex pattern" in said and "broken" in said
    assert "Unrecognized" not in said and "of type" not in said
