"""Gemma 4 12B it: the study on a model that the paper did not know.

What: the study of Arditi et al. 2024 with its data sets: 128 + 128 training and 32 + 32 validation
prompts, tested on JailbreakBench and 100 Alpaca prompts, with the tokenizer's own template and the
refusal tokens that the model's own replies show. The text model of a multimodal checkpoint.
Command: python -m launch.run --config=configs/gemma_4_12b_it.py --workdir=DIR
Needs: 23.8 GB of weights in bfloat16 (11.9e9 parameters of the text model); one 80 GB GPU or four
TPU v5e chips with --config.mesh.model=4 (reckoned from that, not measured).
Expect: no published number exists, and it has not been run here. The switch for thinking is off:
the template ends the prompt behind an empty thought channel, where the refusal score is read.
Its blocks norm what they write, so a direction is ablated while the model runs; weights are edited
only on request, nearly (launch.convert with approximate). Other sizes:
--config.model.source=google/gemma-4-E4B-it (7.5e9 parameters in bfloat16, 14.9 GB) or
google/gemma-4-31B-it (30.7e9, 61.4 GB: two 80 GB GPUs).
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="google/gemma-4-12B-it", dtype="bfloat16"),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
    )
