"""Yi 34B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/yi_34b_chat.py --workdir=DIR
Needs: 68.8 GB of weights in bfloat16; two 80 GB GPUs or eight TPU v5e chips (estimated from
that, not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 37 of 60; bypass -11.14, induce 1.865, KL 0.069 nats. Losses unedited / ablated / added,
in nats a token: Pile 1.862 / 1.872 / 2.002, Alpaca 1.971 / 2.008 / 2.066, own replies 0.191 /
0.259 / 0.680.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="01-ai/Yi-34B-Chat",
            template="paper/yi",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=2),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
