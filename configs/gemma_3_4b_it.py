"""Gemma 3 4B it: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/gemma_3_4b_it.py --workdir=DIR
Needs: 3.88 billion weights of 2 bytes are 7.8 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. The text model of a multimodal checkpoint.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="google/gemma-3-4b-it", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
