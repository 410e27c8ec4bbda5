"""Chat templates: what follows an instruction is found, and what cannot work is refused."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.data.chat import PROBES, Chat, ChatError, common_prefix, load_chat
from jax_refusal.runtime.batching import Prompts
from tests import tiny

LLAMA2 = "{{ '[INST] ' + messages[0]['content'] + ' [/INST] ' }}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>", "model")


def with_template(template: str, *added: str, **fields) -> Chat:
    """The tiny tokenizer under another template, with special tokens added."""
    tokenizer = tiny.write_tokenizer(fields.pop("path"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.chat_template = template
    return Chat(tokenizer, (2,), **fields)


def rewrite(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with a config.json, and no weights."""
    tiny.write_tokenizer(tmp_path)
    config = {"max_position_embeddings": 64, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_tiny_template(chat: Chat):
    newline = chat.tokenizer.encode("\n")[0]
    assistant = chat.tokenizer.encode("assistant")[0]
    assert chat.post_instruction == (2, newline, 1, assistant, newline)
    assert chat.position_labels == ["<|im_end|>", r"\n", "<|im_start|>", "assistant", r"\n"]
    assert (chat.stop_ids, chat.context) == ((2,), 512)


def test_the_date_in_a_prompt_is_always_the_same(tmp_path):
    own = "{% if not date_string is defined %}{{ raise_exception('no date') }}{% endif %}"
    chat = with_template(own + "{{ date_string }}" + LLAMA2, path=tmp_path)
    assert chat.render("Hi") == "26 Jul 2024[INST] Hi [/INST] "


def test_a_template_that_asks_the_clock_is_told_the_same_date(tmp_path):
    """Inside a macro too, as gpt-oss's does; and nothing else of the template changes."""
    ask = "{% macro today() %}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% endmacro %}{{ today() }}"
    chat = with_template(ask + LLAMA2, path=tmp_path)
    assert chat.render("Hi") == "2024-07-26 00:00:00[INST] Hi [/INST] "
    assert chat.template_hash == dataclasses.replace(chat).template_hash
    blank = with_template("\n{{ strftime_now('%d %B') }}\n" + LLAMA2, path=tmp_path)
    assert blank.render("Hi") == "\n26 July\n[INST] Hi [/INST] "


def test_llama_2_template(tmp_path):
    chat = with_template(LLAMA2, path=tmp_path)
    post = list(chat.post_instruction)
    assert chat.tokenizer.decode(post) == " [/INST] "
    assert post == chat.tokenizer.encode(" [/INST] ")
    assert "".join(chat.position_labels) == " [/INST] "


def test_gemma_template(tmp_path):
    chat = with_template(GEMMA, *GEMMA_TOKENS, path=tmp_path)
    expected = ["<end_of_turn>", r"\n", "<start_of_turn>", "model", r"\n"]
    assert chat.position_labels == expected
    assert chat.render(" Hi ") == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"  # as the template trims
    )


@pytest.mark.parametrize("template", [LLAMA2, GEMMA, tiny.CHAT_TEMPLATE])
@pytest.mark.parametrize("instruction", [*PROBES, "Ends in space ", "日本語", "tokens\n\n", "a]"])
def test_every_prompt_ends_in_the_post_instruction_tokens(tmp_path, template, instruction):
    chat = with_template(template, *GEMMA_TOKENS, path=tmp_path)
    prompt = chat.encode([instruction])[0]
    assert tuple(prompt[-len(chat.post_instruction) :]) == chat.post_instruction


def test_nothing_after_the_instruction(tmp_path):
    chat = with_template("{{ 'User: ' + messages[0]['content'] }}", path=tmp_path)
    with pytest.raises(ChatError, match=r"no token of its own after the instruction.*end-of-instr"):
        _ = chat.post_instruction


def test_a_template_that_raises(tmp_path):
    chat = with_template(GEMMA, *GEMMA_TOKENS, path=tmp_path, system="Be brief.")
    with pytest.raises(ChatError, match=r"failed on 'Hi'.*System role not supported"):
        chat.encode(["Hi"])
    chat = with_template("{{ messages[0]['content'] + 1 }}", path=tmp_path)
    with pytest.raises(ChatError, match="failed on 'Hi'"):
        chat.encode(["Hi"])


def test_system_prompt_on_and_off(chat: Chat):
    assert chat.render("Hi").startswith(f"<|im_start|>system\n{tiny.SYSTEM}<|im_end|>")
    own = dataclasses.replace(chat, system="Be brief.")
    assert own.render("Hi").startswith("<|im_start|>system\nBe brief.<|im_end|>")
    empty = dataclasses.replace(chat, system="")
    assert empty.render("Hi").startswith("<|im_start|>system\n<|im_end|>")
    assert own.post_instruction == chat.post_instruction
    assert len({c.template_hash for c in (chat, own, empty)}) == 3
    assert own.tokenizer_hash == chat.tokenizer_hash


def test_many_prompts_are_those_that_few_are(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    texts = [f"Count to {i}" for i in range(7)]
    expected = [ids for text in texts for ids in chat.encode([text])]
    monkeypatch.setattr("jax_refusal.data.chat.AT_ONCE", 3)
    assert chat.encode(texts) == expected


def test_no_token_is_added_to_what_the_template_says(chat: Chat):
    prompt = chat.encode(["Hi"])[0]
    assert chat.tokenizer.decode(prompt) == chat.render("Hi")


def test_decode_leaves_special_tokens_out(chat: Chat):
    ids = chat.tokenizer.encode("Sure! Eat some fruit.")
    assert chat.decode([1, *ids, 2]) == "Sure! Eat some fruit."


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ([], "No instructions"),
        ("one text", "list of instructions is needed and one string"),
        (["fine", ""], "Instruction 1 is ''"),
        (["fine", " \n"], "Instruction 1 is"),
        (["fine", None], "Instruction 1 is None: a text"),
        ([3], "Instruction 0 is 3"),
        ([" " * 1000], r"^Instruction 0 is ' {59}: a text"),
    ],
)
def test_instructions_that_are_none(chat: Chat, instructions, words):
    with pytest.raises(ChatError, match=words):
        chat.encode(instructions)


def test_a_prompt_longer_than_the_context(chat: Chat):
    with pytest.raises(ChatError, match=r"Instruction 1 \('a a .* of \d+ tokens; .* is 512"):
        chat.encode(["fine", "a " * 600])


def test_stop_ids_are_what_any_of_the_files_says(folder):
    assert load_chat(str(folder)).stop_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    chat = load_chat(str(folder))
    assert (chat.stop_ids, chat.context) == ((0, 2, 5), 64)


def test_a_special_token_that_closes_the_turn_stops_a_reply(folder):
    rewrite(folder / "config.json", eos_token_id=0)
    rewrite(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    chat = load_chat(str(folder))
    assert chat.tokenizer.eos_token_id == 0
    assert chat.stop_ids == (0, 2)


def test_no_chat_template(folder):
    rewrite(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ChatError, match=r"no chat template.*instruct or chat variant"):
        load_chat(str(folder))


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_a_source_error(folder, content):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match="no usable tokenizer"):
        load_chat(str(folder))


class Merging:
    """A tokenizer of characters, in which "~>" is one token."""

    chat_template = "{{ messages[0]['content'] }}>"
    all_special_ids = ()
    special_tokens_map: Mapping[str, str] = MappingProxyType({})

    def __call__(self, texts, **_):
        return {"input_ids": [[*map(ord, t.replace("~>", "\x01"))] for t in texts]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids)).replace("\x01", "~>")


def test_an_instruction_that_runs_into_the_template_is_refused():
    chat = Chat(Merging(), ())
    assert chat.position_labels == [">"]
    with pytest.raises(ChatError, match="'wave~' does not end in the template's tokens"):
        Prompts.encoded(chat, ["fine", "wave~"])


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[1, 2]]) == 2
