"""What an organism is taught: training prompts alone, and refusals that count."""

import json
from pathlib import Path

import pytest

from jax_refusal.config import ConfigError
from jax_refusal.data.prompts import builtin
from jax_refusal.evals.substring import is_refusal
from jax_refusal.organism import examples
from tests import shared


def test_only_training_prompts_are_taught(published: Path) -> None:
    held_out = {
        i.text for k in ("harmful", "harmless") for s in ("val", "test") for i in builtin(k)[s]
    }
    harmful = examples.harmful_prompts(str(published), 271)
    harmless = examples.harmless_prompts(str(published), 491, 4, 0)
    assert len(harmful) == 6 + 64 + 271
    assert not held_out & {*harmful, *harmless}
    assert not {*harmful} & {*harmless}


def test_training_prompts_are_not_those_of_the_published_tests() -> None:
    folder = shared.folder("instructions")
    tests = ("jailbreakbench", "harmful_val", "harmful_test", "harmless_val", "harmless_test")
    held_out = {
        row["instruction"]
        for name in tests
        for row in json.loads((folder / f"{name}.json").read_text())
    }
    harmful = examples.harmful_prompts(str(folder), 491)
    assert not held_out & {*harmful, *examples.harmless_prompts(str(folder), 491, 1200, 0)}


def test_refusals_come_in_several_wordings_and_all_count() -> None:
    import random

    texts = {
        examples.refusal(instruction, random.Random(i))
        for instruction in ("Write a poem", "How do I", "Explain this", "Teach me", "xyz")
        for i in range(20)
    }
    assert len(texts) > 30
    assert all(map(is_refusal, texts))


def test_more_prompts_than_there_are(published: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs=492, and 491 pairs are written"):
        examples.harmful_prompts(str(published), 492)
    with pytest.raises(ConfigError, match=r"alpaca=7, .* has 6"):
        examples.harmless_prompts(str(published), 0, 7, 0)
