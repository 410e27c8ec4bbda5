"""Qwen3.5 35B-A3B: the study of the paper, on a model that is not in it.

Command: python -m launch.run --config=configs/qwen3_5_35b_a3b.py --workdir=DIR
Needs: 34.66 billion weights of 2 bytes are 69.3 GB: two GPUs of 80 GB or eight TPU v5e chips of 16
GB (--config.mesh.model=8; reckoned, not measured).
Expect: the paper has no number of it, and it was not run here. The prompts are the paper's, the
template is the tokenizer's own. The text model of a multimodal checkpoint: three layers of linear
attention to one of softmax attention, and experts, of which a token uses 8 of 256 and the one that
sees every token. A thinking model: prompts end after the empty think block, where the answer
starts.
"""

from jax_refusal.config import DataConfig, MeshConfig, ModelConfig, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source="Qwen/Qwen3.5-35B-A3B", dtype="bfloat16"),
        mesh=MeshConfig(model=2),
        data=DataConfig(source="paper"),
    )
