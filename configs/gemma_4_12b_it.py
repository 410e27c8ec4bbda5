"""Gemma 4 12B it: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/gemma_4_12b_it.py --workdir=DIR
Needs: 11.9 billion weights of 2 bytes are 23.8 GB: one GPU of 80 GB or four TPU v5e chips of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. The text model of a multimodal checkpoint. The switch for thinking
is off: the prompt ends behind an empty thought channel, where the refusal score is read. Its blocks
norm what they write, so a direction is ablated while the model runs; weights are edited only on
request, nearly (launch.convert with approximate).
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="google/gemma-4-12B-it", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
