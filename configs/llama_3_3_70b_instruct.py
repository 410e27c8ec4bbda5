"""Llama 3.3 70B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/llama_3_3_70b_instruct.py --workdir=DIR
Needs: 70.55 billion weights of 2 bytes are 141 GB: four GPUs of 80 GB or 16 TPU v5e chips of 16 GB
(--config.mesh.model=16; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Its template's date is always the same one, that of data/chat.py.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="meta-llama/Llama-3.3-70B-Instruct", dtype="bfloat16"),
        mesh=MeshConfig(model=4),
        data=DataConfig(source="paper"),
    )
