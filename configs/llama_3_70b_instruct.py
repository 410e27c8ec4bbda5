"""Llama-3 70B Instruct, as the paper ran it.

What: the study of Arditi et al. 2024: 128 + 128 training and 32 + 32 validation prompts,
tested on JailbreakBench and 100 Alpaca prompts, with the paper's template and refusal tokens.
Command: python -m launch.run --config=configs/llama_3_70b_instruct.py --workdir=DIR
Needs: 141 GB of weights in bfloat16; four 80 GB GPUs (estimated from that, not measured), or 16
TPU v5e chips with --config.mesh.model=16: 11.2 of 15.75 GiB a chip by the TPU compiler
(docs/slices.md), not run.
Expect (the paper's tables 5 and 7; not reproduced here yet): position -5, layer 25 of 80;
bypass -7.839, induce 0.126, KL 0.021 nats. Losses unedited / ablated / added, in nats a token:
Pile 2.121 / 2.117 / 2.274, Alpaca 1.980 / 1.978 / 1.928, own replies 0.116 / 0.126 / 0.265.
The published 8B run had a stray quote and a second <|begin_of_text|> in front; no 70B run
was published, and this takes it to be the same.
Without them: --config.model.template=paper/llama-3@fixed
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="meta-llama/Meta-Llama-3-70B-Instruct",
            template="paper/llama-3@published",
            dtype="bfloat16",
        ),
        mesh=MeshConfig(model=4),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="paper"),
    )
