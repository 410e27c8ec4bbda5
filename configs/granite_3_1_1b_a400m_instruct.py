"""Granite 3.1 1B-A400M Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/granite_3_1_1b_a400m_instruct.py --workdir=DIR
Needs: 1.33 billion weights of 2 bytes are 2.7 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. A mixture of experts, of which a token uses 8 of 32.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="ibm-granite/granite-3.1-1b-a400m-instruct", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
