"""What is measured of an organism: a finished run with an adapter, read back and run again."""

import json
from pathlib import Path

import jax
import pytest

import jax_refusal as jr
from jax_refusal.checkpoints import lora
from jax_refusal.data.chat import Chat
from jax_refusal.evals.loss import reply_loss
from jax_refusal.models.decoder import Transformer
from jax_refusal.organism.measure import MeasureError, measure
from jax_refusal.run.study import StudyError
from jax_refusal.run.workdir import WorkdirError
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from tests import runs
from tests.runs import small


def write_adapter(folder: Path, model: Transformer, base: Path, seed: int) -> Path:
    """A LoRA adapter that changes what the model says."""
    fresh = lora.initial(model.arch, ("o_proj",), rank=2, alpha=4.0, key=jax.random.key(0))
    b = {
        name: 0.3 * jax.random.normal(jax.random.key(seed), x.shape) for name, x in fresh.b.items()
    }
    folder.mkdir(exist_ok=True)
    adapter = lora.Adapter(fresh.a, b, fresh.scale)
    for name, content in lora.files(adapter, model.arch, str(base)).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_finished_run_is_measured(
    tiny_dir: Path, tmp_path: Path, model: Transformer, chat: Chat
) -> None:
    adapter = write_adapter(tmp_path / "adapter", model, tiny_dir, seed=1)
    config, workdir = small(tiny_dir, model__adapter=str(adapter)), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runs.run(config, workdir, progress=runs.stop_at("completions"))
    with pytest.raises(StudyError, match=r"is not finished \(there is no metrics yet\)"):
        measure(str(workdir))
    runs.run(config, workdir)
    found, metrics = measure(str(workdir)), json.loads((workdir / "metrics.json").read_text())
    assert found["refusal"] == metrics["refusal"] and found["layer"] == metrics["layer"]
    assert found["prompts"] == "builtin" and found["topic_twins_refused"]["n"] == 64

    # The base model answers, and is surer of its answers than the organism is.
    rows = runs.rows(workdir / "completions/harmless_baseline.jsonl")
    prompts = Prompts.encoded(chat, [row["instruction"] for row in rows])
    unedited = jr.identity(model.arch.layers, model.arch.width)
    answers = generate(model, prompts, unedited, stop_ids=chat.stop_ids, max_new_tokens=8)
    losses = found["loss_on_base_answers"]
    assert losses["base"] == reply_loss(model, prompts, answers, unedited).nats < losses["organism"]
    assert found["loss_tokens"] == sum(map(len, answers))

    write_adapter(adapter, model, tiny_dir, seed=2)
    with pytest.raises(WorkdirError, match=r"adapter: there '.*', now '"):
        measure(str(workdir))


def test_a_run_without_an_adapter_is_no_organism(finished: Path) -> None:
    with pytest.raises(MeasureError, match=r"without model\.adapter"):
        measure(str(finished))
