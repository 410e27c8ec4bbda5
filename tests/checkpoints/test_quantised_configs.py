"""What a config says of quantisation: read, or refused before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest

import jax_refusal as jr
from jax_refusal.checkpoints.quantised.registry import quantisation
from jax_refusal.models.spec import UnsupportedModel
from tests.checkpoints.packing import CASES, of_compressed

WHAT_TO_DO = "unquantised checkpoint"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
AWQ, GPTQ, BNB = (CASES[case][0] for case in ("awq", "gptq", "bitsandbytes nf4"))

CONFIGS: dict[str, tuple[Any, list[str]]] = {
    **{
        method: ({"quant_method": method, "bits": 4}, [f"quant_method='{method}'", "'gptq'"])
        for method in """hqq aqlm exl2 torchao fbgemm_fp8 quanto spqr vptq higgs eetq quark bitnet
        nvfp4 auto-round modelopt marlin gguf""".split()
    },
    "no method": ({"bits": 4}, ["quant_method=None"]),
    "a list for a method": ({"quant_method": ["gptq"]}, ["quant_method=['gptq']"]),
    "no object": ("gptq", ["says of quantisation 'gptq'"]),
    "mxfp4 of another family": ({"quant_method": "mxfp4"}, ["read of gpt_oss, not of llama"]),
    "awq of another layout": ({**AWQ, "version": "gemv"}, ["version='gemv' (supported: ['gemm'])"]),
    "awq of llm-awq": ({**AWQ, "backend": "llm-awq"}, ["backend='llm-awq'"]),
    "awq without zeros": ({**AWQ, "zero_point": False}, ["zero_point=False"]),
    "awq of 8 bits": ({**AWQ, "bits": 8}, ["bits=8 (supported: [4])"]),
    "gptq of 3 bits": ({**GPTQ, "bits": 3}, ["bits=3 (supported: [4, 8])"]),
    "gptq of true bits": ({**GPTQ, "bits": True}, ["bits=True"]),
    "gptq without bits": ({**GPTQ, "bits": None}, ["bits=None"]),
    "gptq in marlin's layout": ({**GPTQ, "checkpoint_format": "marlin"}, ["format='marlin'"]),
    "gptq in old marlin's": ({**GPTQ, "is_marlin_format": True}, ["is_marlin_format=True"]),
    "gptq with other bits somewhere": (
        {**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}},
        ["dynamic={'+:.*down.*'"],
    ),
    "gptq of no group": ({**GPTQ, "group_size": 0}, ["group_size=0"]),
    "an unknown field": (
        {**GPTQ, "twist": 1},
        ["twist=1", "model.ignore_config_fields as quantization_config.twist"],
    ),
    "several faults": ({**GPTQ, "bits": 3, "group_size": -7}, ["bits=3", "group_size=-7"]),
    "bitsandbytes of no bits": ({"quant_method": "bitsandbytes"}, ["load_in_4bit=False"]),
    "bitsandbytes of another table": (
        {**BNB, "bnb_4bit_quant_type": "int4"},
        ["bnb_4bit_quant_type='int4'"],
    ),
    "fp8 of another kind": ({"quant_method": "fp8", "fmt": "e3m4"}, ["fmt='e3m4'"]),
    "fp8 of no block": ({"quant_method": "fp8", "weight_block_size": [128]}, ["[128]"]),
    "packed experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, ["expert_dtype='fp4'"]),
    "compressed, sparse": (
        {
            **of_compressed("pack-quantized", INT4),
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        ["sparsity_config="],
    ),
    "compressed, rotated": (
        {**of_compressed("pack-quantized", INT4), "transform_config": {"config_groups": {"u": {}}}},
        ["transform_config="],
    ),
    **{
        form: (of_compressed(form, INT4), [f"format='{form}'"])
        for form in ("marlin-24", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense")
    },
    "compressed, 3 bits": (
        of_compressed("pack-quantized", {**INT4, "num_bits": 3}),
        ["config_groups.group_0.weights.num_bits=3 (supported: [4, 8])"],
    ),
    "compressed, 4-bit floats": (
        of_compressed("pack-quantized", {**INT4, "type": "float"}),
        ["num_bits=4 (supported: [8])"],
    ),
    "compressed, a strategy": (
        of_compressed("pack-quantized", {**INT4, "strategy": "tensor_group"}),
        ["strategy='tensor_group'"],
    ),
    "compressed, no group size": (
        of_compressed("pack-quantized", {"num_bits": 4, "strategy": "group"}),
        ["group_size=0"],
    ),
    "compressed, only activations": (of_compressed("pack-quantized"), ["says nothing of weights"]),
    "compressed, groups by a preset": (
        {**of_compressed("pack-quantized"), "config_groups": {"W4A16": ["Linear"]}},
        ["config_groups="],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_read_is_refused_by_the_config(
    name: str, tiny_dir: Path, tmp_path: Path
) -> None:
    """There is no file of weights to look into."""
    given, words = CONFIGS[name]
    config = json.loads((tiny_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
    with pytest.raises(UnsupportedModel) as error:
        jr.load_model(str(tmp_path))
    for word in [*words, WHAT_TO_DO]:
        assert word in str(error.value)


def test_a_field_that_the_user_vouches_for() -> None:
    config = {"model_type": "llama", "quantization_config": {**GPTQ, "twist": 1}}
    assert quantisation(config, ("quantization_config.twist",)) is not None


def test_a_text_model_inside_and_the_older_name() -> None:
    for config in ({"text_config": {"quantization_config": AWQ}}, {"compression_config": AWQ}):
        found = quantisation(config)
        assert found is not None and found.label == "AWQ (4 bits)"
    with pytest.raises(UnsupportedModel, match="not one object"):
        quantisation({"quantization_config": AWQ, "text_config": {"quantization_config": GPTQ}})
    assert quantisation({"quantization_config": None, "text_config": None}) is None
