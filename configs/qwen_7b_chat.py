"""Qwen 7B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/qwen_7b_chat.py --workdir=DIR
Needs: 15.4 GB of weights in bfloat16; one 80 GB GPU or two TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 17 of 32; bypass -5.355, induce 1.107, KL 0.069 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.259 / 2.277 / 2.388, Alpaca 1.615 / 1.631 / 1.697, own replies 0.242 /
0.278 / 0.479.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="Qwen/Qwen-7B-Chat",
            template="paper/qwen",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
