"""Gemma 4 E4B it: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/gemma_4_e4b_it.py --workdir=DIR
Needs: 7.45 billion weights of 2 bytes are 14.9 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. The text model of a multimodal checkpoint, with inputs for each
layer: what they add to the stream is edited with mlp_out. As for gemma_4_12b_it.py otherwise.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="google/gemma-4-E4B-it", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
