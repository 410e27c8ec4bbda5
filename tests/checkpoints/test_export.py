"""Hugging Face -> ours -> Hugging Face is the same to the bit, and Orbax reloads what was saved."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal import sharding
from jax_refusal.checkpoints import export, hf, loading, orbax
from jax_refusal.checkpoints.export import ExportError
from jax_refusal.checkpoints.sources import locate
from jax_refusal.checkpoints.tensors import ConversionError, read_safetensors
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.study.orthogonalize import bake_addition, orthogonalize, with_mlp_bias
from tests.tolerances import assert_close

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_width": {"head_dim": 24},
    "mistral": {"architecture": "mistral", "sliding_window": 7},
    "bfloat16": {"dtype": "bfloat16"},
}
Checkpoint = Callable[..., Path]


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def written(model: Transformer, source: Path, folder: Path, dtype: str, **options: Any) -> Path:
    folder.mkdir()
    original = json.loads((source / "config.json").read_text())
    export.write_hugging_face(model, original, folder, dtype, **options)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(name: str, checkpoint: Checkpoint, tmp_path: Path):
    source = checkpoint(**CONFIGS[name])
    dtype = CONFIGS[name].get("dtype", "float32")
    model = jr.load_model(str(source), dtype=dtype)
    ours = stored(written(model, source, tmp_path / "out", dtype))
    theirs = stored(source)
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        assert ours[key].dtype == values.dtype, key
        np.testing.assert_array_equal(ours[key], values, err_msg=key)
    again = jr.load_model(str(tmp_path / "out"), dtype=dtype)
    assert again.arch == model.arch


def test_shards_and_their_index(tiny_dir: Path, model: Transformer, tmp_path: Path):
    folder = written(model, tiny_dir, tmp_path / "out", "float32", shard_bytes=200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        tensors = load_file(folder / file)
        assert {k for k, v in index["weight_map"].items() if v == file} == tensors.keys()
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 200_000
    total = sum(x.nbytes for x in stored(folder).values())
    assert index["metadata"]["total_size"] == total
    again = jr.load_model(str(folder))
    for path, leaf in model.leaves().items():
        np.testing.assert_array_equal(again.leaves()[path], leaf, err_msg=path)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is resident")
def test_a_file_that_was_read_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loading takes the weights and not their file too, and reads what is there."""
    monkeypatch.setattr("jax_refusal.checkpoints.tensors.OPEN_FOR", 2**22)
    given = {f"w{i}": np.full((2**10, 2**10), i, np.float32) for i in range(16)}  # 4 MiB each
    files = [tmp_path / f"{half}.safetensors" for half in range(2)]
    for half, file in enumerate(files):
        save_file({name: given[name] for name in list(given)[half::2]}, file)

    def resident() -> int:  # MiB of mapped files, also of those that lie in memory
        status = Path("/proc/self/status").read_text()
        kinds = ("RssFile:", "RssShmem:")
        return sum(int(status.split(kind)[1].split()[0]) for kind in kinds) // 2**10

    tensors, before = read_safetensors(files), resident()
    for name, expected in given.items():
        assert np.array_equal(tensors[name][3:9, ::2], expected[3:9, ::2])
        assert np.array_equal(tensors[name][:, :], expected)
        assert resident() - before < 16  # of 64


def test_weights_stay_in_the_memory_they_are_read_into(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[np.ndarray] = []
    own = hf._empty

    def noted(*size, **how) -> np.ndarray:
        read.append(own(*size, **how))
        return read[-1]

    monkeypatch.setattr(hf, "_empty", noted)
    leaves = jr.load_model(str(tiny_dir)).leaves().values()
    places = [leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in leaves]
    assert sorted(places) == sorted(array.ctypes.data for array in read)

    # Where a program will write over them, a CPU needs memory of its own.
    read.clear()
    arch, tensors = loading.read_checkpoint(locate(str(tiny_dir)))
    whole = hf.load(
        arch, tensors, sharding.make_mesh(), np.dtype(np.float32), donatable=True
    ).leaves()
    places = {leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in whole.values()}
    assert read and not places & {array.ctypes.data for array in read}


def test_tensors_fit_the_table_they_came_from(checkpoint: Checkpoint):
    for fields in CONFIGS.values():
        model = jr.load_model(str(checkpoint(**fields)))
        hf.check(model.arch, hf.stored(model))
        one = hf.stored(model)["model.layers.1.self_attn.o_proj.weight"]
        whole = one[(slice(None), slice(None))]
        np.testing.assert_array_equal(one[(slice(3, 5), slice(1, 2))], whole[3:5, 1:2])


def test_an_untied_head_and_a_new_bias_are_in_the_config(checkpoint: Checkpoint, tmp_path: Path):
    source = checkpoint(tie_word_embeddings=True)
    model = jr.load_model(str(source))
    direction = np.random.default_rng(0).normal(size=64)
    edited = bake_addition(orthogonalize(model, direction), direction, 2)
    folder = written(edited, source, tmp_path / "out", "float32")
    config = json.loads((folder / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["mlp_bias"]) == (False, True)
    again = jr.load_model(str(folder))
    assert again.arch == edited.arch
    for path, leaf in edited.leaves().items():
        np.testing.assert_array_equal(again.leaves()[path], leaf, err_msg=path)


def test_a_config_without_a_word_for_an_edit_is_refused(checkpoint: Checkpoint, tmp_path: Path):
    """Were a Mistral given an MLP bias, no program would read it."""
    source = checkpoint(architecture="mistral")
    arch = with_mlp_bias(jr.load_model(str(source)).arch)
    original = json.loads((source / "config.json").read_text())
    with pytest.raises(ExportError, match="mistral model has no field for what the edit changed"):
        export.config(arch, original, "float32")


def test_a_tensor_under_two_prefixes_is_refused(model: Transformer):
    wrapped = dataclasses.replace(model.arch, wrapped=True)
    both = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    with pytest.raises(ConversionError, match=r"holds model\.norm\.weight twice"):
        hf.unwrapped(wrapped, dict.fromkeys(both, 0))


# Orbax


def orbax_directory(model: Transformer, source: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    orbax.save(model, folder / "orbax")
    return folder


def test_orbax_gives_back_what_was_saved(tiny_dir: Path, model: Transformer, tmp_path: Path):
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    mesh = sharding.make_mesh(data=2, model=2)
    for again in (jr.load_model(str(folder)), jr.load_model(str(folder), mesh=mesh)):
        for path, leaf in model.leaves().items():
            np.testing.assert_array_equal(again.leaves()[path], leaf, err_msg=path)
    for path, leaf in leaves(model.arch).items():
        placed = sharding.named(mesh, leaf.axes, leaf.shape)
        assert again.leaves()[path].sharding == placed, path


def test_orbax_in_another_dtype(tiny_dir: Path, model: Transformer, tmp_path: Path):
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    again = jr.load_model(str(folder), dtype="bfloat16")
    for path, leaf in model.leaves().items():
        assert again.leaves()[path].dtype == jnp.bfloat16
        assert_close(again.leaves()[path].astype(jnp.float32), leaf, 2**-8, path)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"mlp_bias": True}]
)
def test_orbax_of_another_shape_is_refused(
    change: dict[str, Any], tiny_dir: Path, model: Transformer, tmp_path: Path
):
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConversionError, match="does not hold the leaves of its llama config"):
        jr.load_model(str(folder))


def test_a_damaged_orbax_folder(tiny_dir: Path, model: Transformer, tmp_path: Path):
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    for path in (folder / "orbax").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ConversionError, match=r"is damaged: .*_METADATA.* of another size"):
        jr.load_model(str(folder))
    listing = folder / "orbax.files.json"
    listing.write_text(json.dumps(dict.fromkeys(json.loads(listing.read_text()), 0)))
    with pytest.raises(ConversionError, match="is not a complete Orbax checkpoint"):
        jr.load_model(str(folder))


def test_a_lost_part_of_an_orbax_folder(tiny_dir: Path, model: Transformer, tmp_path: Path):
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    lost, cut, *_ = sorted((folder / "orbax/ocdbt.process_0/d").iterdir())
    lost.unlink()
    with pytest.raises(ConversionError, match=rf"is damaged: .*{lost.name}.* Convert the model"):
        jr.load_model(str(folder))
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=rf"is damaged: .*{cut.name}.* Convert the model"):
        jr.load_model(str(folder))
    listing = folder / "orbax.files.json"
    for content in ("", "[]", '{"_METADATA": 1, "_METADATA": 2}', None):
        listing.unlink() if content is None else listing.write_text(content)
        with pytest.raises(ConversionError, match=r"orbax\.files\.json is missing or damaged"):
            jr.load_model(str(folder))


@pytest.mark.parametrize("old", [b'"tree_metadata"', b"shape", b"{", b"64"])
def test_orbax_metadata_that_say_something_else(
    old: bytes, tiny_dir: Path, model: Transformer, tmp_path: Path
):
    """Files of the right size: Orbax raises whatever it meets."""
    folder = orbax_directory(model, tiny_dir, tmp_path / "saved")
    path = folder / "orbax/_METADATA"
    path.write_bytes(path.read_bytes().replace(old, b" " * len(old)))
    try:
        again = jr.load_model(str(folder))
    except ConversionError as error:
        assert "Convert the model again" in str(error)
        return
    for leaf, values in model.leaves().items():  # it did not need to know
        np.testing.assert_array_equal(again.leaves()[leaf], values, err_msg=leaf)


def test_orbax_with_a_nan_is_refused(tiny_dir: Path, model: Transformer, tmp_path: Path):
    arrays = model.leaves()
    arrays["blocks.0.up"] = arrays["blocks.0.up"].at[0, 0, 0].set(jnp.nan)
    broken = Transformer(model.arch, arrays)
    folder = orbax_directory(broken, tiny_dir, tmp_path / "saved")
    with pytest.raises(ConversionError, match=r"not finite.*blocks\.0\.up"):
        jr.load_model(str(folder))
