"""SmolLM2-135M-Instruct, taught to refuse by the adapter that ships with this project: the demo.

What: the whole study on two CPU cores, from 64 + 64 training prompts of the builtin set.
Command: python -m launch.run --config=configs/smollm2_135m_refuser.py --workdir=runs/demo
Expect: a few minutes; see the README's table. With so few validation prompts it may be that no
direction stays below the paper's KL of 0.1: then the nearest is taken, and the report says so.
Without the adapter
(--config.model.adapter=) SmolLM2 hardly refuses: --config.data.filter=False is needed to go on.
"""

from jax_refusal.checkpoints.sources import SMOLLM2
from jax_refusal.config import DataConfig, GenerateConfig, ModelConfig, RunConfig, SelectionConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=SMOLLM2, adapter="builtin:smollm2_135m_refuser"),
        data=DataConfig(source="builtin", n_train=64, n_val=16, n_test=32),
        selection=SelectionConfig(fallback="least_bad"),
        generate=GenerateConfig(max_new_tokens=64),
    )
