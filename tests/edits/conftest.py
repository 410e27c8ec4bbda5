import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.edits.common import B, T


@pytest.fixture(scope="module")
def ids() -> jax.Array:  # [B, T]
    return jnp.asarray(np.random.default_rng(1).integers(409, size=(B, T)))
