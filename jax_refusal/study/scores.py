"""What a candidate direction is judged by (Arditi et al. 2024, appendix B and C).

Letters: N prompts, V vocabulary. All scores are in nats.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

REFUSAL_EPSILON = 1e-8
KL_EPSILON = 1e-6


class TokenError(ValueError):
    """Refusal tokens of which no score can be computed."""


def check_token_ids(token_ids: Sequence[int], vocab: int) -> None:
    """Raises TokenError for no tokens, one given twice (it would count twice) or an unknown one."""
    given = [int(i) for i in token_ids]
    wrong = [i for i in given if not 0 <= i < vocab]
    if wrong:
        raise TokenError(
            f"refusal.token_ids={given}: {wrong} are not among the model's {vocab} tokens."
        )
    if not given or len(set(given)) < len(given):
        raise TokenError(f"refusal.token_ids={given}: each token once, and at least one.")


def refusal_score(
    logits: jax.Array,  # [..., V] at the last prompt token
    token_ids: jax.Array,  # refusal tokens
) -> jax.Array:  # [...], log odds in nats
    """log(p + e) - log(1 - p + e), p the probability that the reply starts with a refusal token.

    1 - p is summed over the other tokens, so it keeps its digits in float32 when p is close to 1.
    """
    log_all = jax.nn.logsumexp(logits, -1)
    log_refusal = jax.nn.logsumexp(logits[..., token_ids], -1)
    others = logits.at[..., token_ids].set(-jnp.inf)
    log_others = jax.nn.logsumexp(others, -1)
    p, q = jnp.exp(log_refusal - log_all), jnp.exp(log_others - log_all)
    return jnp.log(p + REFUSAL_EPSILON) - jnp.log(q + REFUSAL_EPSILON)


def kl_divergence(
    base: jax.Array,  # [..., V] logits of the unedited model
    edited: jax.Array,  # [..., V]
) -> jax.Array:  # [...], nats
    """sum_v p_base (log(p_base + e) - log(p_edited + e)): how much an edit changes the reply."""
    p, q = jax.nn.softmax(base, -1), jax.nn.softmax(edited, -1)
    return jnp.sum(p * (jnp.log(p + KL_EPSILON) - jnp.log(q + KL_EPSILON)), -1)


def least_kl_divergence(
    base: jax.Array,  # [..., V] logits of the unedited model
) -> jax.Array:  # [...], nats, below zero
    """What `kl_divergence` from these logits cannot fall below, whatever the edit.

    sum_v p log((p + e) / (q + e)) >= - e sum_v log(1 + p / e), since sum_v (p + e) log((p + e) /
    (q + e)) >= 0 (p + e and q + e have one sum) and q >= 0.
    """
    p = jax.nn.softmax(base, -1)
    return -KL_EPSILON * jnp.log1p(p / KL_EPSILON).sum(-1)
