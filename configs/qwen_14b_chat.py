"""Qwen 14B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/qwen_14b_chat.py --workdir=DIR
Needs: 28.3 GB of weights in bfloat16; one 80 GB GPU or four TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 23 of 40; bypass -5.085, induce 1.606, KL 0.014 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.070 / 2.078 / 2.230, Alpaca 1.602 / 1.606 / 1.713, own replies 0.212 /
0.218 / 0.443.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="Qwen/Qwen-14B-Chat",
            template="paper/qwen",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
