"""Mistral Nemo Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/mistral_nemo_instruct.py --workdir=DIR
Needs: 12.25 billion weights of 2 bytes are 24.5 GB: one GPU of 80 GB or four TPU v5e chips of 16 GB
(--config.mesh.model=4; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="mistralai/Mistral-Nemo-Instruct-2407", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
