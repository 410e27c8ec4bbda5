"""Qwen 1.8B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/qwen_1_8b_chat.py --workdir=DIR
Needs: 3.7 GB of weights in bfloat16; one 80 GB GPU or TPU v5e chip (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 15 of 24; bypass -4.415, induce 1.641, KL 0.077 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.921 / 2.938 / 3.259, Alpaca 1.779 / 1.784 / 2.038, own replies 0.284 /
0.293 / 0.586.
The published run: position -2, layer 15; 12 of 120 candidates pass; bypass -5.057, induce
1.651, KL 0.066. Not refused there: JailbreakBench 30% unedited, 99% ablated, 97% subtracted;
harmless 97% unedited, 2% added. Its runner-up is (-1, 15), the cell of the paper, 0.035 nats
behind: which of the two wins is chance.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="Qwen/Qwen-1_8B-Chat",
            template="paper/qwen",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
