"""Qwen3 30B-A3B Instruct 2507: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/qwen3_30b_a3b_instruct.py --workdir=DIR
Needs: 30.53 billion weights of 2 bytes are 61.1 GB: one GPU of 80 GB or eight TPU v5e chips of 16
GB (--config.mesh.model=8; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. All experts have to be there, though a token uses 8 of 128. This
one does not think.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="Qwen/Qwen3-30B-A3B-Instruct-2507", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
