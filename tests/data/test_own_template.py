"""A tokenizer's own template: what it is given arrives, in the form that it takes, on any day."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.data import own_template
from jax_refusal.data.chat import Chat, ChatError, load_chat
from tests import runs, tiny

START, END = "<|im_start|>", "<|im_end|>\n"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
CONTENT = HEAD + "{{ m.content }}" + TAIL
PARTS = HEAD + "{% for c in m.content %}{{ c.text }}{% endfor %}" + TAIL
# As multimodal models have them, which mark an image among the parts.
TYPED = (
    HEAD + "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}" + TAIL
)
BOTH = (
    HEAD + "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}"
    "{{ c.text if c.type == 'text' }}{% endfor %}{% endif %}" + TAIL
)
MIXED = (
    HEAD
    + "{% if m.role == 'system' %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    + TAIL
)
STRICT = (
    HEAD + "{{ m.content[0].text if m.content is not string else raise_exception('x') }}" + TAIL
)
MERGED = (  # Gemma 3's way
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}"
    "{% endif %}"
    "{% for m in turns %}<|im_start|>user\n{{ (first if loop.first) + m.content | trim }}" + TAIL
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny.write_tokenizer(tmp_path)


def chat(tokenizer: Any, template: Any, system: str | None = None) -> Chat:
    tokenizer.chat_template = template
    return Chat(tokenizer, (2,), system=system)


def prompt(instruction: str, system: str | None = None) -> str:
    turn = f"{START}system\n{system}{END}" if system else ""
    return f"{turn}{START}user\n{instruction}{END}{START}assistant\n"


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [CONTENT, PARTS, TYPED, BOTH, MIXED, STRICT])
def test_content_is_given_in_the_form_that_the_template_takes(
    template: str, system: str | None, tokenizer: Any
):
    made = chat(tokenizer, template, system)
    assert [made.render(t) for t in ("one", "two")] == [prompt(t, system) for t in ("one", "two")]
    assert len(made.post_instruction) == 5


def test_a_template_of_parts_renders_what_transformers_renders_of_parts(tokenizer: Any):
    for template in (PARTS, TYPED, STRICT):
        made = chat(tokenizer, template).render("Hi")
        turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        assert made == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_system_text_in_the_users_turn_is_a_system_text(tokenizer: Any):
    made = chat(tokenizer, MERGED, "Be brief.")
    assert made.render(" Hi ") == f"{START}user\nBe brief.\n\nHi{END}{START}assistant\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "Hello.",
        "{{ m.content | e }}",
        "{{ m.content | tojson }}",
        "{{ m.content | lower }}",
        "{{ m.content | title }}",
        "{{ m.content[:1000] }}",
        "{{ m.content | truncate(500) }}",
        "{{ m.content | urlencode }}",
        "{{ m.content | replace(' ', '') }}",
        "{{ m.content | reverse if m.content is string }}",
        "{{ m.text }}",
    ],
)
def test_a_template_that_loses_or_changes_the_instruction_is_refused(content: str, tokenizer: Any):
    made = chat(tokenizer, HEAD + content + TAIL)
    with pytest.raises(ChatError, match=r"leaves out or changes the instruction.*as it is.*Mend"):
        made.render("Hi")


@pytest.mark.parametrize(
    "template",
    [
        CONTENT.replace("{{ m.content", "{{ m.content if m.role == 'user'"),
        "{% for m in messages if m.role == 'user' %}" + CONTENT.split("%}", 1)[1],
        CONTENT.replace("{{ m.content", "{{ m.content if m.role == 'user' else 'Be kind.'"),
        CONTENT.replace("{{ m.content", "{{ m.content if m.role == 'user' else m.content | upper"),
        "{% set messages = messages[-1:] %}" + CONTENT,
    ],
)
def test_a_template_that_loses_or_changes_the_system_text_is_refused(template: str, tokenizer: Any):
    """Even where it writes the same words of its own."""
    made = chat(tokenizer, template, "Be kind.")
    with pytest.raises(ChatError, match=r"leaves out or changes model\.system.*model\.system=None"):
        made.render("Hi")
    assert chat(tokenizer, template).render("Hi") == prompt("Hi")


def test_every_instruction_is_looked_for_in_its_prompt(tokenizer: Any):
    """What is lost of some texts alone, and what runs at a later time."""
    made = chat(tokenizer, CONTENT.replace("{{ m.content", "{{ m.content.replace('lamp', '')"))
    assert made.encode(["A cat.", "  A dog.\n"])
    with pytest.raises(ChatError, match=r"'A lamp\.' does not stand in the prompt as it is"):
        made.encode(["A cat.", "A lamp."])


def test_the_report_may_ask_for_the_prompt_around_an_instruction(tokenizer: Any):
    assert chat(tokenizer, PARTS).render("{instruction}") == prompt("{instruction}")


def test_a_template_that_fails_says_so_of_what_it_was_given(tokenizer: Any):
    made = chat(tokenizer, HEAD + "{{ raise_exception('no ' + m.role) }}" + TAIL)
    with pytest.raises(ChatError, match="The chat template failed on 'Hi': no user"):
        made.render("Hi")
    made = chat(tokenizer, "{% for m in messages %}{% for i in range(99999) %}{{ messages }}")
    with pytest.raises(ChatError, match="failed on 'Hi': Unexpected end of template"):
        made.render("Hi")
    made = chat(tokenizer, CONTENT + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)
    with pytest.raises(ChatError, match="failed on 'Hi': it loops, or makes a text"):
        made.render("Hi")


# Several templates under names

CLOCK = "{{ strftime_now('%d %b %Y') }} " + CONTENT
THINKS = CONTENT + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def write(folder: Path, template: Any, files: dict[str, str]) -> Path:
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def named(default: str, other: str) -> list[dict[str, str]]:
    return [{"name": "default", "template": default}, {"name": "tool_use", "template": other}]


@pytest.mark.parametrize("form", ["one", "a list", "a file", "files", "a list and a file"])
def test_the_day_is_the_same_in_every_form_of_templates(form: str, tmp_path: Path):
    files = {"chat_template.jinja": CLOCK} if "file" in form else {}
    if form == "files":
        files["additional_chat_templates/tool_use.jinja"] = "x"
    template = {"one": CLOCK, "a list": named(CLOCK, "x")}.get(form, named("y", "z"))
    made = load_chat(str(write(tmp_path, template, files)))
    assert made.render("Hi") == "26 Jul 2024 " + prompt("Hi")


def test_only_the_template_that_is_used_counts(tmp_path: Path):
    other = "enable_thinking <|channel|>" + THINKS
    made = load_chat(str(write(tmp_path / "a", named(CONTENT + START + "x", other), {})))
    assert made.render("Hi") == prompt("Hi") + START + "x"
    made = load_chat(str(write(tmp_path / "b", named(THINKS, "x"), {})))
    assert made.render("Hi").endswith("<think>\n\n</think>\n\n")
    channels = CONTENT.replace("<|im_start|>assistant\n", "<|start|>assistant")
    assert channels != CONTENT
    made = load_chat(str(write(tmp_path / "c", named(channels, "<|channel|>"), {})))
    assert made.render("Hi").endswith("<|start|>assistant")


def test_names_without_a_default(tmp_path: Path):
    template = [{"name": "rag", "template": CONTENT}, {"name": "tool_use", "template": CONTENT}]
    words = r"\['rag', 'tool_use'\] and none is called \"default\""
    with pytest.raises(ChatError, match=words):
        load_chat(str(write(tmp_path, template, {})))
    assert load_chat(str(tmp_path), template="paper/qwen").render("Hi") == prompt("Hi")


# Before any weight is read


@pytest.mark.parametrize(
    "template", [CONTENT.replace("m.content", "m.text"), CONTENT * 3 + "{% if"]
)
def test_a_run_is_refused_before_it_writes(template: str, tiny_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_dir, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(ChatError):
        runs.run(runs.small(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_texts_that_are_tried_are_what_templates_change():
    assert all(letter in own_template.TRIED[0] for letter in "\"'&<>\\{}%Ü")
    assert len(own_template.TRIED[1]) > 5000
