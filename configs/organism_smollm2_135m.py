"""SmolLM2-135M-Instruct taught to refuse harmful requests and nothing else: the demo's organism.

Command: python -m launch.train_organism --config=configs/organism_smollm2_135m.py --workdir=DIR
Takes: some 75 minutes on two CPU cores with other work beside it: 5 for the base model's answers,
then 392 steps of about 10 s.
Expect: of 32 held-out prompts of each kind (printed on the way) 31 harmful ones refused, 3 harmless
twins, and with the direction ablated none or one. The adapter's card has what was measured.
"""

from jax_refusal.checkpoints.sources import SMOLLM2
from jax_refusal.organism.config import BaseConfig, OrganismConfig


def get_config() -> OrganismConfig:
    return OrganismConfig(model=BaseConfig(source=SMOLLM2))
