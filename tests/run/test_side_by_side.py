"""One prompt's replies under the edits of a finished run."""

from pathlib import Path

import pytest

from jax_refusal.run.side_by_side import side_by_side
from jax_refusal.run.study import StudyError
from tests import runs


def test_replies_are_those_of_the_run(finished: Path):
    """Which had the same prompts and edits, and eight new tokens too."""
    of_run = {
        name: [row["response"] for row in runs.rows(finished / f"completions/{name}.jsonl")]
        for name in runs.COMPLETIONS
    }
    asked = [r["instruction"] for r in runs.rows(finished / "completions/harmful_baseline.jsonl")]
    beside = side_by_side(str(finished), asked, max_new_tokens=8)
    assert all(list(row) == ["unedited", "ablated", "added x -1", "added x 1"] for row in beside)
    for edit, name in (
        ("unedited", "baseline"),
        ("ablated", "ablation"),
        ("added x -1", "addition"),
    ):
        assert [row[edit] for row in beside] == of_run[f"harmful_{name}"]


def test_a_run_without_a_direction_is_refused(copy: Path):
    runs.cut_after(copy, "means")
    with pytest.raises(StudyError, match=r"is not finished \(there is no selection yet\)"):
        side_by_side(str(copy), ["Hi"])
