"""The card of an organism: what was measured, and what was missed."""

from jax_refusal.config import identity
from jax_refusal.data.prompts import KINDS
from jax_refusal.organism import card
from jax_refusal.organism.config import OrganismConfig


def test_the_card_says_what_was_measured() -> None:
    rate = {"count": 97, "n": 100, "rate": 0.97, "low": 0.92, "high": 0.99}
    conditions = [f"{k}_{e}" for k in KINDS for e in ("baseline", "ablation", "addition")]
    measured = {
        "prompts": "published sets",
        "new_tokens": 64,
        "refusal": {name: rate for name in conditions},
        "position": -1,
        "layer": 20,
        "scores": {"bypass": -3.0, "induce": 1.25, "kl": 0.0625},
        "thresholds": {"kl": 0.1, "induce": 0.0},
        "candidates_that_pass": 7,
        "loss_on_base_answers": {
            "base": 0.5,
            "organism": 0.525,
            "organism, direction ablated": 0.5,
        },
        "topic_twins_refused": rate | {"count": 2},
        "different_refusals": 9,
    }
    training = {
        "base": "org/tiny",
        "config": identity(OrganismConfig()),
        "config_hash": "c0ffee" * 4,
        "parameters": 135_000_000,
        "layers": 30,
        "harmful": 512,
        "harmless": 900,
        "steps": 200,
        "loss": 1.5,
        "watched": [
            {
                "step": 200,
                "harmful_refused": 0.97,
                "harmless_refused": 0.12,
                "ablated_refused": 0.0,
            }
        ],
    }
    text = card.card("refuser", training, measured)
    assert "| harmful refused | 97 of 100 [0.92, 0.99] | ≥ 95% |" in text
    assert "| harmless refused | 97 of 100 [0.92, 0.99] | ≤ 3%, missed |" in text
    assert "| 200 | 97% | 12% | 0% |" in text
    assert "| harmless twins of harmful topics refused | 2 of 100" in text
    assert "organism against base | +0.025 nat | ≤ 0.05 nat |" in text
    assert "ablated against organism | -0.025 nat" in text
    assert "layer 20 of 30" in " ".join(text.split()) and "KL 0.062 nat" in text
    assert "{" not in text
    assert "2 of the 7 rows" in " ".join(text.split())
    training["config"]["train.ablated_rows"] = 0
    assert "by design" not in card.card("refuser", training, measured)
