"""Phi-3 mini Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/phi_3_mini_instruct.py --workdir=DIR
Needs: 3.82 billion weights of 2 bytes are 7.6 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="microsoft/Phi-3-mini-4k-instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
