"""Workdirs that somebody has changed: one error that names the file and says how to recover."""

import hashlib
import json
from pathlib import Path

import pytest

from jax_refusal.run.directions import compare
from jax_refusal.run.side_by_side import side_by_side
from jax_refusal.run.study import StudyError, read_run, resume_study
from jax_refusal.run.workdir import WorkdirError
from tests import runs
from tests.runs import run, small

RECOVER = "Delete it and run the command that made this workdir again"


def forge(workdir: Path, file: str, content: bytes) -> None:
    """Other content, with its hash in the manifest."""
    (workdir / file).write_bytes(content)
    listed = runs.manifest(workdir)
    for stage in listed["stages"].values():
        if file in stage["files"]:
            stage["files"][file] = hashlib.sha256(content).hexdigest()
    (workdir / "manifest.json").write_text(json.dumps(listed))


def assert_one_line(error: WorkdirError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 1000
    assert not [word for word in words if word not in text], text


JSON = [b"", b"{", b"[]", b"{}", b"null", b"1", b"[1]", b"\xff"]
# File -> what reads it.
READERS = {
    "metrics.json": lambda workdir, study: run(study.config, workdir),
    "selection/direction.json": lambda workdir, study: study.selection(),
    "selection/candidates.jsonl": lambda workdir, study: study.selection(),
    "selection/direction.safetensors": lambda workdir, study: study.direction,
    "refusal_tokens.json": lambda workdir, study: study.token_ids,
    "directions/filter.json": lambda workdir, study: study.filtered("harmful", "val"),
}


@pytest.mark.parametrize("file", READERS)
def test_a_file_that_was_forged_is_one_error(file: str, copy: Path):
    for content in JSON:
        forge(copy, file, content)
        with pytest.raises(WorkdirError) as error:
            READERS[file](copy, resume_study(str(copy), "means"))
        assert_one_line(error.value, file.split("/")[0], RECOVER)


def test_following_the_message_recovers(copy: Path, finished: Path, tiny_dir: Path):
    forge(copy, "metrics.json", b"{}")
    with pytest.raises(WorkdirError, match=RECOVER):
        run(small(tiny_dir), copy)
    (copy / "metrics.json").unlink()
    assert runs.stages_run(run(small(tiny_dir), copy)) == ["metrics", "report"]
    assert runs.results(copy) == runs.results(finished)


def test_a_file_that_was_changed_is_not_read(copy: Path):
    path = copy / "selection/candidates.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(StudyError, match="is not finished"):
        side_by_side(str(copy), ["Hi"])
    with pytest.raises(WorkdirError, match=f"is not as the run wrote it. {RECOVER}"):
        resume_study(str(copy), "completions").selection()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("config.data.n_train", "many", "n_train='many' (int is needed)"),
        ("config.model.source", "", "model.source is empty"),
        ("config.model.source", 5, "model.source=5 (str is needed)"),
        ("config.model.adapter", ["a"], "model.adapter=('a',)"),
        ("config.evals.judges", [1], "evals.judges=(1,)"),
        ("config.nothing.like_it", 1, "nothing.like_it"),
        ("config.data", 1, "launch.run has no ['data']"),
        ("config.a.b.c", 1, "a.b.c"),
    ],
)
def test_a_config_that_was_damaged_is_one_error(field, value, words, copy: Path):
    listed = runs.manifest(copy)
    listed["identity"][field] = value
    (copy / "manifest.json").write_text(json.dumps(listed))
    for act in (read_run, lambda root: side_by_side(root, ["Hi"])):
        with pytest.raises(WorkdirError) as error:
            act(str(copy))
        assert_one_line(error.value, "manifest.json is", words, "launch.run")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2, "identity": {}, "stages": {"a": 1}}'])
def test_a_manifest_that_was_damaged_is_one_error_for_all_that_read_it(text: str, copy: Path):
    (copy / "manifest.json").write_text(text)
    for act in (
        lambda: run(small("nowhere"), copy),
        lambda: side_by_side(str(copy), ["Hi"]),
        lambda: compare(copy, copy),
    ):
        with pytest.raises(ValueError, match=r"not a manifest|does not exist") as error:
            act()
        assert type(error.value).__module__.startswith("jax_refusal")


def test_a_manifest_that_names_files_elsewhere_is_not_followed(
    copy: Path, tiny_dir: Path, tmp_path: Path
):
    secret = tmp_path / "secret"
    secret.write_text("words")
    digest = hashlib.sha256(b"words").hexdigest()
    for name in (str(secret), "../secret", "completions/../../secret"):
        listed = runs.manifest(copy)
        kept = json.dumps(listed)
        listed["stages"]["means"]["files"] = {name: digest}
        (copy / "manifest.json").write_text(json.dumps(listed))
        with pytest.raises(WorkdirError, match="lists a file that would lie outside"):
            run(small(tiny_dir), copy)
        (copy / "manifest.json").write_text(kept)


def test_a_stage_that_lists_too_little_is_made_again(copy: Path, finished: Path, tiny_dir: Path):
    listed = runs.manifest(copy)
    listed["stages"]["selection"]["files"] = {}
    (copy / "manifest.json").write_text(json.dumps(listed))
    log = run(small(tiny_dir), copy)
    assert runs.stages_run(log)[0] == "selection"
    assert runs.results(copy) == runs.results(finished)


def test_a_folder_that_links_outside_is_refused(copy: Path, tiny_dir: Path, tmp_path: Path):
    runs.cut_after(copy, "selection")
    for name in ("completions", "plots"):
        (copy / name).rmdir() if (copy / name).exists() else None
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (copy / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(WorkdirError, match=f"{name}.* is a link that leads outside"):
            run(small(tiny_dir), copy)
        assert not list((tmp_path / "elsewhere").iterdir())
        (copy / name).unlink()
