"""Llama-2 70B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/llama_2_70b_chat.py --workdir=DIR
Needs: 138 GB of weights in bfloat16; four 80 GB GPUs or 16 TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 21 of 80; bypass -4.565, induce 5.191, KL 0.036 nats. Losses unedited / ablated / added,
in nats a token: Pile 1.970 / 1.969 / 2.010, Alpaca 1.657 / 1.659 / 1.630, own replies 0.067 /
0.070 / 0.169.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="meta-llama/Llama-2-70b-chat-hf",
            template="paper/llama-2",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=4),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
