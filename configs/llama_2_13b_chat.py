"""Llama-2 13B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/llama_2_13b_chat.py --workdir=DIR
Needs: 26.0 GB of weights in bfloat16; one 80 GB GPU or four TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 26 of 40; bypass -4.377, induce 2.794, KL 0.092 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.082 / 2.087 / 2.325, Alpaca 1.563 / 1.591 / 1.642, own replies 0.102 /
0.116 / 0.336.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="meta-llama/Llama-2-13b-chat-hf",
            template="paper/llama-2",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
