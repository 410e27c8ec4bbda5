"""EXAONE 4.0 1.2B: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/exaone_4_0_1_2b.py --workdir=DIR
Needs: 1.28 billion weights of 2 bytes are 2.6 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. A thinking model: prompts end after the empty think block, where
the answer starts. Its blocks norm what they write, so a direction is ablated while the model runs;
weights are edited only on request, nearly (launch.convert with approximate).
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="LGAI-EXAONE/EXAONE-4.0-1.2B", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
