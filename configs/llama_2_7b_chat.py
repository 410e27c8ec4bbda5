"""Llama-2 7B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/llama_2_7b_chat.py --workdir=DIR
Needs: 13.5 GB of weights in bfloat16; one 80 GB GPU or two TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -1,
layer 14 of 32; bypass -5.295, induce 5.941, KL 0.073 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.220 / 2.214 / 2.333, Alpaca 1.609 / 1.586 / 1.584, own replies 0.118 /
0.126 / 0.460.
The published run: position -1, layer 14; 5 of 192 candidates pass; bypass -5.617, induce
5.986, KL 0.071. Not refused there: JailbreakBench 3% unedited, 93% ablated, 97% subtracted;
harmless 99% unedited, 0% added.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="meta-llama/Llama-2-7b-chat-hf",
            template="paper/llama-2",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
