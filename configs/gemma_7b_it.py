"""Gemma 7B it, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/gemma_7b_it.py --workdir=DIR
Needs: 17.1 GB of weights in bfloat16; one 80 GB GPU or two TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7; not reproduced here yet): position -1, layer 14 of 28;
bypass -12.239, induce 6.851, KL 0.091 nats. Losses unedited / ablated / added, in nats a token:
Pile 5.975 / 5.963 / 6.051, Alpaca 2.336 / 2.335 / 2.356, own replies 0.201 / 0.228 / 0.656.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="google/gemma-7b-it",
            template="paper/gemma",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
