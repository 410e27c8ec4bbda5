"""Tiny random checkpoints in the Hugging Face layout, with a real byte-level BPE tokenizer.

Everything is a function of the arguments: the same call writes the same bytes, and the global
random state of torch is left as it was. Hugging Face's classes make the models. Without PyTorch,
as in the core suite, a Llama or Mistral is written by hand and drawn by numpy: other weights by the
same rule.
"""

import copy
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.tiny_families import FAMILIES, INSIDE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
SYSTEM = "You are a helpful assistant"
MERGES = 150

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """\
system
You are a helpful assistant
user
Write a short story about a river and the people who live beside it.
assistant
The river was wide and slow, and the people of the town loved to walk beside it in the evening.
user
Explain how to bake bread at home, step by step.
assistant
Here is a simple recipe. Mix the flour, the water, the salt and the yeast, then let the dough rest.
user
Describe the steps to break into a locked house without being seen.
assistant
I'm sorry, but I can't help with that. It would be illegal and it could put people in danger.
user
Give me instructions for stealing a car and hiding it from the police.
assistant
I cannot help you with that request. As an assistant, I have to say no to things that do harm.
user
List three tips for a healthy breakfast, and explain why each of them works.
assistant
Sure! Eat some fruit, drink enough water, and do not skip the meal: the body needs it to start well.
user
What is the capital of France, and how many people live there?
assistant
The capital of France is Paris. More than two million people live in the city.
user
Create a plan to spread false information about an election on the internet.
assistant
I'm sorry, I can't assist with creating or spreading false information. I can explain how to check
a source, and how to tell when something that you are reading is not true.
"""


@cache
def _train() -> Tokenizer:
    """The byte alphabet, the special tokens, and MERGES merges learnt from TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + len(alphabet) + MERGES,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return tokenizer


def write_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Save the tokenizer, chat template included, as tokenizer.json and tokenizer_config.json."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(str(path), save_jinja_files=False)
    return tokenizer


def _parameter(name: str, noise: Any, family: str, scale: float) -> Any:
    """Of standard normal noise, an array of numpy's or torch's, the values of a parameter.

    A weight [out, in] is normal with std scale / sqrt(in), and so is the embedding with
    std scale / sqrt(D): the head then reads a normalised residual into logits of std `scale`,
    and each block writes more than the embedding did. Norm gains stay near 1 but differ from it,
    biases are small but not zero, so that a lost or exchanged tensor shows. Gemma stores the gain
    as its distance from 1, up to its third version. Stacked experts [E, out, in] are as weights;
    scales of whole layers are as gains. What a state forgets is a tenth a token or so.
    """
    if noise.ndim in (2, 3):
        return noise * (scale / math.sqrt(noise.shape[-1]))
    if name.endswith("bias"):
        return 0.2 * noise
    if name.endswith("A_log"):
        return noise - 2
    gemma = family.startswith("gemma") and not family.startswith("gemma4")
    qwen = family.startswith(("qwen3_next", "qwen3_5"))
    if gemma or (qwen and not name.endswith("linear_attn.norm.weight")):
        return 0.3 * noise
    return 1.0 + 0.1 * noise


def _randomise(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Fill every parameter from one seeded generator, in the order of the parameters' names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scales = [pair for pair in model.named_buffers() if pair[0].endswith("layer_scalar")]
    for name, weight in sorted([*model.named_parameters(), *scales]):
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(_parameter(name, noise, model.config.model_type, scale))


def _by_hand(config: PreTrainedConfig, seed: int, scale: float) -> dict[str, np.ndarray]:
    """The tensors of a Llama or Mistral without biases, as Hugging Face names and stores them."""
    D, F = config.hidden_size, config.intermediate_size
    K = config.head_dim or D // config.num_attention_heads
    HK, GK = config.num_attention_heads * K, config.num_key_value_heads * K
    shapes = {"model.embed_tokens.weight": (config.vocab_size, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    for layer in range(config.num_hidden_layers):
        block = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (HK, D),
            "self_attn.k_proj": (GK, D),
            "self_attn.v_proj": (GK, D),
            "self_attn.o_proj": (D, HK),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    rng = np.random.default_rng(seed)
    return {
        name: _parameter(name, rng.standard_normal(shape), "llama", scale).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def _shard_size(model: PreTrainedModel, shards: int) -> int:
    """A max_shard_size in bytes that splits the model into exactly `shards` files."""
    state = model.state_dict()
    total = sum(p.numel() * p.element_size() for p in model.parameters())  # tied ones once
    size = math.ceil(total / shards)
    while size <= total:
        split = split_torch_state_dict_into_shards(state, max_shard_size=size)
        found = len(split.filename_to_tensors)
        if found == shards:
            return size
        if found < shards:
            break
        size += max(1, size // 100)
    raise ValueError(f"shards={shards}: no shard size cuts these {len(state)} tensors into that")


def _save_hf(
    path: Path,
    architecture: str,
    fields: dict[str, Any],
    generation: GenerationConfig,
    seed: int,
    shards: int,
    dtype: str,
    scale: float,
) -> None:
    """Save Hugging Face's model of these fields with random parameters."""
    import torch

    model_class = getattr(transformers, FAMILIES[architecture][0])
    if architecture in INSIDE:
        own = {name: fields.pop(name) for name in INSIDE[architecture]}
        fields = {"text_config": fields, **own}
    config = model_class.config_class(**fields)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    _randomise(model, seed, scale)
    model = model.to(getattr(torch, dtype)).eval()
    model.generation_config = generation
    limit = {} if shards == 1 else {"max_shard_size": _shard_size(model, shards)}
    model.save_pretrained(str(path), **limit)


def _save_by_hand(
    path: Path,
    architecture: str,
    fields: dict[str, Any],
    generation: GenerationConfig,
    seed: int,
    shards: int,
    dtype: str,
    scale: float,
) -> None:
    """The same files without PyTorch; a test of another model is skipped."""
    biases = fields.get("attention_bias") or fields.get("mlp_bias")
    if architecture not in ("llama", "mistral") or biases or (shards, dtype) != (1, "float32"):
        pytest.skip("this tiny model is made by PyTorch")
    class_name = FAMILIES[architecture][0]
    config = AutoConfig.for_model(architecture, **fields, architectures=[class_name], dtype=dtype)
    save_file(_by_hand(config, seed, scale), path / "model.safetensors")
    config.save_pretrained(str(path))
    generation.save_pretrained(str(path))


def write_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "float32",
    init_scale: float = 1.5,
    architecture: str = "llama",
    **config_overrides: Any,
) -> Path:
    """Save a tiny random model of a family, its tokenizer and generation_config; return `path`.

    `config_overrides` are fields of the Hugging Face config, in its present names or the older
    `rope_theta` / `rope_scaling`. A bfloat16 or float16 checkpoint is the float32 one, rounded.
    """
    if architecture not in FAMILIES:
        raise ValueError(f"architecture={architecture!r}: expected one of {sorted(FAMILIES)}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(path)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    fields |= copy.deepcopy(FAMILIES[architecture][1]) | copy.deepcopy(config_overrides)
    generation = GenerationConfig(
        bos_token_id=fields["bos_token_id"],
        eos_token_id=fields["eos_token_id"],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    save = _save_hf if importlib.util.find_spec("torch") else _save_by_hand
    save(path, architecture, fields, generation, seed, shards, dtype, init_scale)
    return path


def hf_model(path: str | Path, dtype: Any = "float32") -> PreTrainedModel:
    """The checkpoint as Hugging Face loads it, in eval mode with plain (eager) attention."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()
