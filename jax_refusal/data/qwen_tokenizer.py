"""Qwen-1's tokenizer out of `qwen.tiktoken`, without the code that its checkpoints ship.

The file holds one token a line: its bytes in base64, a blank, its rank. Rank is both the id and the
order of merging: of two neighbours that join to a token, those with the lowest rank join first.
`tokenizers` wants pairs instead, in that order: a token is cut in two in every way that there is.
(No text tells these pairs apart: by the time that a token is the next to be joined, what lies
inside it has been joined as if it stood alone, so that only one of its pairs is ever met.)

Importing this module is cheap: tokenizers and transformers are imported inside the functions.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from jax_refusal.checkpoints.sources import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FILE = "qwen.tiktoken"
END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# One turn after another, and no system turn of its own.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_from_tiktoken(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Qwen-1 checkpoint's folder.

    The special tokens follow the ranks, and are one token wherever they stand in a text, as in
    Qwen's own. The chat template is that of tokenizer_config.json if it has one, else ChatML, or
    none where generation_config.json says that this is a base model (chat_format "raw").

    Raises ValueError, naming file and line, for a file that is damaged.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(folder / FILE)
    tokenizer = _byte_level_bpe(ranks)
    # Matched whole in the raw text, before any normalizing or splitting; ids follow the ranks.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    settings, generation = (
        read_json(path) if (path := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    raw = generation.get("chat_format", "chatml") != "chatml"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=settings.get("chat_template") or (None if raw else CHATML),
        clean_up_tokenization_spaces=False,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks, which are 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}  # rank -> where it is given
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        place = f"{path}, line {number}"
        try:
            written, rank = line.split()
            token, rank = base64.b64decode(written, validate=True), int(rank)
        except ValueError:
            raise ValueError(
                f"{place}: {line[:40]!r} is not a token in base64, a blank and its rank."
            ) from None
        if token in ranks:
            first = lines[ranks[token]]
            raise ValueError(f"{place}: the token {token!r} is in line {first} already.")
        if rank in lines:
            raise ValueError(f"{place}: rank {rank} is in line {lines[rank]} already.")
        ranks[token], lines[rank] = rank, number
    lost = next((rank for rank in range(len(ranks)) if rank not in lines), None)
    if lost is not None:
        raise ValueError(f"{path} has {len(ranks)} tokens, and none of rank {lost}.")
    bytes_lost = [f"0x{byte:02X}" for byte in range(256) if bytes([byte]) not in ranks]
    if bytes_lost:
        raise ValueError(f"{path} has no token for {len(bytes_lost)} bytes: {bytes_lost[:5]}.")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _byte_level_bpe(ranks: dict[bytes, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = _letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    # A word that is itself a token is taken whole, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """The letter that `tokenizers` writes for each byte: itself where it is one that shows."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
