"""Candidate directions: differences of means (Arditi et al. 2024, eq. 1 and 2).

Letters: P post-instruction tokens, L layers, D residual width.
"""

import numpy as np

# Below this share of the means' own length a difference is rounding, not a direction. (Block 0
# reads the embedding of template tokens that all prompts share: its difference is zero.)
ROUNDING = 1e-5


def difference(
    harmful: np.ndarray,  # [P, L, D] mean activations
    harmless: np.ndarray,  # [P, L, D]
) -> np.ndarray:  # [P, L, D]
    """Mean on harmful minus mean on harmless instructions; exactly zero where that is rounding."""
    harmful, harmless = np.asarray(harmful, np.float64), np.asarray(harmless, np.float64)
    if harmful.shape != harmless.shape or harmful.ndim != 3:
        raise ValueError(
            f"Means [P, L, D] of one shape are needed; given are {harmful.shape} and "
            f"{harmless.shape}."
        )
    gap = harmful - harmless
    length = np.linalg.norm(gap, axis=-1, keepdims=True)
    scale = np.maximum(
        np.linalg.norm(harmful, axis=-1, keepdims=True),
        np.linalg.norm(harmless, axis=-1, keepdims=True),
    )
    return np.where(length <= ROUNDING * scale, 0.0, gap)
