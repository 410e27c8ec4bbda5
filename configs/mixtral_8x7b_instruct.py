"""Mixtral 8x7B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/mixtral_8x7b_instruct.py --workdir=DIR
Needs: 46.70 billion weights of 2 bytes are 93.4 GB: two GPUs of 80 GB or 16 TPU v5e chips of 16 GB
(--config.mesh.model=16; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. All experts have to be there, though a token uses two of eight.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="mistralai/Mixtral-8x7B-Instruct-v0.1", dtype="bfloat16"),
        mesh=MeshConfig(model=2),
        data=DataConfig(source="paper"),
    )
