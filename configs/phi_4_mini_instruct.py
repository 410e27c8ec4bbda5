"""Phi-4-mini Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/phi_4_mini_instruct.py --workdir=DIR
Needs: 3.84 billion weights of 2 bytes are 7.7 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Prompts and replies of more than 4096 tokens are refused: longrope
turns differently there.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="microsoft/Phi-4-mini-instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
