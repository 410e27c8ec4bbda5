"""Ministral 3 3B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/ministral_3_3b_instruct.py --workdir=DIR
Needs: 3.43 billion weights of 2 bytes are 6.9 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. The text model of a multimodal checkpoint. (The one without BF16 in
its name has 8-bit weights, which are refused.)
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="mistralai/Ministral-3-3B-Instruct-2512-BF16", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
