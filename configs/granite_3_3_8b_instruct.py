"""Granite 3.3 8B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/granite_3_3_8b_instruct.py --workdir=DIR
Needs: 8.17 billion weights of 2 bytes are 16.3 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="ibm-granite/granite-3.3-8b-instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
