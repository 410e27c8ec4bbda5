"""SmolLM3 3B: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/smollm3_3b.py --workdir=DIR
Needs: 3.08 billion weights of 2 bytes are 6.2 GB: one GPU of 80 GB or one TPU v5e chip of 16 GB
(estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. A thinking model: prompts end after the empty think block, where
the answer starts.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="HuggingFaceTB/SmolLM3-3B", dtype="bfloat16"),
        data=DataConfig(source="paper"),
    )
