"""Material that is not part of the project: the published runs and instruction sets, if present."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

RUNS = ("gemma-2b-it", "llama-2-7b-chat-hf")


def folder(name: str) -> Path:
    """A folder of $JAX_REFUSAL_DATA, or of ../shared/data beside the repository; else a skip."""
    root = os.environ.get("JAX_REFUSAL_DATA")
    path = (Path(root) if root else Path(__file__).parents[2] / "shared" / "data") / name
    if not path.is_dir():
        pytest.skip(f"no {name} in $JAX_REFUSAL_DATA or ../shared/data")
    return path


def published(run: str, name: str) -> Any:
    """A JSON file of a published run."""
    return json.loads((folder("published_runs") / run / f"{name}.json").read_text())
