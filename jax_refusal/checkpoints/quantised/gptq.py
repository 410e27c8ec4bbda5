"""GPTQ: 4 or 8 bits, with a scale and a zero for groups of inputs, in order or by `g_idx`.

Letters: O outputs, I inputs, G groups of inputs, N numbers in a word of 32 bits. qweight [I / N, O]
holds N inputs in a word, qzeros [G, O / N] N outputs; scales [G, O], g_idx [I]. A weight [O, I] is
(codes - zeros) * scales. The first version of the format stores zeros less one.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jax_refusal.checkpoints.quantised.codes import (
    SCALES,
    WORD,
    blocks,
    scaled,
    turned,
    unpacked,
    whole,
)
from jax_refusal.checkpoints.quantised.config import Fields, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import Tensor

PART = re.compile(r"(.*)(\.qweight|\.qzeros|\.scales|\.g_idx)")
DTYPES = {
    ".qweight": {"I32"},
    ".qzeros": {"I32"},
    ".scales": set(SCALES),
    ".g_idx": {"I32", "I64"},
}
# Of AutoGPTQ, GPTQModel, optimum and AutoRound: how the codes were found, and how they may be run.
HOW = """
    sym static_groups true_sequential damp_percent damp_auto_increment lm_head meta mse hyb_act
    act_group_aware model_name_or_path model_file_base_name model_seqlen tokenizer dataset backend
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize batch_size
    pad_token_id max_input_length cache_block_outputs use_cuda_fp16 use_exllama disable_exllama
    exllama_config parallel_packing offload_to_disk offload_to_disk_path compile v2 v2_alpha gptaq
    hessian fallback failsafe device vram_strategy autoround_version iters lr minmax_lr nsamples
    seqlen low_gpu_mem_usage enable_minmax_tuning enable_quanted_input scale_dtype amp
    gradient_accumulate_steps act_bits act_dynamic act_group_size act_sym act_data_type provider
    to_quant_block_names
"""


def read(given: Mapping[str, Any], vouched: Collection[str]) -> Format:
    fields = Fields(given, vouched)
    bits = fields.one_of("bits", "w_bit", of=(4, 8))
    group = fields.size("group_size", "q_group_size", default=128)
    form = fields.one_of("checkpoint_format", "format", of=("gptq", "gptq_v2"), default="gptq")
    fields.one_of("pack_dtype", of=("int32",), default="int32")
    fields.one_of("data_type", of=("int",), default="int")
    by_activation = fields.one_of("desc_act", of=(True, False), default=False)
    fields.empty("is_marlin_format", "awq_gemm_checkpoint", "rotation", "adapter")
    dynamic = fields.get("dynamic", default={})
    if not isinstance(dynamic, Mapping) or not all(key.startswith("-:") for key in dynamic):
        fields.wrong(("dynamic",), dynamic, "supported: modules that are left out, as '-:NAME'")
    fields.without_effect(HOW)
    refuse("GPTQ", fields.finish())
    return Format(
        label=f"GPTQ ({bits} bits)",
        part=PART,
        whole=".weight",
        dtypes=DTYPES,
        build=partial(_build, bits, group, form == "gptq", by_activation),
        zero_biases=True,  # AutoGPTQ's
    )


def _build(bits: int, group: int, less_one: bool, by_activation: bool, parts: Parts) -> Tensor:
    qweight, qzeros, scales = parts.need(".qweight", ".qzeros", ".scales")
    each = WORD // bits
    if len(qweight.shape) != 2:
        raise ValueError(f"its .qweight has shape {qweight.shape}, not [inputs / {each}, outputs]")
    I, O = qweight.shape[0] * each, qweight.shape[1]
    size = I if group == -1 else group
    G = blocks(I, size)
    parts.fit({".qzeros": (G, blocks(O, each)), ".scales": (G, O), ".g_idx": (I,)})
    if by_activation and G > 1:
        parts.need(".g_idx")
    groups = None
    if ".g_idx" in parts:
        groups = whole(parts[".g_idx"])
        if groups.min() < 0 or groups.max() >= G:
            raise ValueError(f"its .g_idx names groups {groups.min()} to {groups.max()} of {G}")
    # The one is added to whole words, as GPTQModel does: what it took from a zero of 0 was taken
    # from the next one too.
    ones = sum(1 << (bits * place) for place in range(each)) if less_one else 0
    codes = unpacked(qweight, bits, 0, I)
    zeros = unpacked(qzeros, bits, 1, O, plus=ones)
    return scaled(turned(codes), turned(scales), (1, size), zeros=turned(zeros), groups=groups)
