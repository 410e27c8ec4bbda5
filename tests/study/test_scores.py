"""The bound of KL holds whatever the edited model says."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_refusal.study.scores import KL_EPSILON, kl_divergence, least_kl_divergence

VOCAB = 20_000


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 20.0])
def test_no_edit_falls_below_the_least_kl(sharpness: float) -> None:
    """Not the base itself, nor others; and where epsilon makes KL negative it is still above."""
    random = np.random.default_rng(0)
    base = sharpness * random.normal(size=VOCAB)
    p = np.exp(base - base.max())
    p /= p.sum()
    # Below zero where q + e is in proportion to p: q takes from the tail what it adds to the rest.
    negative = np.log(np.maximum(p * (1 + VOCAB * KL_EPSILON) - KL_EPSILON, 1e-30))
    edits = [base, base + random.normal(size=VOCAB), np.zeros(VOCAB), -base, negative]
    least = float(least_kl_divergence(jnp.array(base)))
    assert least < 0
    for edited in edits:
        assert float(kl_divergence(jnp.array(base), jnp.array(edited))) >= least - 1e-6
    if sharpness == 4.0:
        assert float(kl_divergence(jnp.array(base), jnp.array(negative))) < 0
