"""GGUF files as llama.cpp's converter writes them: the same model as the Hugging Face checkpoint.

The names of tensors come from the gguf package's own map, so that the table here is checked by
another; metadata, permuted heads and gains of norms are written as llama.cpp has them.
"""

import json
import shutil
import struct
import tracemalloc
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


def test_thousands_of_unknown_tensors_are_a_short_message(tmp_path: Path) -> None:
    writer = llama(tmp_path / "model.gguf")
    for i in range(3000):
        writer.add_tensor(f"vision.{i}", np.zeros(1, np.float32))
    with pytest.raises(ConversionError, match=r"vision\.0.* and 2980 more") as caught:
        jr.load_model(str(finish(writer)))
    assert len(str(caught.value)) < 1000


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


# Damaged files


def llama(path: Path, **fields: Any) -> gguf.GGUFWriter:
    """A writer with the metadata of a tiny Llama; a field is given as its value, or left out."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
    } | {key.replace("__", "."): value for key, value in fields.items() if key != "alignment"}
    for key, value in numbers.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        else:
            (writer.add_int64 if isinstance(value, int) else writer.add_float32)(
                f"llama.{key}", value
            )
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["a", "b"])
    return writer


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert writer.path is not None
    return Path(writer.path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attention__head_count", "two", "head_count is 'two', not a whole number"),
        ("attention__head_count", 0, "head_count is 0, which is no size"),
        ("attention__head_count", -2, "head_count is -2, not a whole number that is not negative"),
        ("attention__head_count_kv", [1, 2], r"head_count_kv is \[1, 2\], not a whole number"),
        ("embedding_length", 2**40, "embedding_length is 1099511627776, which is no size"),
        ("block_count", 10**6, r"says that it has 1000000 blocks, and holds 1 tensors"),
        ("feed_forward_length", 8.5, "feed_forward_length is 8.5, not a whole number"),
        ("rope__freq_base", float("nan"), "freq_base is nan, not a finite number"),
        ("rope__scaling__type", 3, "scaling.type is 3, not text"),
    ],
)
def test_metadata_of_another_type(field: str, value: Any, words: str, tmp_path: Path) -> None:
    writer = llama(tmp_path / "model.gguf", **{field: value})
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
    with pytest.raises(SourceError, match=words):
        jr.load_model(str(finish(writer)))


def raw(*parts: Any, count: int = 0, pairs: int = 1) -> bytes:
    """A GGUF file: text as a string of GGUF, bytes as they are, a number as 32 bits."""
    content = b"GGUF" + struct.pack("<IQQ", 3, count, pairs)
    for each in parts:
        if isinstance(each, str):
            content += struct.pack("<Q", len(each)) + each.encode()
        else:
            content += each if isinstance(each, bytes) else struct.pack("<I", each)
    return content


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


RAW: dict[str, tuple[bytes, str]] = {
    "a field twice": (raw("a", 4, 1, "a", 4, 2, pairs=2), "field 'a' is there twice"),
    "a tensor twice": (
        raw(*(("t", 1, u64(4), 0, u64(0)) * 2), count=2, pairs=0),
        "tensor 't' is there twice",
    ),
    "no alignment": (raw("general.alignment", 4, 0), "general.alignment is 0, not a power of two"),
    "an odd alignment": (raw("general.alignment", 4, 24), "general.alignment is 24"),
    "an alignment as text": (raw("general.alignment", 8, "32"), "general.alignment is '32', not"),
    "tokens as numbers": (
        raw("tokenizer.ggml.tokens", 9, 4, u64(2), 1, 2),
        "tokens is .*not a list of texts",
    ),
    "a key that is not text": (raw(u64(2) + b"\xff\xfe", 4, 1), "cannot read its header"),
    "a value that is not text": (raw("a", 8, u64(1) + b"\xff"), "cannot read its header"),
    "a long string": (raw("a", 8, u64(2**63)), "passes the end of the file"),
    "a long array": (raw("a", 9, 4, u64(2**40)), "more than 8388608 elements"),
    "an array beyond the end": (raw("a", 9, 4, u64(2**20)), "cannot read its header"),
    "arrays in arrays": (raw("a", 9, 9, u64(1), 9, u64(1)), "type 9, which is not known"),
    "an unknown type": (raw("a", 77, 1), "type 77, which is not known"),
    "many fields": (raw("a", 4, 1, pairs=2**60), "cannot read its header"),
    "many tensors": (raw(count=2**60, pairs=0), "cannot read its header"),
    "many axes": (raw("t", 2**31, u64(1), count=1, pairs=0), "has 2147483648 axes, at most 4"),
    "cut short": (raw("a", 8, "word")[:-2], "passes the end of the file"),
    "another version": (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9 is not supported"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_damaged_header(case: str, tmp_path: Path) -> None:
    content, words = RAW[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    for read in (jr.load_model, jr.load_chat):
        with pytest.raises(SourceError, match=words):
            read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (2, 2**40)}, r"ends at byte \d+ of \d+ in model\.gguf"),
        ({"shape": (0, 8)}, r"token_embd\.weight has shape \(0, 8\)"),
        ({"shape": ()}, r"has shape \(\)"),
        ({"kind": 999}, "is of type 999, which is not known"),
        ({"kind": 4}, "is of type 4, which is not known"),  # of files before 2024
        ({"kind": 8}, r"has shape \(2, 8\), whose rows are Q8_0"),
        ({"offset": 2**62}, "ends at byte"),
        ({"offset": 64}, "ends at byte"),
    ],
)
def test_a_tensor_that_is_not_in_the_file(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shape, kind, offset = ({"shape": (2, 8), "kind": 0, "offset": 0} | change).values()
    path = tmp_path / "model.gguf"
    writer = llama(path)
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
    whole = finish(writer).read_bytes()
    at = whole.index(b"token_embd.weight") + len("token_embd.weight")
    axes = struct.pack("<I", len(shape)) + u64(*reversed(shape))
    info = axes + struct.pack("<IQ", kind, offset)
    head = whole[:at] + info
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(64))
    with pytest.raises(ConversionError, match=words):
        jr.load_model(str(path))


def test_tensors_that_overlap(tmp_path: Path) -> None:
    writer = llama(tmp_path / "model.gguf")
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    path = finish(writer)
    content = path.read_bytes()
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 16
    path.write_bytes(content[:at] + u64(32) + content[at + 8 :])
    with pytest.raises(ConversionError, match=r"output_norm\.weight overlaps token_embd\.weight"):
        jr.load_model(str(path))


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for value in (2, 7):
        path.write_bytes(raw("general.alignment", 4, value))
        with pytest.raises((SourceError, UnsupportedModel), match=f"is {value}|no metadata field"):
            jr.load_model(str(path))
