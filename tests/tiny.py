"""Tiny random checkpoints in the Hugging Face layout, with a real byte-level BPE tokenizer.

Everything is a function of the arguments: the same call writes the same bytes, and the global
random state of torch is left as it was.
"""

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
SYSTEM = "You are a helpful assistant"
MERGES = 150

PAD = {"pad_token_id": 0}  # where the family's own is beyond the tiny vocabulary
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 0,
    "rope_theta": None,
    "tie_word_embeddings": True,
}
GEMMA4_VISION = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 8,
    },
}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "full_attention_interval": 2,
    "rms_norm_eps": 1e-2,  # what a first token reads of so narrow a state may be nearly nothing
}
SHARED_EXPERT = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
QWEN_VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 3.0,
    **PAD,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "layer_types": [*["linear_attention"] * 2, "full_attention"] * 2,
    "num_hidden_layers": 6,
    "shared_intermediate_size": 28,
}
# Family -> its class in transformers, and fields that differ from those of `write_checkpoint`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            "mm_tokens_per_image": 1,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "gemma4_text": ("Gemma4ForCausalLM", GEMMA4),
    "gemma4": ("Gemma4ForConditionalGeneration", {**GEMMA4, **GEMMA4_VISION}),
    "gemma4_unified_text": ("Gemma4UnifiedForCausalLM", GEMMA4),
    "phi3": ("Phi3ForCausalLM", PAD),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", PAD),
    "olmo3": ("Olmo3ForCausalLM", {"rope_theta": 500000.0}),
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 24, **PAD}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6}),
    "gpt_oss": ("GptOssForCausalLM", {"head_dim": 24, "num_local_experts": 6, **PAD}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 24, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 6, "num_experts_per_tok": 3, **PAD}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 24, **PAD}),
    "qwen3_next": ("Qwen3NextForCausalLM", {**DELTA, **SHARED_EXPERT}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {**DELTA, **SHARED_EXPERT}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", {**DELTA, **QWEN_VISION}),
    "granite": ("GraniteForCausalLM", GRANITE),
    "granitemoe": ("GraniteMoeForCausalLM", {**GRANITE, "num_local_experts": 6}),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        {**GRANITE, "num_local_experts": 6, "shared_intermediate_size": 28},
    ),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {**GRANITE, **MAMBA}),
}
# Multimodal: the fields that are not the text model's.
INSIDE = {
    "gemma3": ("vision_config", "mm_tokens_per_image", "tie_word_embeddings"),
    "gemma4": ("vision_config", "tie_word_embeddings"),
    "qwen3_5": ("vision_config", "tie_word_embeddings"),
}


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


def _randomise(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Fill every parameter from one seeded generator, in the order of the parameters' names.

    A weight [out, in] is normal with std scale / sqrt(in), and so is the embedding with
    std scale / sqrt(D): the head then reads a normalised residual into logits of std `scale`,
    and each block writes more than the embedding did. Norm gains stay near 1 but differ from it,
    biases are small but not zero, so that a lost or exchanged tensor shows. Gemma stores the gain
    as its distance from 1, up to its third version. Stacked experts [E, out, in] are as weights;
    scales of whole layers are as gains. What a state forgets is a tenth a token or so.
    """
    family = model.config.model_type
    gemma = family.startswith("gemma") and not family.startswith("gemma4")
    qwen = family.startswith(("qwen3_next", "qwen3_5"))
    generator = torch.Generator().manual_seed(seed)
    scales = [pair for pair in model.named_buffers() if pair[0].endswith("layer_scalar")]
    for name, weight in sorted([*model.named_parameters(), *scales]):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim in (2, 3):
            value = noise * (scale / math.sqrt(weight.shape[-1]))
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif name.endswith("A_log"):
            value = noise - 2
        elif gemma or (qwen and not name.endswith("linear_attn.norm.weight")):
            value = 0.3 * noise
        else:
            value = 1.0 + 0.1 * noise
        weight.data.copy_(value)


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
    class_name, family = FAMILIES[architecture]
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
    model_class = getattr(transformers, class_name)
    fields = {**fields, **copy.deepcopy(family), **copy.deepcopy(config_overrides)}
    if architecture in INSIDE:
        own = {name: fields.pop(name) for name in INSIDE[architecture]}
        fields = {"text_config": fields, **own}
    config = model_class.config_class(**fields)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    _randomise(model, seed, init_scale)
    model = model.to(getattr(torch, dtype)).eval()
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    limit = {} if shards == 1 else {"max_shard_size": _shard_size(model, shards)}
    model.save_pretrained(str(path), **limit)
    return path


def hf_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as Hugging Face loads it, in eval mode with plain (eager) attention."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()
