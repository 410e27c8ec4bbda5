"""Llama 3.1 8B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/llama_3_1_8b_instruct.py --workdir=DIR
Needs: 8.03 billion weights of 2 bytes are 16.1 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Its template's date is always the same one, that of data/chat.py.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
