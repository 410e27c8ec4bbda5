"""GGUF files as llama.cpp's converter writes them: the same model as the Hugging Face checkpoint.

The names of tensors come from the gguf package's own map, so that the table here is checked by
another; metadata, permuted heads and gains of norms are written as llama.cpp has them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.checkpoints import gguf as gguf_file
from jax_refusal.checkpoints.gguf_header import Header
from jax_refusal.checkpoints.sources import SourceError, fingerprint, locate
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import UnsupportedModel
from tests.models.cases import SMALL, fields
from tests.models.test_families import stored

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # GGUF architecture, checkpoint
    "llama": ("llama", SMALL),
    "qwen2": ("qwen2", fields("qwen2")),
    "qwen3": ("qwen3", fields("qwen3_tied_bias", attention_bias=False)),
    "gemma": ("gemma", fields("gemma")),
    "gemma2": ("gemma2", fields("gemma2", query_pre_attn_scalar=24)),
    "gemma3": (
        "gemma3",
        fields(
            "gemma3_text", query_pre_attn_scalar=24, sliding_window_pattern=6, num_hidden_layers=7
        ),
    ),
}


def write(source: Path, arch: str, path: Path, most: int = 0) -> Path:
    """The checkpoint in `source` as a GGUF file, or in parts of at most so many tensors."""
    config = json.loads((source / "config.json").read_text())
    tensors, layers = stored(source), config["num_hidden_layers"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=most)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_token_list([str(i) for i in range(config["vocab_size"])])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if arch == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, layers)
    for name, values in tensors.items():
        projection = name.split(".")[-2]
        if arch == "llama" and projection in heads:
            halves = values.reshape(heads[projection], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        if arch.startswith("gemma") and projection.endswith("norm"):
            values = values + np.float32(1)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_same_model(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    arch, case = CASES[name]
    source = checkpoint(**case)
    ours = jr.load_model(str(write(source, arch, tmp_path / "model.gguf")))
    theirs = jr.load_model(str(source))
    assert ours.arch == theirs.arch
    for leaf, values in theirs.leaves().items():
        # A gain of 1 + w keeps w to the rounding of 1.
        loose = arch.startswith("gemma") and leaf.endswith("norm")
        np.testing.assert_allclose(
            ours.leaves()[leaf], values, rtol=0, atol=2e-7 if loose else 0, err_msg=leaf
        )


@pytest.mark.parametrize(
    ("arch", "layers", "width", "expected"), [("gemma2", 46, 4608, 144), ("gemma3", 62, 5376, 168)]
)
def test_the_largest_gemmas_scale_scores_by_their_own_rule(
    arch: str, layers: int, width: int, expected: int
) -> None:
    """No file says it: the 27B models are known by L, and have D / H in the place of K = 128."""
    sizes = {
        "block_count": layers,
        "embedding_length": width,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
        "attention.key_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "context_length": 8192,
        "feed_forward_length": 4 * width,
    }
    fields = {f"{arch}.{key}": value for key, value in sizes.items()}
    fields |= {"general.architecture": arch, "tokenizer.ggml.tokens": ["a", "b"]}
    for count, scale in ((layers, expected), (26, 128)):
        header = Header(order="<", metadata=fields | {f"{arch}.block_count": count}, tensors=())
        config = gguf_file._config(header, Path("model.gguf"))
        mixers = [spec.mixer for spec in architecture(config).specs]
        assert {mixer.score_scale for mixer in mixers} == {scale**-0.5}


def test_another_architecture_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write(checkpoint(**fields("qwen2")), "qwen2", tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"qwenX"))
    with pytest.raises(UnsupportedModel, match="GGUF architecture 'qwenX'; supported are"):
        jr.load_model(str(path))


def test_every_tensor_that_the_model_does_not_have_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(checkpoint(**SMALL), "llama", tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b".attn_q.w", b".attn_z.w"))
    with pytest.raises(ConversionError, match=r"llama model.*blk\.0\.attn_z.*blk\.1\.attn_z"):
        jr.load_model(str(path))


# Parts


@pytest.fixture(scope="module")
def parts(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in three parts."""
    folder = tmp_path_factory.mktemp("parts")
    write(checkpoint(**SMALL), "llama", folder / "model.gguf", most=15)
    assert [path.name for path in sorted(folder.iterdir())] == [part(i) for i in (1, 2, 3)]
    return folder


def part(number: int, count: int = 3) -> str:
    return f"model-{number:05}-of-{count:05}.gguf"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_stands_for_all(
    number: int, parts: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = locate(str(parts / part(number)))
    theirs = jr.load_model(str(write(checkpoint(**SMALL), "llama", tmp_path / "whole.gguf")))
    ours = jr.load_model(source)
    assert ours.arch == theirs.arch
    for leaf, values in theirs.leaves().items():
        np.testing.assert_array_equal(ours.leaves()[leaf], values, err_msg=leaf)
    assert source.weight_files() == [parts / part(i) for i in (1, 2, 3)]
    assert fingerprint(source) == fingerprint(locate(str(parts / part(1))))


def test_every_part_is_in_the_fingerprint(parts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts, tmp_path / "parts"))
    content = bytearray((folder / part(3)).read_bytes())
    content[-1] ^= 1
    (folder / part(3)).write_bytes(content)
    found = [fingerprint(locate(str(place / part(1)))) for place in (parts, folder)]
    assert found[0] != found[1]


def test_a_part_that_lacks_the_others(parts: Path, tmp_path: Path) -> None:
    shutil.copy(parts / part(2), tmp_path)
    words = r"lacks 2 of the 3 parts of this model: \['model-00001-of-00003\.gguf', 'model-00003"
    with pytest.raises(SourceError, match=words):
        jr.load_model(str(tmp_path / part(2)))
    (tmp_path / part(2)).rename(tmp_path / "renamed.gguf")
    with pytest.raises(SourceError, match=r"part 2 of 3: its name has to end in -00002-of-00003"):
        jr.load_model(str(tmp_path / "renamed.gguf"))


@pytest.mark.parametrize("foreign", [1, 2, 3])
def test_a_part_of_another_model(
    foreign: int, parts: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """One of another number of layers; and one of the parts twice."""
    folder = Path(shutil.copytree(parts, tmp_path / "parts"))
    other = tmp_path / "other"
    other.mkdir()
    source = checkpoint(**SMALL, num_hidden_layers=3)
    write(source, "llama", other / "model.gguf", most=11)
    shutil.copy(other / part(foreign), folder / part(foreign))
    with pytest.raises(SourceError, match=r"is not part . of 3 of the model|are not of one model"):
        jr.load_model(str(folder / part(1)))
    shutil.copytree(parts, folder, dirs_exist_ok=True)
    shutil.copy(parts / part(foreign), folder / part(foreign % 3 + 1))
    with pytest.raises(
        SourceError, match=r"is not part . of 3 .* differs in \['split\.no'|says that it is"
    ):
        jr.load_model(str(folder / part(foreign)))


def test_a_part_behind_a_link(parts: Path, tmp_path: Path) -> None:
    """The file that is named may be a link, as every file may; what lies beside it may not."""
    folder = Path(shutil.copytree(parts, tmp_path / "parts"))
    (folder / part(2)).unlink()
    (folder / part(2)).symlink_to(parts / part(2))
    with pytest.raises(SourceError, match=r"is or lies behind a link"):
        jr.load_model(str(folder / part(1)))
