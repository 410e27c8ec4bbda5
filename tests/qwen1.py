"""Stand-ins for Qwen-1's checkpoints in the hub's layout: no file of the real ones is here.

The vocabulary is trained on the prompts that ship; single bytes have the ranks that they have in
Qwen's, and so have the paper's refusal tokens.
"""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jax_refusal.data.prompts import builtin

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
AS = 2121  # the rank of "As"

# Qwen-1.8B-Chat's config.json, but for the sizes.
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 2 * 48,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 512,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
}
# What the hub's folders hold beside weights and ranks; the program must never run.
TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
}
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "eos_token_id": AS + 1,
    "pad_token_id": AS + 1,
    "max_window_size": 24000,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}
PROGRAM = "import pathlib\n\npathlib.Path(__file__).with_name('it ran').touch()\n"


@cache
def ranks() -> tuple[bytes, ...]:
    """The bytes that show, the other bytes, and what a trained BPE joins, up to `AS`."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    single = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    single += [byte for byte in range(256) if byte not in single]
    shown = [chr(byte) for byte in single[:188]] + [chr(0x100 + i) for i in range(68)]
    spelled = dict(zip(shown, single, strict=True))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), letters])
    trainer = trainers.BpeTrainer(vocab_size=4000, show_progress=False)
    others = ["user assistant system"] * 50 + ["你好世界 你好中国 naïve 😀👍"]
    tokenizer.train_from_iterator([*instructions(), *others], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    joined = [bytes(spelled[letter] for letter in left + right) for left, right in merges]
    # A blank is joined to the front of words, as in Qwen's vocabulary.
    words = [text for token in joined for text in (token, b" " + token) if text != b"As"]
    found = list(dict.fromkeys([*(bytes([byte]) for byte in single), *words]))
    assert len(found) >= AS
    return (*found[:AS], b"As")


def instructions() -> list[str]:
    """The prompts that ship."""
    kinds = [builtin(kind) for kind in ("harmful", "harmless")]
    return [row.text for kind in kinds for rows in kind.values() for row in rows]


def lines(tokens: tuple[bytes, ...]) -> bytes:
    """The content of `qwen.tiktoken`."""
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


def write_tokenizer(folder: Path, tokens: tuple[bytes, ...] | None = None) -> Path:
    """The hub's files beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_bytes(lines(tokens or ranks()))
    (folder / "tokenization_qwen.py").write_text(PROGRAM)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 2432}))
    return folder


def write_weights(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    """A Qwen2's tensors under Qwen-1's names, and config.json."""
    renamed = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for layer in range(4):
        old, new = f"model.layers.{layer}.", f"transformer.h.{layer}."
        attn = f"{old}self_attn."
        for kind in ("weight", "bias"):
            renamed[f"{new}attn.c_attn.{kind}"] = np.concatenate(
                [tensors[f"{attn}{name}_proj.{kind}"] for name in "qkv"]
            )
        renamed |= {
            f"{new}attn.c_proj.weight": tensors[f"{attn}o_proj.weight"],
            f"{new}ln_1.weight": tensors[f"{old}input_layernorm.weight"],
            f"{new}ln_2.weight": tensors[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.w1.weight": tensors[f"{old}mlp.up_proj.weight"],
            f"{new}mlp.w2.weight": tensors[f"{old}mlp.gate_proj.weight"],
            f"{new}mlp.c_proj.weight": tensors[f"{old}mlp.down_proj.weight"],
        }
    save_file(renamed, folder / "model.safetensors")
    vocab = len(tensors["model.embed_tokens.weight"])
    config = {**CONFIG, "vocab_size": vocab, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
