"""Llama-3 8B Instruct, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/llama_3_8b_instruct.py --workdir=DIR
Needs: 16.1 GB of weights in bfloat16; one 80 GB GPU or two TPU v5e chips (estimated from that,
not measured).
Expect (the paper's tables 5 and 7; not reproduced here yet): position -5, layer 12 of 32;
bypass -9.715, induce 7.681, KL 0.064 nats. Losses unedited / ablated / added, in nats a token:
Pile 2.348 / 2.362 / 2.469, Alpaca 1.912 / 1.944 / 1.912, own replies 0.195 / 0.213 / 0.441.
The published run: position -5, layer 12; 25 of 160 candidates pass; bypass -9.855, induce
7.676, KL 0.059. Not refused there: JailbreakBench 5% unedited, 100% ablated, 99% subtracted;
harmless 99% unedited, 0% added. It was made with a stray quote and a second <|begin_of_text|>
in front, and so is this one.
Without them: --config.model.template=paper/llama-3@fixed
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="meta-llama/Meta-Llama-3-8B-Instruct",
            template="paper/llama-3@published",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
