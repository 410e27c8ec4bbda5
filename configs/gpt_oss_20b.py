"""gpt-oss-20b, read where its final answer starts.

What: the study of Arditi et al. 2024 on a mixture of experts that thinks: 128 + 128 training and 32
+ 32 validation prompts, tested on JailbreakBench and 100 Alpaca prompts. Its own template, with
the channel of final answers opened, so that the model answers without thinking first; the date in
it is fixed. The refusal tokens are those that it is found to begin its refusals with.
Command: python -m launch.run --config=configs/gpt_oss_20b.py --workdir=DIR
Needs: a download of 13.8 GB, whose MXFP4 experts become numbers: 41.8 GB of weights in bfloat16.
One 80 GB GPU, or four TPU v5e chips with --config.mesh.model=4; while it loads the host holds one
kind of leaf at a time, at most 12.7 GB (all estimated, not measured).
Expect: nothing yet. No number is published for this model, and it has not been run here.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RefusalConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="openai/gpt-oss-20b", dtype="bfloat16"),
        mesh=MeshConfig(model=1),
        data=DataConfig(source="paper"),
        refusal=RefusalConfig(source="discovered"),
    )
