"""The paper's templates to the token, and the place where a thinking model's answer starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.data import templates
from jax_refusal.data.chat import PROBES, Chat, ChatError, load_chat
from jax_refusal.data.templates import TEMPLATES, find
from tests import runs, tiny

SPECIAL = sorted({t for x in TEMPLATES.values() for t in (x.bos, *x.special) if t})
BEGIN, HEAD, END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"
LLAMA3 = f"{HEAD}user{END}\n\nHi<|eot_id|>{HEAD}assistant{END}\n\n"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

# A prompt's text, and its post-instruction tokens where each special token, word and run of
# newlines is one (as in the families' own vocabularies).
PLAIN = {
    "paper/llama-3@published": BEGIN + '"' + BEGIN + LLAMA3,
    "paper/llama-3@fixed": BEGIN + LLAMA3,
    "paper/llama-2": "<s>[INST] Hi [/INST] ",
    "paper/qwen": CHATML,
    "paper/yi": CHATML,
    "paper/gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
}
WITH_SYSTEM = {
    "paper/llama-3@fixed": f"{BEGIN}{HEAD}system{END}\n\nBe brief.<|eot_id|>{LLAMA3}",
    "paper/llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] ",
    "paper/qwen": "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML,
    "paper/yi": "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML,
}
ENDINGS = {
    "paper/llama-3@published": ["<|eot_id|>", HEAD, "assistant", END, r"\n\n"],
    "paper/llama-3@fixed": ["<|eot_id|>", HEAD, "assistant", END, r"\n\n"],
    "paper/qwen": ["<|im_end|>", r"\n", "<|im_start|>", "assistant", r"\n"],
    "paper/yi": ["<|im_end|>", r"\n", "<|im_start|>", "assistant", r"\n"],
    "paper/gemma": ["<end_of_turn>", r"\n", "<start_of_turn>", "model", r"\n"],
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """The tiny tokenizer with the special tokens of every family."""
    tokenizer = tiny.write_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, "model", "\n\n"]})
    return tokenizer


def test_these_are_the_names():
    assert set(TEMPLATES) == set(PLAIN)
    assert all(find(name).name == name for name in PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_prompts(name: str, tokenizer: Any):
    chat = Chat(tokenizer, (2,), template=find(name))
    (ids,) = chat.encode(["Hi"])
    assert chat.render("Hi") == PLAIN[name]
    assert tokenizer.decode(ids) == PLAIN[name]
    special = [t for t in tokenizer.convert_ids_to_tokens(ids) if t in SPECIAL]
    assert "".join(special) == "".join(part for part in _pieces(PLAIN[name]) if part in SPECIAL)


def _pieces(text: str) -> list[str]:
    """The text cut at its special tokens."""
    pieces = [text]
    for token in SPECIAL:
        cut = []
        for piece in pieces:
            parts = [piece] if piece in SPECIAL else piece.split(token)
            for i, part in enumerate(parts):
                cut += [token] * (i > 0) + [part] * bool(part)
        pieces = cut
    return pieces


@pytest.mark.parametrize("name", PLAIN)
def test_system_turns(name: str, tokenizer: Any):
    chat = Chat(tokenizer, (2,), template=find(name), system="Be brief.")
    if name in WITH_SYSTEM:
        assert chat.render("Hi") == WITH_SYSTEM[name]
        assert tokenizer.decode(chat.encode(["Hi"])[0]) == WITH_SYSTEM[name]
        plain = dataclasses.replace(chat, system=None)
        assert chat.post_instruction == plain.post_instruction
        assert chat.template_hash != plain.template_hash
    else:
        with pytest.raises(ChatError, match=r"has no system turn \(.*model.system='Be brief.'"):
            chat.render("Hi")


@pytest.mark.parametrize("name", PLAIN)
def test_post_instruction_tokens_are_found(name: str, tokenizer: Any):
    chat = Chat(tokenizer, (2,), template=find(name))
    ending = PLAIN[name].split("Hi")[-1]
    assert tokenizer.decode(list(chat.post_instruction)) == ending
    if name in ENDINGS:
        assert chat.position_labels == ENDINGS[name]
    for prompt in chat.encode([*PROBES, "{system} {instruction}", "Ends in space "]):
        assert tuple(prompt[-len(chat.post_instruction) :]) == chat.post_instruction


def test_published_counts_and_refusal_tokens():
    """PAPER 2.1; 306, 40 and the others are `I`, 2121 is `As`."""
    facts = {name: (t.positions, [i for i, _ in t.refusal]) for name, t in TEMPLATES.items()}
    assert facts == {
        "paper/llama-3@published": (5, [40]),
        "paper/llama-3@fixed": (5, [40]),
        "paper/llama-2": (6, [306]),
        "paper/qwen": (5, [40, 2121]),
        "paper/yi": (6, [59597]),
        "paper/gemma": (5, [235285]),
    }


def test_braces_in_a_text_are_left_alone(tokenizer: Any):
    template = find("paper/llama-2")
    assert template.render("{system} {x} {instruction}") == (
        "[INST] {system} {x} {instruction} [/INST] "
    )
    assert template.render("{system}", "{instruction}").count("{instruction}") == 1


def test_an_unknown_name_lists_what_there_is(tiny_dir: Path, tmp_path: Path):
    with pytest.raises(ChatError) as error:
        load_chat(str(tiny_dir), template="paper/llama-3")
    assert all(name in str(error.value) for name in ["'paper/llama-3'", *TEMPLATES])
    with pytest.raises(ChatError, match="no such template"):  # before anything is written
        runs.run(runs.small(tiny_dir, model__template="gemma"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_template_of_another_family_is_refused(tiny_dir: Path):
    with pytest.raises(ChatError, match=r"needs the tokens \['<bos>', '<start_of_turn>'.*another"):
        load_chat(str(tiny_dir), template="paper/gemma")
    chat = load_chat(str(tiny_dir), template="paper/qwen")
    assert chat.template_name == "paper/qwen" and chat.render("Hi") == CHATML
    assert load_chat(str(tiny_dir)).template_name == "the tokenizer's own"


def test_a_named_template_stands_in_for_none(tmp_path: Path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))
    assert load_chat(str(tmp_path), template="paper/yi").encode(["Hi"])
    with pytest.raises(ChatError, match=r"or name one in model\.template"):
        load_chat(str(tmp_path))


# The paper's refusal tokens in a run


def test_refusal_tokens_of_another_tokenizer_are_refused(tiny_dir: Path, tmp_path: Path):
    fields = {"model__template": "paper/qwen", "refusal__token_ids": ()}
    with pytest.raises(ChatError, match=r"\{40: 'I', 2121: 'As'\}, and token 40 of this tokenizer"):
        runs.run(runs.small(tiny_dir, **fields, refusal__source="paper"), tmp_path / "run")


def test_a_run_says_which_template_and_tokens(
    tiny_dir: Path, tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
):
    own = tuple((i, chat.tokenizer.decode([i]).strip()) for i in (44, 47))
    named = dataclasses.replace(find("paper/qwen"), refusal=own, positions=7)
    monkeypatch.setitem(templates.TEMPLATES, "paper/qwen", named)
    fields = {"model__template": "paper/qwen", "refusal__token_ids": ()}
    config = runs.small(tiny_dir, **fields, refusal__source="paper")
    runs.run(config, tmp_path)
    found = json.loads((tmp_path / "refusal_tokens.json").read_text())
    assert found["origin"] == "the paper's, paper/qwen"
    assert [token["token_id"] for token in found["tokens"]] == [44, 47]
    assert runs.manifest(tmp_path)["identity"]["config.model.template"] == "paper/qwen"
    report = (tmp_path / "report.md").read_text()
    assert "Refusal tokens (the paper's, paper/qwen): " in report
    assert r"Template: paper/qwen; a prompt is `<|im_start|>user\n{instruction}<|im_end|>" in report
    assert "The published runs read 7 positions" in report
    assert "`<|im_end|>` `\\n` `<|im_start|>` `assistant` `\\n`" in report


# Thinking models

QWEN3 = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
OPENS = "{{- '<|im_start|>user\n' + messages[-1].content + '<|im_end|>\n<|im_start|>assistant\n"
THINKING = {
    "the switch": QWEN3,
    "opened": OPENS + "<think>\n' }}",
    "opened, no newline": OPENS + "<think>' }}",
    "opened, two newlines": OPENS + "<think>\n\n' }}",
    "a switch that only opens": OPENS + "' }}{{- '<think>\n' if not enable_thinking }}",
}


@pytest.mark.parametrize("added", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("name", THINKING)
def test_the_prompt_ends_where_the_answer_starts(name: str, added: tuple[str, ...], tokenizer: Any):
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = THINKING[name]
    chat = Chat(tokenizer, (2,))
    ending = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat.render("Hi") == f"<|im_start|>user\nHi{ending}"
    assert tokenizer.decode(list(chat.post_instruction)) == ending
    if added:
        assert chat.position_labels[-4:] == ["<think>", r"\n\n", "</think>", r"\n\n"]


def test_the_switch_alone_would_leave_the_block_to_the_model(tokenizer: Any):
    """What the test above rests on: Qwen3's template opens no block by itself."""
    turns = [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = QWEN3
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("assistant\n")
    with_switch = Chat(tokenizer, (2,)).template_hash
    tokenizer.chat_template = QWEN3.replace("enable_thinking", "other")
    assert Chat(tokenizer, (2,)).template_hash != with_switch


GEMMA4 = (
    "{{- '<bos><|turn>user\n' + messages[-1].content + '<turn|>\n<|turn>model\n' }}"
    "{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\n<channel|>' }}"
    "{%- endif %}"
)


def test_gemma_4_closes_its_own_block(tokenizer: Any):
    """Its larger models' template closes an empty channel, the smaller ones' opens none."""
    tokenizer.chat_template = GEMMA4
    ending = "<turn|>\n<|turn>model\n"
    assert Chat(tokenizer, (2,)).render("Hi").endswith(f"Hi{ending}<|channel>thought\n<channel|>")
    tokenizer.chat_template = GEMMA4.split("{%- if")[0]
    assert Chat(tokenizer, (2,)).render("Hi").endswith(f"Hi{ending}")


def test_models_that_do_not_think_are_left_alone(chat: Chat):
    assert chat.render("<think>").endswith("<|im_start|>assistant\n")


# Models that write into channels: gpt-oss's format, shortened

HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
HARMONY = (
    "{%- macro system() %}{{- 'Current date: ' + strftime_now('%Y-%m-%d') }}"
    "{{- '\n# Valid channels: analysis, final.' }}{%- endmacro %}"
    "{{- '<|start|>system<|message|>' + system() + '<|end|>' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)


def harmony(tokenizer: Any, system: str | None = None) -> Chat:
    tokenizer.add_special_tokens({"additional_special_tokens": list(HARMONY_TOKENS)})
    tokenizer.chat_template = HARMONY
    return Chat(tokenizer, (2,), system=system)


def test_a_prompt_ends_in_the_channel_of_answers(tokenizer: Any):
    """Where a past answer of the same template starts, so that its first token is scored."""
    chat = harmony(tokenizer, "Be brief.")
    ending = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert chat.render("Hi") == (
        "<|start|>system<|message|>Current date: 2024-07-26\n# Valid channels: analysis, final."
        "<|end|><|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi" + ending
    )
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I'm sorry"},
    ]
    same_day = HARMONY.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
    answered = tokenizer.apply_chat_template(turns, chat_template=same_day, tokenize=False)
    assert answered == chat.render("Hi") + "I'm sorry<|return|>"
    assert tokenizer.decode(list(chat.post_instruction)) == ending
    labels = chat.position_labels  # "assistant" and "final" may be several tokens here
    assert [label for label in labels if label in HARMONY_TOKENS] == [
        "<|end|>",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
    ]


def test_a_reply_ends_where_a_message_does(tokenizer: Any, tmp_path: Path):
    """`<|end|>` is no stop token of gpt-oss's files; after it another message would begin."""
    harmony(tokenizer).tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    chat = load_chat(str(tmp_path))
    assert chat.stop_ids == (2, chat.tokenizer.convert_tokens_to_ids("<|end|>"))


def test_the_same_turn_without_channels_is_left_alone(tokenizer: Any):
    tokenizer.chat_template = HARMONY.replace("<|channel|>", "<|other|>")
    assert Chat(tokenizer, (2,)).render("Hi").endswith("<|start|>assistant")
