"""A short kill campaign; `python -m tests.campaign.kill` is the long one."""

from pathlib import Path

import pytest

from tests.campaign.kill import campaign


@pytest.mark.slow  # compiles for itself: a minute
def test_killed_runs_go_on_to_the_same_files(tmp_path: Path):
    done = campaign(tmp_path, times=4, seed=0, signals=("INT", "TERM", "KILL"))
    assert not done.faults, "\n".join(done.faults)
    assert len(done.kills) == 4
