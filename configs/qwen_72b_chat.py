"""Qwen 72B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/qwen_72b_chat.py --workdir=DIR
Needs: 145 GB of weights in bfloat16; four 80 GB GPUs or 16 TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 62 of 80; bypass -4.246, induce 1.885, KL 0.034 nats. Losses unedited / ablated / added,
in nats a token: Pile 1.944 / 1.971 / 2.097, Alpaca 1.740 / 1.768 / 2.124, own replies 0.147 /
0.162 / 0.380.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="Qwen/Qwen-72B-Chat",
            template="paper/qwen",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=4),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
