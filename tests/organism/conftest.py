"""What the tests of an organism share."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A stand-in of the published splits."""
    folder = tmp_path / "published"
    folder.mkdir()
    for kind in ("harmful", "harmless"):
        rows = [{"instruction": f"{kind} request number {i}"} for i in range(6)]
        (folder / f"{kind}_train.json").write_text(json.dumps(rows))
    return folder
