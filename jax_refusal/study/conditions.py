"""The conditions of a study (Arditi et al. 2024, section 3): which prompts under which edit.

Letters: D residual width.
"""

import dataclasses

import numpy as np

from jax_refusal.edits import Edit, ablate, add, identity


@dataclasses.dataclass(frozen=True)
class Condition:
    kind: str  # of the prompts: harmful or harmless
    edit: str  # baseline, ablation or addition
    coefficient: float  # multiple of the direction that an addition adds
    title: str  # in tables

    @property
    def name(self) -> str:
        """In file names and metrics.json."""
        return f"{self.kind}_{self.edit}"

    def edit_with(
        self,
        direction: np.ndarray,  # [D], not normalised
        layer: int,  # where an addition adds
        layers: int,
    ) -> Edit:
        """The edit of this condition, as one row."""
        if self.edit == "ablation":
            return ablate(direction, layers)
        if self.edit == "addition":
            return add(direction, layers, layer=layer, coefficient=self.coefficient)
        return identity(layers, len(direction))


CONDITIONS = (
    Condition("harmful", "baseline", 0.0, "harmful, unedited"),
    Condition("harmful", "ablation", 0.0, "harmful, direction ablated"),
    Condition("harmful", "addition", -1.0, "harmful, direction added x -1"),
    Condition("harmless", "baseline", 0.0, "harmless, unedited"),
    Condition("harmless", "addition", 1.0, "harmless, direction added x +1"),
)
