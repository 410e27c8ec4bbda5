"""Damaged prompt files, tokenizers and chat templates: instructions that stand in their prompts, or
one error of the library."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.data.chat import load_chat
from jax_refusal.data.prompt_files import PromptError, read_instructions
from jax_refusal.data.templates import ChatError
from tests import tiny
from tests.fuzz.damage import altered, as_json, campaign, damaged, rearranged

ROWS = [{"instruction": f"Name {n} birds, please.", "category": "birds"} for n in range(4)]
TEXTS = [row["instruction"] for row in ROWS]
FILES = {
    "prompts.json": json.dumps(ROWS).encode(),
    "texts.json": json.dumps(TEXTS).encode(),
    "prompts.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "prompts.csv": b'instruction,category\n"Name a bird, please",birds\r\nName two,"a ""b"""\n',
    "prompts.tsv": b"category\tinstruction\nbirds\tName a bird\n",
    "prompts.txt": b"\xef\xbb\xbfName a bird\n\nName two\r\n",
}
# What templates are made of, to be put together otherwise.
PIECES = [
    "{% for message in messages %}",
    "{% endfor %}",
    "{{ message['role'] }}",
    "{{ message['content'] }}",
    "{{ message.content | trim }}",
    "{% if message['role'] == 'user' %}",
    "{% else %}",
    "{% endif %}",
    "<|im_start|>",
    "<|im_end|>\n",
    "{% if add_generation_prompt %}",
    "{{ '<|im_start|>assistant\n' }}",
    "{% set x = namespace(n=0) %}",
    "{% for i in range(99999) %}",
    "{{ messages }}",
    "{{ raise_exception('no') }}",
    "{{ bos_token }}",
    "{% for part in message.content %}{{ part.text }}{% endfor %}",
    "{{ message['content'] * 9999999 }}",
]


@pytest.mark.parametrize("name", FILES)
def test_prompt_files(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / name, FILES[name]

    def check(rng: np.random.Generator) -> None:
        if content[:1] == b"[" and rng.random() < 0.5:
            path.write_bytes(as_json(rng, altered(rng, json.loads(content))))
        else:
            path.write_bytes(damaged(rng, content))
        found = read_instructions(path)
        assert found and all(each.text.strip() and each.category is not None for each in found)

    campaign(check, (PromptError,))


@pytest.fixture(scope="module")
def folder(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chats") / "model"
    shutil.copytree(tiny_dir, made)
    return made


TOKENIZER = ["tokenizer_config.json", "tokenizer.json", "generation_config.json", "config.json"]


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizers(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    sound = json.loads(content)

    def check(rng: np.random.Generator) -> None:
        if rng.random() < 0.7:
            (folder / name).write_bytes(as_json(rng, altered(rng, sound)))
        else:
            (folder / name).write_bytes(damaged(rng, content))
        chat = load_chat(str(folder))
        prompts = chat.encode(TEXTS)
        assert all(0 <= token < len(chat.tokenizer) for prompt in prompts for token in prompt)
        assert all(text in chat.render(text) for text in TEXTS)

    try:
        campaign(check, (SourceError, ChatError))
    finally:
        (folder / name).write_bytes(content)


def test_templates(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = path.read_bytes()
    sound = json.loads(content)

    def check(rng: np.random.Generator) -> None:
        if rng.random() < 0.5:
            template = damaged(rng, tiny.CHAT_TEMPLATE.encode()).decode(errors="replace")
        else:
            pieces = [PIECES[i].encode() for i in rng.permutation(len(PIECES))[:8]]
            template = rearranged(rng, pieces).decode(errors="replace")
        path.write_text(json.dumps({**sound, "chat_template": template}))
        chat = load_chat(str(folder))
        chat.encode(TEXTS)
        assert all(text in chat.render(text) for text in TEXTS)

    try:
        campaign(check, (SourceError, ChatError))
    finally:
        path.write_bytes(content)
