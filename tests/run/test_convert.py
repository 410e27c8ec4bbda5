"""Models that leave: other programs load them with the logits of the edit, and the card is true."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import jax_refusal as jr
from jax_refusal.checkpoints import export, lora
from jax_refusal.checkpoints.export import ExportError
from jax_refusal.checkpoints.sources import SourceError, file_sha256, fingerprint, locate
from jax_refusal.edits import EditError
from jax_refusal.models.decoder import Transformer
from jax_refusal.run import convert as conversion
from jax_refusal.run.convert import Request, convert
from jax_refusal.run.measured import measured
from jax_refusal.run.workdir import WorkdirError
from jax_refusal.study.directions import DirectionError
from jax_refusal.study.orthogonalize import WeightEditError, rank_one
from tests import oracle, runs, tiny
from tests.tolerances import PARITY, assert_close, largest

L, D = 4, 64
IDS = np.random.default_rng(1).integers(3, 400, size=(2, 20))
NAME = "model.safetensors"
ADDITION: dict[str, Any] = {"edit": "addition", "direction": "d.pt", "layer": 2}
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def vector() -> np.ndarray:  # [D]
    return 3 * np.random.default_rng(0).normal(size=D).astype(np.float32)


@pytest.fixture(scope="module")
def direction(vector: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": vector}, path)
    return path


@pytest.fixture(scope="module")
def finished(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    runs.run(runs.small(tiny_dir), workdir)
    return workdir


def converted(**fields: Any) -> Path:
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
    return convert(Request(**fields), log=lambda message: None)


@torch.no_grad()
def hf_logits(path: Path) -> np.ndarray:
    return tiny.hf_model(path)(torch.tensor(IDS)).logits.numpy()


def hashes(folder: Path) -> dict[str, str]:
    """What the card says of the files."""
    text = (folder / "README.md").read_text()
    return dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", text, re.MULTILINE))


# A Hugging Face directory


def test_an_adapter_is_merged(tiny_dir: Path, vector: np.ndarray, tmp_path: Path):
    model, adapter = jr.load_model(str(tiny_dir)), tmp_path / "adapter"
    adapter.mkdir()
    for name, content in lora.files(rank_one(model, vector), model.arch, "tiny", "float32").items():
        (adapter / name).write_bytes(content)
    out = converted(source=tiny_dir, adapter=adapter, to="hf", out=tmp_path / "out")
    merged = jr.load_model(str(tiny_dir), adapter=str(adapter))
    assert largest(jr.logits(merged, IDS) - jr.logits(model, IDS)) > 1e-2
    assert_close(hf_logits(out), jr.logits(merged, IDS), PARITY)
    assert f"| adapter merged in | `{adapter}`" in (out / "README.md").read_text()
    with pytest.raises(ExportError, match="--adapter goes with --source"):
        converted(workdir=tiny_dir, adapter=adapter, to="hf", out=tmp_path / "again")


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
@pytest.mark.parametrize("edit", ["none", "orthogonalize", "addition"])
def test_transformers_loads_it_with_the_logits_of_the_edit(
    edit: str, fields: dict, checkpoint: Checkpoint, direction: Path, vector, tmp_path: Path
):
    source, out = checkpoint(**fields), tmp_path / "out"
    options: dict[str, Any] = {} if edit == "none" else {"direction": direction}
    if edit == "addition":
        options |= {"layer": 2, "coefficient": -0.5}
    assert converted(source=source, edit=edit, to="hf", out=out, **options) == out

    hf = tiny.hf_model(source)
    hooks = {
        "none": lambda: oracle.ablation_hooks(hf, 0 * vector),
        "orthogonalize": lambda: oracle.ablation_hooks(hf, vector),
        "addition": lambda: oracle.addition_hooks(hf, vector, 2, -0.5),
    }
    with hooks[edit](), torch.no_grad():
        expected = hf(torch.tensor(IDS)).logits.numpy()
    assert_close(hf_logits(out), expected, PARITY, edit)
    assert_close(jr.logits(jr.load_model(str(out)), IDS), expected, PARITY, edit)

    # The tokenizer and its template came along, and nothing else did.
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE
    assert jr.load_chat(str(out)).encode(["Hi"]) == jr.load_chat(str(source)).encode(["Hi"])
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in source.iterdir()} | {"README.md"}
    assert hashes(out) == {f: file_sha256(out / f) for f in files - {"README.md"}}


def test_bfloat16_stays_bfloat16(checkpoint: Checkpoint, direction: Path, tmp_path: Path):
    source = checkpoint(dtype="bfloat16")
    out = converted(
        source=source, edit="orthogonalize", direction=direction, to="hf", out=tmp_path / "out"
    )
    model = tiny.hf_model(out, torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "logits differ by at most" in (out / "README.md").read_text()
    wide = converted(source=source, to="hf", dtype="float32", out=tmp_path / "wide")
    assert_close(hf_logits(wide), hf_logits(source), PARITY)


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype", "text_config", ""])
def test_float16_stays_float16(said: str, to: str, checkpoint: Checkpoint, tmp_path: Path):
    """Wherever the source says it; where it does not, its weights do. To the bit, both ways."""
    source = Path(shutil.copytree(checkpoint(dtype="float16"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    assert config.pop("dtype") == "float16"
    stated = {"text_config": {"dtype": "float16"}} if said == "text_config" else {said: "float16"}
    assert export.stored_dtype(locate(str(source)), config | stated) == "float16"
    if said in ("text_config", ""):  # a llama is not wrapped
        stated = {}
    (source / "config.json").write_text(json.dumps(config | stated))
    out = converted(source=source, to=to, out=tmp_path / "out")
    assert "| dtype | float16 |" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    if to == "hf":
        theirs, ours = load_file(source / NAME), load_file(out / NAME)
        assert {x.dtype for x in ours.values()} == {np.dtype(np.float16)}
        assert theirs.keys() == ours.keys()
        for key, values in theirs.items():
            np.testing.assert_array_equal(values, ours[key], err_msg=key)
    before, after = (jr.load_model(str(path)).leaves() for path in (source, out))
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_float16_is_computed_in_float32(checkpoint: Checkpoint, direction: Path, tmp_path: Path):
    """The edit is rounded once, and what the card measures is what was written."""
    source, fields = checkpoint(dtype="float16"), {"direction": direction, "to": "hf"}
    out = converted(source=source, edit="orthogonalize", out=tmp_path / "out", **fields)
    wide = converted(
        source=source, edit="orthogonalize", dtype="float32", out=tmp_path / "wide", **fields
    )
    exact, rounded = load_file(wide / NAME), load_file(out / NAME)
    for key, values in exact.items():
        np.testing.assert_array_equal(values.astype(np.float16), rounded[key], err_msg=key)
    found = [
        float(re.search(r"differ by at most (\S+) where", (f / "README.md").read_text())[1])  # type: ignore[index]
        for f in (wide, out)
    ]
    assert 0 < found[0] < found[1]
    again = converted(source=tmp_path / "wide", to="hf", dtype="float16", out=tmp_path / "again")
    for key, values in load_file(again / NAME).items():
        np.testing.assert_array_equal(values, rounded[key], err_msg=key)


def test_unedited_weights_are_the_sources_to_the_bit(tiny_dir: Path, tmp_path: Path):
    out = converted(source=tiny_dir, to="hf", out=tmp_path / "out")
    theirs, ours = tiny.hf_model(tiny_dir).state_dict(), tiny.hf_model(out).state_dict()
    assert theirs.keys() == ours.keys() and (out / NAME).is_file()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    text = (out / "README.md").read_text()
    assert "unedited" in text and f"`{fingerprint(locate(str(tiny_dir)))}`" in text


# Orbax


def test_orbax_is_a_model_source(checkpoint: Checkpoint, direction: Path, vector, tmp_path: Path):
    source = checkpoint(tie_word_embeddings=True)
    out = converted(
        source=source, edit="orthogonalize", direction=direction, to="orbax", out=tmp_path / "out"
    )
    model = jr.load_model(str(source))
    expected = jr.logits(model, IDS, edit=jr.ablate(vector, L))
    again = jr.load_model(str(out))
    assert_close(jr.logits(again, IDS), expected, PARITY)
    assert not again.arch.tied_head
    assert jr.load_chat(str(out)).encode(["Hi"])
    assert fingerprint(locate(str(out))) != fingerprint(locate(str(source)))
    assert set(hashes(out)) >= {"config.json", "tokenizer.json"}
    metrics = tmp_path / "run"
    runs.run(runs.small(out), metrics)  # a whole study runs on it
    assert (metrics / "report.md").is_file()


# PEFT


def test_the_adapter_is_ablation_of_what_the_blocks_write(
    tiny_dir: Path, model: Transformer, direction: Path, vector: np.ndarray, tmp_path: Path
):
    from peft import PeftModel

    out = converted(
        source=tiny_dir, edit="orthogonalize", direction=direction, to="peft", out=tmp_path / "out"
    )
    edit = jr.ablate(vector, L, sites=("attn_out", "mlp_out"))
    expected = jr.logits(model, IDS, edit=edit)
    theirs = PeftModel.from_pretrained(tiny.hf_model(tiny_dir), str(out)).eval()
    with torch.no_grad():
        assert_close(theirs(torch.tensor(IDS)).logits.numpy(), expected, PARITY, "peft")
    ours = jr.load_model(str(tiny_dir), adapter=str(out))
    assert_close(jr.logits(ours, IDS), expected, PARITY)
    everywhere = jr.logits(model, IDS, edit=jr.ablate(vector, L))
    assert largest(everywhere - expected) > 1e3 * PARITY * largest(expected)
    text = (out / "README.md").read_text()
    assert "**The embedding is not covered, nor are output biases**" in text
    assert set(hashes(out)) == {lora.CONFIG, lora.WEIGHTS}
    config = json.loads((out / lora.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1.0)
    assert config["target_modules"] == ["down_proj", "o_proj"]


def test_rank_one_is_the_projection(checkpoint: Checkpoint, vector: np.ndarray):
    model = jr.load_model(str(checkpoint(head_dim=24)))
    merged = lora.merge(model, rank_one(model, vector)).leaves()
    from jax_refusal.study.orthogonalize import orthogonalize

    whole = orthogonalize(model, vector).leaves()
    for path, leaf in whole.items():
        if path in ("blocks.0.o", "blocks.0.down"):
            assert_close(merged[path], leaf, PARITY, path)
        else:
            np.testing.assert_array_equal(merged[path], model.leaves()[path], err_msg=path)


# GGUF control vector


def test_the_control_vector_is_where_llama_cpp_adds_it(
    tiny_dir: Path, direction: Path, vector: np.ndarray, tmp_path: Path
):
    out = converted(
        source=tiny_dir,
        edit="addition",
        direction=direction,
        layer=3,
        coefficient=-2.0,
        to="gguf-control-vector",
        out=tmp_path / "out",
    )
    reader = gguf.GGUFReader(out / conversion.CONTROL_VECTOR)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == L - 1
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name) == ("direction.2", "F32")  # output of block 2
    np.testing.assert_allclose(tensor.data, -2.0 * vector, rtol=1e-6)
    text = (out / "README.md").read_text()
    assert "| layer | input of layer 3 |" in text and "| times | -2 |" in text


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_layers_that_llama_cpp_does_not_reach(
    layer: int, tiny_dir: Path, direction: Path, tmp_path: Path
):
    with pytest.raises(ExportError, match=f"layer={layer}: llama.cpp.*layers 2 to 3"):
        converted(
            source=tiny_dir,
            edit="addition",
            direction=direction,
            layer=layer,
            to="gguf-control-vector",
            out=tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


# From a run


def test_a_runs_direction_and_thresholds_are_on_the_card(
    finished: Path, tiny_dir: Path, tmp_path: Path
):
    out = converted(workdir=finished, edit="orthogonalize", to="hf", out=tmp_path / "out")
    choice = json.loads((finished / "selection/direction.json").read_text())
    file = finished / "selection/direction.safetensors"
    text = (out / "README.md").read_text()
    assert f"# {tiny_dir}, edit: orthogonalize" in text
    assert f"| sha256 of the direction | `{file_sha256(file)}` |" in text
    assert f"position {choice['position']} " in text and f"layer {choice['layer']}: " in text
    assert "KL at most 100, induce at least -100, the upper 20% of the layers left out." in text
    from jax_refusal.study.directions import read_direction

    model = jr.load_model(str(tiny_dir))
    expected = jr.logits(model, IDS, edit=jr.ablate(read_direction(finished), L))
    assert_close(hf_logits(out), expected, PARITY)
    measured = re.search(r"logits differ by at most (\S+) where the largest is (\S+),", text)
    assert measured and float(measured[1]) < PARITY * float(measured[2])


def test_an_addition_is_at_the_runs_layer(finished: Path, tiny_dir: Path, tmp_path: Path):
    out = converted(workdir=finished, edit="addition", to="hf", out=tmp_path / "out")
    layer = json.loads((finished / "selection/direction.json").read_text())["layer"]
    assert f"| layer | input of layer {layer} |" in (out / "README.md").read_text()


def test_a_direction_of_other_weights_is_refused(
    finished: Path, checkpoint: Checkpoint, tmp_path: Path
):
    with pytest.raises(ExportError, match=r"is not the model of .*fingerprint is .*the run's is"):
        converted(
            workdir=finished,
            source=checkpoint(seed=1),
            edit="orthogonalize",
            to="hf",
            out=tmp_path / "out",
        )


def test_a_workdir_as_the_direction(finished: Path, checkpoint: Checkpoint, tmp_path: Path):
    """Its model is held against the source, as with --workdir."""
    fields = {"direction": finished, "edit": "orthogonalize", "to": "peft", "out": tmp_path / "out"}
    with pytest.raises(ExportError, match=r"is not the model of .*fingerprint is .*the run's is"):
        converted(source=checkpoint(seed=1), **fields)
    out = converted(source=checkpoint(), **fields)
    assert "selection/direction.safetensors" in (out / "README.md").read_text()


def test_a_run_without_a_direction_is_refused(finished: Path, tmp_path: Path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "selection/direction.json").unlink()
    with pytest.raises(ExportError, match="has no selected direction"):
        converted(workdir=copy, edit="orthogonalize", to="hf", out=tmp_path / "out")
    with pytest.raises(WorkdirError, match="not the workdir of a run"):
        converted(workdir=tmp_path, edit="orthogonalize", to="hf", out=tmp_path / "out")


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"to": "onnx"}, "--to=onnx .allowed: hf, orbax, peft, gguf-control-vector"),
        ({"edit": "erase"}, "--edit=erase .allowed: none, orthogonalize, addition"),
        ({"to": "peft"}, "--to=peft cannot hold --edit=none .it holds: orthogonalize"),
        ({"to": "gguf-control-vector", "edit": "orthogonalize"}, "it holds: addition"),
        ({"edit": "orthogonalize"}, "needs --direction or --workdir"),
        ({"edit": "addition", "direction": "d.pt"}, "needs its --layer"),
        ({"direction": "d.pt"}, "--direction goes with"),
        ({"layer": 2}, "--layer goes with --edit=addition"),
        ({"dtype": "int4"}, "--dtype=int4 .allowed: float32, bfloat16, float16"),
        ({"source": ""}, "--source or --workdir"),
        ({"coefficient": 2.0}, "--coefficient goes with --edit=addition"),
        ({**ADDITION, "coefficient": np.nan}, "--coefficient=nan .allowed: finite"),
        ({**ADDITION, "coefficient": -np.inf}, "--coefficient=-inf .allowed: finite"),
        ({**ADDITION, "coefficient": 1e39}, r"--coefficient=1e\+39 .allowed: finite"),
        ({**ADDITION, "coefficient": 0.0}, "--coefficient=0 adds nothing"),
    ],
)
def test_requests_that_make_no_sense(fields: dict, words: str, tiny_dir: Path, tmp_path: Path):
    request = {"source": tiny_dir, "to": "hf", "out": tmp_path / "out"} | fields
    with pytest.raises(ExportError, match=words):
        converted(**request)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_never_written_to(tiny_dir: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there already and not empty; nothing is overwritten"):
        converted(source=tiny_dir, to="hf", out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out/mine.txt").unlink()
    assert converted(source=tiny_dir, to="hf", out=tmp_path / "out")  # an empty one is fine


def test_nothing_is_left_of_what_could_not_be_finished(
    tiny_dir: Path, direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(ExportError, match=r"No space left on device.*nothing was left"):
            converted(source=tiny_dir, to="hf", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(WeightEditError):
        converted(
            source=tiny_dir,
            edit="addition",
            direction=direction,
            layer=0,
            to="hf",
            out=tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "edit"),
    [
        ("hf", "orthogonalize"),
        ("orbax", "orthogonalize"),
        ("peft", "orthogonalize"),
        ("hf", "addition"),
        ("gguf-control-vector", "addition"),
    ],
)
@pytest.mark.parametrize("values", [[0.0], [np.nan], [1.0, np.inf], [1e39]], ids=str)
def test_an_edit_that_is_none(
    values: list[float], to: str, edit: str, tiny_dir: Path, tmp_path: Path
):
    """Zero, not finite, or infinite in float32: refused before weights are read."""
    file = tmp_path / "direction.safetensors"
    save_file({"direction": np.resize(np.float64(values), D)}, file)
    fields = {"source": tiny_dir, "to": to, "edit": edit, "direction": file}
    if edit == "addition":
        fields["layer"] = 2
    log: list[str] = []
    request = {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()}
    with pytest.raises((EditError, DirectionError), match=r"norm 0|zero|NaN or infinity"):
        convert(Request(**request, out=str(tmp_path / "out")), log=log.append)
    assert not log and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("coefficient", "dtype", "error", "words"),
    [
        (1e38, "", EditError, "coefficient . vector holds NaN or infinity"),
        (-1e5, "float16", WeightEditError, r"in float16, .*6\.55e\+04: blocks\.0\.down_bias"),
        (1e-45, "", ExportError, "is zero in float32"),
    ],
)
def test_an_addition_that_does_not_fit(
    coefficient: float, dtype: str, error: type, words: str, tiny_dir, tmp_path: Path
):
    vector = np.linspace(0.01, 10, D) if coefficient > 1 or dtype else np.full(D, 0.1)
    save_file({"direction": vector}, tmp_path / "d.safetensors")
    fields = {**ADDITION, "direction": tmp_path / "d.safetensors", "coefficient": coefficient}
    with pytest.raises(error, match=words):
        converted(source=tiny_dir, to="hf", dtype=dtype, out=tmp_path / "out", **fields)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_logits_that_are_not_finite_are_not_put_on_a_card(tiny_dir: Path, model: Transformer):
    arrays = model.leaves()
    broken = Transformer(model.arch, arrays | {"head": 3e38 * jax.numpy.sign(arrays["head"])})
    with pytest.raises(ExportError, match=r"logits are not finite .*smaller coefficient"):
        measured(model, broken, jr.identity(L, D), locate(str(tiny_dir)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_an_adapter_that_overflows(
    dtype: str, to: str, tiny_dir: Path, model: Transformer, vector, tmp_path: Path
):
    """Its halves are finite, and so is their product where it is computed."""
    adapter = rank_one(model, vector)
    size = {"bfloat16": 3.4e38, "float16": 1e6}[dtype]  # beyond bfloat16, inside float32
    huge = {path: jax.numpy.full_like(a, size / D) for path, a in adapter.a.items()}
    ones = {path: jax.numpy.full_like(b, D) for path, b in adapter.b.items()}
    (tmp_path / "lora").mkdir()
    files = lora.files(lora.Adapter(huge, ones, 1.0), model.arch, "tiny", "float32")
    for name, content in files.items():
        (tmp_path / "lora" / name).write_bytes(content)
    with pytest.raises(WeightEditError, match=rf"not be finite in {dtype}.*blocks\.0\.down"):
        converted(
            source=tiny_dir, adapter=tmp_path / "lora", to=to, dtype=dtype, out=tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_folder_without_a_tokenizer(
    to: str, checkpoint: Checkpoint, direction: Path, vector: np.ndarray, tmp_path: Path
):
    source = Path(shutil.copytree(checkpoint(), tmp_path / "source"))
    for path in source.glob("*token*"):
        path.unlink()
    fields = {"edit": "orthogonalize", "direction": direction}
    out = converted(source=source, to=to, out=tmp_path / "out", **fields)
    text = (out / "README.md").read_text()
    assert "on 256 tokens of pseudo-random text, for want of a" in text
    assert "**No tokenizer**: the source has none" in text
    expected = jr.logits(jr.load_model(str(source)), IDS, edit=jr.ablate(vector, L))
    assert_close(jr.logits(jr.load_model(str(out)), IDS), expected, PARITY)
    whole = converted(source=checkpoint(), to=to, out=tmp_path / "whole", **fields)
    assert "No tokenizer" not in (whole / "README.md").read_text()


def test_a_link_out_of_the_source_is_refused(tiny_dir: Path, tmp_path: Path):
    source = Path(shutil.copytree(tiny_dir, tmp_path / "source"))
    (tmp_path / "secret").write_text("mine")
    (source / "LICENSE").symlink_to("../secret")
    log: list[str] = []
    request = Request(source=str(source), to="hf", out=str(tmp_path / "out"))
    with pytest.raises((ExportError, SourceError), match=r"LICENSE.* link"):
        convert(request, log=log.append)
    assert not log and not (tmp_path / "out").exists()
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to("config.json")  # inside it is fine
    out = convert(request, log=log.append)
    assert (out / "LICENSE").read_text() == (source / "config.json").read_text()
    assert not (out / "LICENSE").is_symlink()


def test_a_snapshot_of_the_hubs_cache(tiny_dir: Path, tmp_path: Path):
    """Whose files are links to the blobs of the same repository; those of another one are not."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots/0a1b", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny_dir.iterdir())):
        shutil.copy(path, blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    out = converted(source=snapshot, to="hf", out=tmp_path / "out")
    assert jr.load_chat(str(out)).encode(["Hi"]) == jr.load_chat(str(tiny_dir)).encode(["Hi"])
    (tmp_path / "models--org--other/blobs").mkdir(parents=True)
    (tmp_path / "models--org--other/blobs/x").write_text("theirs")
    (snapshot / "NOTICE").symlink_to("../../../models--org--other/blobs/x")
    with pytest.raises((ExportError, SourceError), match=r"NOTICE.* link"):
        converted(source=snapshot, to="hf", out=tmp_path / "again")


def test_an_out_that_is_a_link(tiny_dir: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(ExportError, match=r"--out=.*out is a link"):
        converted(source=tiny_dir, to="hf", out=tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_direction_of_another_width(tiny_dir: Path, tmp_path: Path):
    torch.save(torch.ones(D + 1), tmp_path / "wide.pt")
    with pytest.raises(DirectionError, match=r"wide.pt holds shape \(65,\).*takes \(64,\)"):
        converted(
            source=tiny_dir,
            edit="orthogonalize",
            direction=tmp_path / "wide.pt",
            to="hf",
            out=tmp_path / "out",
        )


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(SourceError, match="does not exist"):
        converted(source=tmp_path / "none", to="hf", out=tmp_path / "out")


def test_the_command(tiny_dir: Path, direction: Path, tmp_path: Path, tmp_path_factory):
    def launch(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"launch.{module}", *flags],
            cwd=runs.ROOT,
            env=runs.environment(runs.programs(tmp_path_factory)),
            capture_output=True,
            text=True,
            timeout=200,
        )

    flags = [f"--source={tiny_dir}", f"--direction={direction}", f"--out={tmp_path / 'out'}"]
    flags += ["--edit=addition", "--layer=2", "--to=gguf-control-vector"]
    done = launch("convert", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    again = launch("convert", *flags)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1
    assert "ExportError" in again.stderr and "nothing is overwritten" in again.stderr
    same = launch("compare", f"--one={direction}", f"--other={direction}")
    assert same.returncode == 0 and same.stdout.strip().endswith("cosine 1.000000")


@pytest.mark.slow
def test_a_gguf_file_becomes_a_hugging_face_directory(smollm2_hf, tmp_path: Path):
    """Real weights, dequantised: the same logits and the same prompts in transformers."""
    out = converted(source=jr.SMOLLM2, to="hf", out=tmp_path / "out")
    prompt = jr.load_chat(jr.SMOLLM2).encode(["What is the capital of France?"])
    assert jr.load_chat(str(out)).encode(["What is the capital of France?"]) == prompt
    assert jr.load_chat(str(out)).stop_ids == jr.load_chat(jr.SMOLLM2).stop_ids
    with torch.no_grad():
        ours = tiny.hf_model(out)(torch.tensor(prompt)).logits.numpy()
        theirs = smollm2_hf(torch.tensor(prompt)).logits.numpy()
    assert_close(ours, theirs, PARITY)
