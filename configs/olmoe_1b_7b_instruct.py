"""OLMoE 1B-7B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/olmoe_1b_7b_instruct.py --workdir=DIR
Needs: 6.92 billion weights of 2 bytes are 13.8 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. All experts have to be there, though a token uses 8 of 64.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="allenai/OLMoE-1B-7B-0924-Instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
