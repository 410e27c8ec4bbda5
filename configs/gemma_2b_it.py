"""Gemma 2B it, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/gemma_2b_it.py --workdir=DIR
Needs: 5.0 GB of weights in bfloat16; one 80 GB GPU or TPU v5e chip (estimated from that,
not measured).
Expect (the paper's tables 5 and 7; not reproduced here yet): position -2, layer 10 of 18;
bypass -14.435, induce 6.709, KL 0.067 nats. Losses unedited / ablated / added, in nats a token:
Pile 3.506 / 3.489 / 3.739, Alpaca 2.090 / 2.101 / 2.179, own replies 0.254 / 0.311 / 0.853.
The published run: position -2, layer 10; 13 of 90 candidates pass; bypass -14.419, induce
6.789, KL 0.066. Not refused there: JailbreakBench 9% unedited, 100% ablated, 98% subtracted;
harmless 100% unedited, 0% added.
Its direction.pt can be compared: python -m launch.compare --one=DIR --other=direction.pt
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="google/gemma-2b-it",
            template="paper/gemma",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
