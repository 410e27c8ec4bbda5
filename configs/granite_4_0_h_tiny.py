"""Granite 4.0 H Tiny: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/granite_4_0_h_tiny.py --workdir=DIR
Needs: 6.94 billion weights of 2 bytes are 13.9 GB: one GPU of 80 GB or two TPU v5e chips of 16 GB
(--config.mesh.model=2; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Nine Mamba-2 layers to one of attention, without positions;
experts, of which a token uses 6 of 64 and the one that sees every token.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="ibm-granite/granite-4.0-h-tiny", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
