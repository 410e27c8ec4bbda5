"""A Hugging Face fast tokenizer built from the metadata of a GGUF file, without PyTorch.

A GGUF file carries its vocabulary, merges (or scores), special-token ids and chat template. The
GGUF support inside transformers imports torch, so this module assembles the same tokenizer from
the `tokenizers` library directly. Two vocabulary kinds are supported:

* "gpt2": byte-level BPE with stored merges, as SmolLM2, Llama-3, Qwen2 and GPT-2 use. How text is
  cut into words before merging is not stored, only named (`tokenizer.ggml.pre`); the rule behind
  each supported name is in `_pre_tokenizer`.
* "llama": SentencePiece BPE with one score per piece and byte fallback, as Llama-2, Mistral and
  TinyLlama use. Merges are recovered from the scores.

Importing this module is cheap: tokenizers and transformers are imported inside the functions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_refusal.checkpoints.gguf_header import read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_MODELS = ("gpt2", "llama")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE_NAMES = ("smollm", "gpt-2", "default", *_LLAMA3_NAMES, "qwen2")
_ADVICE = "use the Hugging Face directory of this model instead (it holds tokenizer.json)"

# What each entry is, and the items of a list; whatever else stands there is not read.
_KINDS: dict[str, tuple[type, type | tuple[type, ...]]] = {
    "ggml.model": (str, ()),
    "ggml.pre": (str, ()),
    "ggml.tokens": (list, str),
    "ggml.token_type": (list, int),
    "ggml.merges": (list, str),
    "ggml.scores": (list, (float, int)),
    **{f"ggml.{name}_token_id": (int, ()) for name in ("bos", "eos", "unknown", "padding")},
    **{f"ggml.add_{name}": (bool, ()) for name in ("bos_token", "eos_token", "space_prefix")},
    "chat_template": (str, ()),
}
_PAIRS = 10**8  # ways to cut tokens in two; the largest vocabularies have 3 million

# Values of tokenizer.ggml.token_type; 1 (normal), 5 (unused) and 6 (byte) need no special care.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


def tokenizer_from_gguf(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer described by the metadata of the GGUF file at `path`.

    Only the header is read, never the weights (well under a second for a 49k vocabulary). Token
    ids are the positions in the file's token list. Control tokens (and the unknown token) become
    special added tokens and user-defined ones plain added tokens, so markers such as
    `<|im_start|>` are one token wherever they stand in a text. bos/eos/unk/pad and the chat
    template are set where the file has them and are None otherwise. Encoding adds bos/eos as the
    file says; where it is silent, bos is added for "llama" vocabularies and Llama-3 pre-tokenizers
    (what llama.cpp does) and nothing is added for the rest. Decoding never cleans up spaces.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a readable GGUF file, no (or inconsistent) tokenizer data, or a vocabulary
            kind or pre-tokenizer name that is not supported; the message says what to do.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = read_header(Path(path)).metadata
    _check_kinds(path, meta)
    model, tokens, types = _vocabulary(path, meta)
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        if model == "gpt2":
            tokenizer = _byte_level_bpe(meta, vocab)
        else:
            tokenizer = _sentencepiece_bpe(meta, vocab, types)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Matched whole in the raw text, before any normalizing or splitting.
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(path, meta, tokens)
    llama3 = model == "gpt2" and meta["tokenizer.ggml.pre"] in _LLAMA3_NAMES
    default_bos = (model == "llama" or llama3) and "bos_token" in special
    add = {
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", default_bos)),
        "add_eos_token": bool(meta.get("tokenizer.ggml.add_eos_token", False)),
    }
    for flag, wanted in add.items():
        if wanted and flag.removeprefix("add_") not in special:
            raise ValueError(f"{path}: {flag} is set, but no such token is named; {_ADVICE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        **add,  # transformers builds the post-processor from these two
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _check_kinds(path: str | os.PathLike[str], meta: dict[str, Any]) -> None:
    for name, (kind, items) in _KINDS.items():
        value = meta.get(f"tokenizer.{name}")
        fits = value is None or type(value) is kind
        if fits and isinstance(value, list) and items:
            fits = all(isinstance(item, items) and item == item for item in value)  # no NaN
        if not fits:
            raise ValueError(
                f"{path}: tokenizer.{name} is {str(value)[:60]!r}, which is not of its kind "
                f"({kind.__name__}); {_ADVICE}"
            )


def _vocabulary(
    path: str | os.PathLike[str], meta: dict[str, Any]
) -> tuple[str, list[str], list[int]]:
    """The kind of vocabulary, its tokens and their types, checked."""
    model = meta.get("tokenizer.ggml.model", "(missing)")
    if model not in _MODELS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {model!r}, allowed: {', '.join(_MODELS)}; {_ADVICE}"
        )
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{path}: no tokenizer.ggml.tokens in the file; {_ADVICE}")
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    # A repeated token would silently shadow an id that the model can emit.
    distinct = len(set(tokens))
    if not len(types) == len(tokens) == distinct:
        raise ValueError(
            f"{path}: {len(tokens)} tokens, {distinct} of them distinct, but {len(types)} token "
            f"types: the three counts must agree; {_ADVICE}"
        )
    return model, tokens, types


def _special_tokens(
    path: str | os.PathLike[str], meta: dict[str, Any], tokens: list[str]
) -> dict[str, str]:
    """The bos/eos/unk/pad tokens that the file names, under the names transformers has for them."""
    # "llama" files may leave out these ids, which are 1, 2 and 0 by convention.
    usual = {"bos": 1, "eos": 2, "unknown": 0} if meta["tokenizer.ggml.model"] == "llama" else {}
    special = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id", usual.get(key))
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise ValueError(
                f"{path}: {key}_token_id is {index}, but there are {len(tokens)} tokens; {_ADVICE}"
            )
        special[f"{name}_token"] = tokens[index]
    return special


def _byte_level_bpe(meta: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """Tokenizer for a "gpt2" vocabulary: text becomes UTF-8 bytes, which the merges join."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = meta.get("tokenizer.ggml.pre", "(missing)")
    if pre not in _PRE_NAMES:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}, allowed: {', '.join(_PRE_NAMES)}; {_ADVICE}"
        )
    merges = [tuple(merge.split(" ")) for merge in meta.get("tokenizer.ggml.merges", ())]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"merge {' '.join(pair)!r} does not join two tokens into a third")
    # Llama-3 takes a word that is itself a token whole, even where the merges cannot build it.
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3_NAMES)
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(name: str) -> PreTokenizer:
    """The word-splitting rule behind a supported `tokenizer.ggml.pre` name.

    GPT-2: the pattern built into ByteLevel. SmolLM: every numeric character is cut out on its own
    first, then the GPT-2 pattern runs on the pieces between. Llama-3 and Qwen2: one shared pattern
    of their own, in which digits come in groups of up to three (Llama-3) or one by one (Qwen2).
    "default" names no rule; it is read as GPT-2's here (llama.cpp also cuts digits in threes).
    """
    from tokenizers import Regex, pre_tokenizers

    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, _pre_tokenizer("gpt-2")])
    alternatives = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a run of letters with one leading space or sign
        r"\p{N}{1,3}" if name in _LLAMA3_NAMES else r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation with the line breaks that follow
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks, leaving the last one to the word that follows
        r"\s+",
    )
    words = pre_tokenizers.Split(Regex("|".join(alternatives)), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, to_bytes])


def _sentencepiece_bpe(meta: dict[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
    """Tokenizer for a "llama" vocabulary: characters merged best score first, bytes as fallback.

    Spaces are written as U+2581, and one is put in front of the text (and of every stretch between
    added tokens) unless the file says otherwise; decoding takes one leading space away again.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocab):
        raise ValueError(
            f"{len(vocab)} tokens but {len(scores or ())} scores: a 'llama' vocabulary needs one "
            f"score per token; {_ADVICE}"
        )
    unknown = [token for token, kind in zip(vocab, types, strict=True) if kind == _UNKNOWN]
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges_from_scores(vocab, scores, types),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = Tokenizer(bpe)
    space = normalizers.Replace(" ", "\u2581")
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_from_scores(
    vocab: dict[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Merge pairs, best first: every way to cut a piece into two pieces of the vocabulary.

    SentencePiece joins the neighbours whose joined piece scores highest, so a pair ranks by the
    score of its result (then by id, then longer left part). Control, user-defined, unknown and
    byte tokens never arise from ordinary text and take no part.
    """
    if sum(len(token) ** 2 for token in vocab) > _PAIRS:
        raise ValueError(f"its tokens are too long: {max(map(len, vocab))} characters; {_ADVICE}")
    apart = {_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
    plain = {token for token, kind in zip(vocab, types, strict=True) if kind not in apart}
    ranked = [
        (-scores[index], index, -cut, token[:cut], token[cut:])
        for token, index in vocab.items()
        if token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]
