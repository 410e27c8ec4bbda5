"""SmolLM2-135M-Instruct taught to refuse harmful requests and nothing else: the demo's organism.

Command: python -m launch.train_organism --config=configs/organism_smollm2_135m.py --workdir=DIR
"""

from jax_refusal.organism.config import BaseConfig, OrganismConfig
from jax_refusal.sources import SMOLLM2


def get_config() -> OrganismConfig:
    return OrganismConfig(model=BaseConfig(source=SMOLLM2))
