"""AWQ, as AutoAWQ's GEMM layout has it: 4 bits, with a scale and a zero for groups of inputs.

Letters: O outputs, I inputs, G groups of inputs. qweight [I, O / 8], qzeros [G, O / 8] hold eight
outputs in a word of 32 bits, and scales [G, O]. A weight [O, I] is (codes - zeros) * scales.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jax_refusal.checkpoints.quantised.codes import SCALES, blocks, scaled, turned, unpacked
from jax_refusal.checkpoints.quantised.config import Fields, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import Tensor

BITS = 4
EACH = 8  # numbers of a word
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of outputs in their order
PART = re.compile(r"(.*)(\.qweight|\.qzeros|\.scales)")
DTYPES = {".qweight": {"I32"}, ".qzeros": {"I32"}, ".scales": set(SCALES)}


def read(given: Mapping[str, Any], vouched: Collection[str]) -> Format:
    fields = Fields(given, vouched)
    fields.one_of("bits", "w_bit", of=(BITS,), default=BITS)
    fields.one_of("zero_point", of=(True,), default=True)
    fields.one_of("version", "format", of=("gemm",), default="gemm")
    group = fields.size("group_size", "q_group_size", default=128)
    if given.get("backend") == "llm-awq":
        fields.wrong(("backend",), "llm-awq", "supported: those of AutoAWQ's layout")
    fields.without_effect(
        """backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config sym desc_act tokenizer
        dataset damp_percent act_group_aware true_sequential meta model_seqlen batch_size
        block_name_to_quantize module_name_preceding_first_block pad_token_id max_input_length
        cache_block_outputs modules_in_block_to_quantize lm_head"""
    )
    refuse("AWQ", fields.finish())
    return Format(
        label="AWQ (4 bits)",
        part=PART,
        whole=".weight",
        dtypes=DTYPES,
        build=partial(_build, group),
    )


def _build(group: int, parts: Parts) -> Tensor:
    qweight, qzeros, scales = parts.need(*DTYPES)
    if len(qweight.shape) != 2:
        raise ValueError(f"its .qweight has shape {qweight.shape}, not [inputs, outputs / {EACH}]")
    I, words = qweight.shape
    size = I if group == -1 else group
    G, O = blocks(I, size), EACH * words
    parts.fit({".qzeros": (G, words), ".scales": (G, O)})
    codes, zeros = (unpacked(each, BITS, 1, O, places=PLACES) for each in (qweight, qzeros))
    return scaled(turned(codes), turned(scales), (1, size), zeros=turned(zeros))
