"""Mistral 7B Instruct v0.3: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/mistral_7b_instruct.py --workdir=DIR
Needs: 7.25 billion weights of 2 bytes are 14.5 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
