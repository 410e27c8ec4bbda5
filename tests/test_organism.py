"""Training of an organism: on a tiny model the loss falls, and a killed run goes on exactly."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.config import ConfigError, identity
from jax_refusal.data.prompts import KINDS, builtin
from jax_refusal.edits import Affine, take
from jax_refusal.evals.substring import is_refusal
from jax_refusal.models.cache import SHARED, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.organism import card, examples, train
from jax_refusal.organism.config import (
    BaseConfig,
    ExamplesConfig,
    LoraConfig,
    OrganismConfig,
    TrainConfig,
)
from jax_refusal.organism.loss import ABLATED, PLAIN, Mediator, TrainBatch
from jax_refusal.run.workdir import WorkdirError
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.pairs import pack_pairs, paired_stream
from jax_refusal.sites import Capture
from tests import shared
from tests.tolerances import INVARIANCE, ROUNDING, assert_close


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
            paper_dir=str(published), pairs=188, alpaca=4, answer_tokens=6, answer_batch=64
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


def test_rows_of_one_batch_are_run_with_their_own_edits(model: Transformer) -> None:
    """Behind a shared prefix too; and what is kept is what arrived in front of the edit."""
    rng = np.random.default_rng(0)
    pairs = [[((5, 6, 7), (8, 9))], [((7, 6), (4,)), ((3,), (2, 1, 1))], [((9, 9, 4), (3, 3))]]
    prefix = Tokens(
        ids=jnp.array([[1, 2]]), positions=jnp.array([[0, 1]]), segments=jnp.full((1, 2), SHARED)
    )
    unit = rng.normal(size=model.arch.width)
    edits = jr.rows(
        jr.identity(model.arch.layers, model.arch.width), jr.ablate(unit, model.arch.layers)
    )
    which = np.array([PLAIN, ABLATED, ABLATED])
    for behind, start in ((None, 0), (prefix, 2)):
        batch = pack_pairs(pairs, Prompts([], start), 16)
        capture = Capture(sites=("resid_pre",), slots=jnp.zeros((3, 1), jnp.int32))
        mixed = paired_stream(model, edits, behind, batch, row_edit=which, capture=capture)
        for edit in (PLAIN, ABLATED):
            rows = which == edit
            own = take(edits, np.array([edit]))
            alone = paired_stream(model, own, behind, batch, capture=capture)
            seen = batch.tokens.segments[rows] != 0
            assert_close(mixed.x[rows][seen], alone.x[rows][seen], INVARIANCE, "stream")
            kept = [out.captured["resid_pre"][:, rows] for out in (mixed, alone)]
            assert_close(*kept, INVARIANCE, "kept")


def test_the_direction_is_the_difference_of_running_means() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    batch = pack_pairs([[((1,), (2,))]] * 3, Prompts([], 0), 8)
    sides = np.array([[1, -1], [-1, 0], [1, 1]], np.float32)
    edits = np.array([PLAIN, PLAIN, ABLATED])
    start = Mediator.start(4, 0, 0.25)
    only_answers = start.update(x, TrainBatch(batch, np.minimum(sides, 0), edits))
    nothing = only_answers.edits(3)
    assert isinstance(nothing, Affine)
    assert not np.any(only_answers.direction) and not np.any(nothing.unit)
    first = start.update(x, TrainBatch(batch, sides, edits))
    expected = x[0, 0] - (x[0, 1] + x[1, 0]) / 2
    assert_close(first.direction, expected, ROUNDING)
    second = first.update(-x, TrainBatch(batch, sides, edits))  # weights 3 : 4, the old one faded
    assert_close(second.direction, -expected / 7, ROUNDING)
    edit = second.edits(3)
    assert isinstance(edit, Affine)
    assert_close(edit.unit[ABLATED, 0], -expected / np.linalg.norm(expected), ROUNDING)
    assert not np.any(edit.remove[..., PLAIN]) and np.all(edit.remove[..., ABLATED] == 1)


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


def test_more_prompts_than_there_are(published: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs=492, and 491 pairs are written"):
        examples.harmful_prompts(str(published), 492)
    with pytest.raises(ConfigError, match=r"alpaca=7, .* has 6"):
        examples.harmless_prompts(str(published), 0, 7, 0)


def test_an_epoch_uses_every_example_once_and_rows_fit() -> None:
    lengths = list(np.random.default_rng(0).integers(5, 60, 100))
    steps = list(train.plan(lengths, rows=3, row_tokens=128, seed="0 0"))
    assert sorted(i for step in steps for row in step for i in row) == list(range(100))
    assert all(len(step) == 3 for step in steps)
    assert all(sum(lengths[i] for i in row) <= 128 for step in steps for row in step)
    assert steps != list(train.plan(lengths, rows=3, row_tokens=128, seed="0 1"))
    with pytest.raises(ConfigError, match="row_tokens=16"):
        next(train.plan(lengths, rows=3, row_tokens=16, seed="0 0"))
