"""Seed-OSS 36B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/seed_oss_36b_instruct.py --workdir=DIR
Needs: 36.15 billion weights of 2 bytes are 72.3 GB: two GPUs of 80 GB or eight TPU v5e chips of 16
GB (--config.mesh.model=8; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. A thinking model, whose replies may begin with a budget for
thinking: see what a refusal begins with before you trust a score.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="ByteDance-Seed/Seed-OSS-36B-Instruct", dtype="bfloat16"),
        mesh=MeshConfig(model=2),
        data=DataConfig(source="paper"),
    )
