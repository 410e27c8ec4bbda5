"""Gemma 2 9B it: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/gemma_2_9b_it.py --workdir=DIR
Needs: 9.24 billion weights of 2 bytes are 18.5 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="google/gemma-2-9b-it", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
