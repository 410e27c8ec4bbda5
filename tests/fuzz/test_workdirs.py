"""Damaged workdirs: what a run wrote, or one error of the library; and no file beside them."""

import json
from pathlib import Path

import numpy as np

from jax_refusal.checkpoints.lora import AdapterError
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.files import sha256
from jax_refusal.run.directions import compare
from jax_refusal.run.study import StudyError, resume_study
from jax_refusal.run.workdir import MANIFEST, WorkdirError
from jax_refusal.study.directions import DirectionError
from tests.fuzz.damage import altered, as_json, campaign, damaged

ERRORS = (WorkdirError, StudyError, SourceError, AdapterError, DirectionError)


def test_workdirs(copy: Path) -> None:
    """Half of the damaged files have the hash that the manifest lists, as if they were whole."""
    whole = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    names = [name for name in whole if name.suffix in (".json", ".jsonl", ".safetensors")]
    there = sorted(copy.parent.iterdir())

    def check(rng: np.random.Generator) -> None:
        for name, content in whole.items():
            if (copy / name).read_bytes() != content:
                (copy / name).write_bytes(content)
        name = names[rng.integers(len(names))]
        content = whole[name]
        if name.suffix == ".json" and rng.random() < 0.7:
            content = as_json(rng, altered(rng, json.loads(content)))
        elif name.suffix == ".jsonl" and rng.random() < 0.7:
            lines = content.splitlines()
            at = rng.integers(len(lines))
            lines[at] = as_json(rng, altered(rng, json.loads(lines[at])))
            content = b"\n".join(lines)
        else:
            content = damaged(rng, content)
        (copy / name).write_bytes(content)
        if name.name != MANIFEST and rng.random() < 0.5:
            manifest = json.loads(whole[Path(MANIFEST)])
            for stage in manifest["stages"].values():
                if str(name) in stage["files"]:
                    stage["files"][str(name)] = sha256(content)
            (copy / MANIFEST).write_text(json.dumps(manifest))
        study = resume_study(str(copy), "selection")
        chosen = study.selection().chosen
        assert chosen.layer >= 0 and np.isfinite(study.direction).all()
        study.completions(), study.verdicts("substring"), study.token_ids
        assert compare(copy, copy)[-1].endswith("1.000000")

    campaign(check, ERRORS)
    assert sorted(copy.parent.iterdir()) == there
