"""Training of an organism: on a tiny model the loss falls, and a killed run goes on exactly."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.config import ConfigError
from jax_refusal.edits import Affine, take
from jax_refusal.models.cache import SHARED, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.organism import train
from jax_refusal.organism.config import (
    BaseConfig,
    ExamplesConfig,
    LoraConfig,
    OrganismConfig,
    TrainConfig,
)
from jax_refusal.organism.loss import ABLATED, PLAIN, Mediator, TrainBatch
from jax_refusal.run.workdir import Workdir, WorkdirError
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.pairs import pack_pairs, paired_stream
from jax_refusal.sites import Capture
from tests.tolerances import INVARIANCE, ROUNDING, assert_close


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


def test_a_training_has_its_workdir_to_itself(tiny_dir: Path, published: Path, tmp_path: Path):
    with (
        Workdir(tmp_path / "run", {}).lock(),
        pytest.raises(WorkdirError, match="in use by another run"),
    ):
        train.train(config(tiny_dir, published), str(tmp_path / "run"))


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


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_run_of_any_length_has_a_schedule(steps: int) -> None:
    """However much of it is to warm up."""
    for warmup in (0.0, 0.05, 0.999):
        train.optimizer(TrainConfig(warmup=warmup), steps)


def test_values_that_are_not_allowed_are_refused() -> None:
    wrong = OrganismConfig(model=BaseConfig(source="x", dtype="float16"))
    wrong.train.watch_every = 0
    with pytest.raises(ConfigError) as error:
        train.validate(wrong)
    assert "model.dtype='float16'" in str(error.value)
    assert "train.watch_every=0 (allowed: at least 1 " in str(error.value)


def test_an_epoch_uses_every_example_once_and_rows_fit() -> None:
    lengths = list(np.random.default_rng(0).integers(5, 60, 100))
    steps = list(train.plan(lengths, rows=3, row_tokens=128, seed="0 0"))
    assert sorted(i for step in steps for row in step for i in row) == list(range(100))
    assert all(len(step) == 3 for step in steps)
    assert all(sum(lengths[i] for i in row) <= 128 for step in steps for row in step)
    assert steps != list(train.plan(lengths, rows=3, row_tokens=128, seed="0 1"))
    with pytest.raises(ConfigError, match="row_tokens=16"):
        next(train.plan(lengths, rows=3, row_tokens=16, seed="0 0"))
