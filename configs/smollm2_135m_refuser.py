"""SmolLM2-135M-Instruct, the chat model that comes inside a Python package: the demo.

Command: python -m launch.run --config=configs/smollm2_135m_refuser.py --workdir=runs/demo
"""

from jax_refusal.config import DataConfig, GenerateConfig, ModelConfig, RunConfig, SelectionConfig
from jax_refusal.sources import SMOLLM2


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=SMOLLM2),
        data=DataConfig(source="builtin", n_train=64, n_val=32, n_test=32, filter=False),
        selection=SelectionConfig(fallback="least_bad"),
        generate=GenerateConfig(max_new_tokens=64),
    )
