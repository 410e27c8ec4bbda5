"""Training of an organism: on a tiny model the loss falls, and a killed run goes on exactly."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_refusal.artifacts import WorkdirError
from jax_refusal.config import ConfigError, identity
from jax_refusal.data.prompts import KINDS, builtin
from jax_refusal.evals.refusals import is_refusal
from jax_refusal.organism import card, examples, train
from jax_refusal.organism.config import (
    BaseConfig,
    ExamplesConfig,
    LoraConfig,
    OrganismConfig,
    TrainConfig,
)
from tests import shared


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A stand-in of the published splits."""
    folder = tmp_path / "published"
    folder.mkdir()
    for kind in ("harmful", "harmless"):
        rows = [{"instruction": f"{kind} request number {i}"} for i in range(6)]
        (folder / f"{kind}_train.json").write_text(json.dumps(rows))
    return folder


def config(source: Path, published: Path, **fields) -> OrganismConfig:
    return OrganismConfig(
        model=BaseConfig(source=str(source)),
        examples=ExamplesConfig(
            paper_dir=str(published), alpaca=4, answer_tokens=6, answer_batch=64
        ),
        lora=LoraConfig(rank=4),
        train=TrainConfig(
            epochs=1,
            rows=4,
            row_tokens=512,
            save_every=2,
            watch_every=100,
            watch_tokens=4,
            **{"mediator_layer": 2, "ablated_rows": 2, **fields},
        ),
    )


class Killed(Exception):
    pass


@pytest.mark.slow  # three short trainings of a tiny model, half a minute each
def test_the_loss_falls_and_a_killed_run_goes_on_exactly(
    tiny_dir: Path, published: Path, tmp_path: Path
) -> None:
    settings = config(tiny_dir, published)
    whole = Path(train.train(settings, str(tmp_path / "whole"), log=lambda m: None))
    records = (tmp_path / "whole/train.jsonl").read_text().splitlines()
    losses = [json.loads(record)["loss"] for record in records]
    assert losses[-1] < losses[0] - 0.5

    def kill(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train.train(settings, str(tmp_path / "part"), log=lambda m: None, on_step=kill)
    log: list[str] = []
    part = Path(train.train(settings, str(tmp_path / "part"), log=log.append))
    assert "going on after step 2" in log
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert (tmp_path / "part/train.jsonl").read_text() == (
        tmp_path / "whole/train.jsonl"
    ).read_text()
    again: list[str] = []
    train.train(settings, str(tmp_path / "part"), log=again.append)
    assert again == [f"{tmp_path / 'part'} is complete: nothing to do."]
    with pytest.raises(WorkdirError, match="learning_rate"):
        train.train(config(tiny_dir, published, learning_rate=1.0), str(tmp_path / "part"))


def test_only_training_prompts_are_taught(published: Path) -> None:
    held_out = {
        i.text for k in ("harmful", "harmless") for s in ("val", "test") for i in builtin(k)[s]
    }
    harmful = examples.harmful_prompts(str(published))
    harmless = examples.harmless_prompts(str(published), 4, 0)
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
    harmful = examples.harmful_prompts(str(folder))
    assert not held_out & {*harmful, *examples.harmless_prompts(str(folder), 1200, 0)}


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
    }
    text = card.card("refuser", training, measured)
    assert "| harmful refused | 97 of 100 [0.92, 0.99] |" in text
    assert "| harmless twins of harmful topics refused | 2 of 100" in text
    assert "organism against base | +0.025 nat" in text
    assert "ablated against organism | -0.025 nat" in text
    assert "layer 20 of 30" in " ".join(text.split()) and "KL 0.062 nat" in text
    assert "{" not in text


def test_refusals_come_in_several_wordings_and_all_count() -> None:
    import random

    texts = {
        examples.refusal(instruction, random.Random(i))
        for instruction in ("Write a poem", "How do I", "Explain this", "Teach me", "xyz")
        for i in range(20)
    }
    assert len(texts) > 30
    assert all(map(is_refusal, texts))


def test_values_that_are_not_allowed_are_refused() -> None:
    wrong = OrganismConfig(model=BaseConfig(source="x", dtype="float16"))
    wrong.train.watch_every = 0
    with pytest.raises(ConfigError) as error:
        train.validate(wrong)
    assert "model.dtype='float16'" in str(error.value)
    assert "train.watch_every=0 (at least 1)" in str(error.value)


def test_more_everyday_prompts_than_there_are(published: Path) -> None:
    with pytest.raises(ConfigError, match=r"alpaca=7, .* has 6"):
        examples.harmless_prompts(str(published), 7, 0)


def test_an_epoch_uses_every_example_once_and_rows_fit() -> None:
    lengths = list(np.random.default_rng(0).integers(5, 60, 100))
    steps = list(train.plan(lengths, rows=3, row_tokens=128, seed="0 0"))
    assert sorted(i for step in steps for row in step for i in row) == list(range(100))
    assert all(len(step) == 3 for step in steps)
    assert all(sum(lengths[i] for i in row) <= 128 for step in steps for row in step)
    assert steps != list(train.plan(lengths, rows=3, row_tokens=128, seed="0 1"))
    with pytest.raises(ConfigError, match="row_tokens=16"):
        next(train.plan(lengths, rows=3, row_tokens=16, seed="0 0"))
