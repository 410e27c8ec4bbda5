"""Qwen-1's tokenizer from its ranks, against the algorithm itself: join the lowest rank first."""

import itertools
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import regex

import jax_refusal as jr
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.data import templates
from jax_refusal.data.chat import ChatError, load_chat
from jax_refusal.data.qwen_tokenizer import tokenizer_from_tiktoken
from tests import qwen1
from tests.qwen1 import AS, SPECIAL
from tests.test_gguf_tokenizer import random_texts

# As Qwen's program has it.
WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"""
    r"""[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
MARKERS = [*SPECIAL[:3], "<|extra_0|>", "<|extra_204|>"]
CHINESE = [
    "你好世界",
    "今天天气很好，我们去公园散步吧。",
    "請問：这个多少钱？",
    "ABC中文123",
    "１２３",
]


def algorithm(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's, on words: a known word as it is, else the lowest rank of neighbours first."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    ids: list[int] = []
    for stretch in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if stretch in special:
            ids.append(special[stretch])
            continue
        for word in regex.findall(WORDS, unicodedata.normalize("NFC", stretch)):
            whole = word.encode()
            parts = [whole] if whole in ranks else [bytes([byte]) for byte in whole]
            while True:
                joined = [left + right for left, right in itertools.pairwise(parts)]
                found = [(ranks[token], at) for at, token in enumerate(joined) if token in ranks]
                if not found:
                    break
                at = min(found)[1]
                parts[at : at + 2] = [joined[at]]
            ids += [ranks[part] for part in parts]
    return ids


def assert_same(tokens: tuple[bytes, ...], texts: list[str], folder: Path) -> None:
    tokenizer = tokenizer_from_tiktoken(qwen1.write_tokenizer(folder, tokens))
    ranks = {token: i for i, token in enumerate(tokens)}
    found = tokenizer(texts, add_special_tokens=False).input_ids
    for text, ids in zip(texts, found, strict=True):
        assert ids == algorithm(text, ranks), text
        assert tokenizer.decode(ids) == _composed(text)


def _composed(text: str) -> str:
    parts = regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text)
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


def test_a_trained_vocabulary_equals_the_algorithm(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = random_texts(3000, MARKERS, seed=4)
    texts += [" ".join(rng.choices(CHINESE, k=3)) for _ in range(200)]
    assert_same(qwen1.ranks(), [*texts, *qwen1.instructions()], tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_any_vocabulary_equals_the_algorithm(seed: int, tmp_path: Path) -> None:
    """Random tokens in random order: several ways to each, and some that no joining leads to."""
    rng = random.Random(seed)
    drawn = ["".join(rng.choices("ab c", k=rng.randrange(2, 7))).encode() for _ in range(80)]
    single = [bytes([byte]) for byte in range(256)]
    rng.shuffle(single)
    tokens = tuple(dict.fromkeys([*single, *drawn]))
    texts = ["".join(rng.choices("ab c", k=rng.randrange(20))) for _ in range(400)]
    assert_same(tokens, texts, tmp_path)


def test_special_tokens_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_tiktoken(qwen1.write_tokenizer(tmp_path))
    assert len(tokenizer) == AS + 1 + 208
    ids = [AS + 1, AS + 2, AS + 3, AS + 4, AS + 208]
    assert tokenizer.convert_tokens_to_ids(MARKERS) == ids
    assert tokenizer("".join(MARKERS)).input_ids == ids
    assert tokenizer.decode([*ids, 40], skip_special_tokens=True) == "I"
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (AS + 1, None)


def test_chat(tmp_path: Path) -> None:
    """ChatML without a system turn, which is the paper's; replies end in two ways."""
    folder = qwen1.write_tokenizer(tmp_path)
    chat = jr.load_chat(str(folder))
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render("Why?") == prompt
    assert chat.stop_ids == (AS + 1, AS + 3)
    assert chat.context == 512
    paper = load_chat(str(folder), template="paper/qwen")
    assert len(chat.post_instruction) == templates.find("paper/qwen").positions == 5
    assert paper.encode(["Why?", " a  1"]) == chat.encode(["Why?", " a  1"])
    assert paper.template is not None
    assert paper.template.refusal_ids(paper.tokenizer) == (40, AS)
    with_system = jr.load_chat(str(folder), system="Be brief.")
    assert with_system.render("Why?") == f"<|im_start|>system\nBe brief.<|im_end|>\n{prompt}"
    assert not (folder / "it ran").exists()


def test_a_template_of_the_checkpoint_comes_first(tmp_path: Path) -> None:
    folder = qwen1.write_tokenizer(tmp_path)
    settings = qwen1.TOKENIZER_CONFIG | {"chat_template": "{{ messages[0]['content'] }}<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert jr.load_chat(str(folder)).render("Why?") == "Why?<|im_end|>"


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    folder = qwen1.write_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text('{"chat_format": "raw"}')
    with pytest.raises(ChatError, match="has no chat template, so it is not a chat model"):
        jr.load_chat(str(folder))
    assert load_chat(str(folder), template="paper/qwen").render("Why?")


def test_builds_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tiktoken'] = None\n"
        "from pathlib import Path\n"
        "from jax_refusal.data.qwen_tokenizer import tokenizer_from_tiktoken\n"
        "assert not {'tokenizers', 'transformers'} & sys.modules.keys()\n"
        f"print(tokenizer_from_tiktoken(Path({str(qwen1.write_tokenizer(tmp_path))!r}))('I').input_ids)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[40]"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"IQ==", ["line 300", "b'IQ=='", "a token in base64, a blank and its rank"]),
        (b"IQ== one", ["line 300", "b'IQ== one'"]),
        (b"I!== 299", ["line 300", "b'I!== 299'"]),
        (b"IQ== 299", ["line 300", "the token b'!' is in line 1 already"]),
        (b"AAAAAA== 0", ["line 300", "rank 0 is in line 1 already"]),
        (b"AAAAAA== 999999", ["2122 tokens, and none of rank 299"]),
        (b"", ["2121 tokens, and none of rank 299"]),
    ],
)
def test_a_damaged_line_is_named(line: bytes, words: list[str], tmp_path: Path) -> None:
    path = qwen1.write_tokenizer(tmp_path) / "qwen.tiktoken"
    lines = path.read_bytes().splitlines()
    lines[299] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(SourceError) as error:
        jr.load_chat(str(tmp_path))
    for word in (f"{tmp_path}/qwen.tiktoken", "has no usable tokenizer", *words):
        assert word in str(error.value)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = qwen1.write_tokenizer(tmp_path) / "qwen.tiktoken"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceError, match=r"no token for \d+ bytes: \['0x|line \d+"):
        jr.load_chat(str(tmp_path))
