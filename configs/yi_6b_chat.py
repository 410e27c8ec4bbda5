"""Yi 6B Chat, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/yi_6b_chat.py --workdir=DIR
Needs: 12.1 GB of weights in bfloat16; one 80 GB GPU or two TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7, run in float16; not reproduced here yet): position -5,
layer 20 of 32; bypass -6.693, induce 1.968, KL 0.046 nats. Losses unedited / ablated / added,
in nats a token: Pile 2.019 / 2.017 / 2.205, Alpaca 1.889 / 1.882 / 2.078, own replies 0.277 /
0.311 / 0.731.
The published run: position -5, layer 20; 7 of 192 candidates pass; bypass -6.748, induce
1.639, KL 0.047. Not refused there: JailbreakBench 38% unedited, 98% ablated, 98% subtracted;
harmless 95% unedited, 12% added.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="01-ai/Yi-6B-Chat",
            template="paper/yi",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
