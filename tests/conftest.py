"""Strict settings for every test, and the models that tests share.

The settings are made before jax starts: eight devices on one CPU, so that sharding is tested
without hardware, and no hub.
"""

import importlib.util
import os
import shutil
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import jax_refusal as jr
from jax_refusal.checkpoints.sources import locate
from jax_refusal.data.chat import Chat
from jax_refusal.models.decoder import Transformer
from tests import runs, tiny, xla

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every test compiles for itself: a stored program could hide what compiling says.
jax.config.update("jax_enable_compilation_cache", False)
if importlib.util.find_spec("torch"):  # the core suite runs without it
    import torch

    torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, nohup's ignore SIGHUP, and what they start inherits it:
# signals are tested wherever the suite is started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    # The slow tests compile as a run does.
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *xla.CARELESS])


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module() -> Iterator[None]:
    """Every compiled program holds a few memory mappings, of which a process may have some 65,000:
    more than all tests together would take."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny checkpoint (`tiny.write_checkpoint`), or finds the same one again."""
    written: dict[str, Path] = {}

    def write(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in written:
            written[key] = tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"), **fields)
        return written[key]

    return write


@pytest.fixture(scope="session")
def tiny_dir(checkpoint: Callable[..., Path]) -> Path:
    """A tiny random Llama with grouped queries: L = 4, D = 64, H = 4, G = 2."""
    return checkpoint()


@pytest.fixture(scope="session")
def model(tiny_dir: Path) -> Transformer:
    return jr.load_model(str(tiny_dir))


@pytest.fixture(scope="session")
def chat(tiny_dir: Path) -> Chat:
    return jr.load_chat(str(tiny_dir))


@pytest.fixture(scope="session")
def hf(tiny_dir: Path) -> PreTrainedModel:
    """The same checkpoint as Hugging Face runs it."""
    pytest.importorskip("torch", reason="Hugging Face's model needs PyTorch")
    return tiny.hf_model(tiny_dir)


@pytest.fixture(scope="session")
def smollm2_hf() -> PreTrainedModel:
    """SmolLM2-135M-Instruct as Hugging Face reads and runs the GGUF file of `jr.SMOLLM2`."""
    pytest.importorskip("torch", reason="Hugging Face's model needs PyTorch")
    path = locate(jr.SMOLLM2).gguf
    assert path is not None
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def finished(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an uninterrupted run; tests must not change it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    log = runs.run(runs.small(tiny_dir), workdir)
    assert runs.stages_run(log) == runs.STAGES
    return workdir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be broken."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
