"""Qwen3-Next 80B-A3B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/qwen3_next_80b_a3b_instruct.py --workdir=DIR
Needs: 79.67 billion weights of 2 bytes are 159.3 GB: four GPUs of 80 GB or 16 TPU v5e chips of 16
GB (--config.mesh.model=16; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Three layers of linear attention to one of softmax attention; all
experts have to be there, though a token uses 10 of 512 and the one that sees every token. This one
does not think.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="Qwen/Qwen3-Next-80B-A3B-Instruct", dtype="bfloat16"),
        mesh=MeshConfig(model=4),
        data=DataConfig(source="paper"),
    )
