"""OLMo 3 7B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/olmo_3_7b_instruct.py --workdir=DIR
Needs: 7.30 billion weights of 2 bytes are 14.6 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="allenai/Olmo-3-7B-Instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
