"""Mistral Small 3 24B Instruct: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/mistral_small_24b_instruct.py --workdir=DIR
Needs: 23.57 billion weights of 2 bytes are 47.1 GB: one GPU of 80 GB or eight TPU v5e chips of 16
GB (--config.mesh.model=8; estimated, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. Without a system turn its template writes one with today's date,
and a run of another day would be another run: so there is one here.
"""

from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            source="mistralai/Mistral-Small-24B-Instruct-2501",
            dtype="bfloat16",
            system="You are a helpful assistant.",
        ),
        data=DataConfig(source="paper"),
    )
