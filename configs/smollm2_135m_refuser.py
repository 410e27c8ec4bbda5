"""SmolLM2-135M-Instruct, the chat model that comes inside a Python package: the demo.

What: the whole study on two CPU cores, from 64 + 64 training prompts of the builtin set.
Command: python -m launch.run --config=configs/smollm2_135m_refuser.py --workdir=runs/demo
Expect: a few minutes; 0 to 10% refused whatever the edit. SmolLM2 was not trained to refuse, so no
candidate passes the paper's thresholds and the nearest one is taken (selection.fallback). With an
adapter that teaches it to refuse (launch.train_organism), set model.adapter, data.filter=True and
selection.fallback="error".
"""

from jax_refusal.config import DataConfig, GenerateConfig, ModelConfig, RunConfig, SelectionConfig
from jax_refusal.sources import SMOLLM2


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=SMOLLM2),
        data=DataConfig(source="builtin", n_train=64, n_val=16, n_test=32, filter=False),
        selection=SelectionConfig(fallback="least_bad"),
        generate=GenerateConfig(max_new_tokens=64),
    )
