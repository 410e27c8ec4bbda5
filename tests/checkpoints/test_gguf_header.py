"""GGUF files that say what no file should: one error each, and no memory for what is not there."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.models.spec import UnsupportedModel


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


def test_thousands_of_unknown_tensors_are_a_short_message(tmp_path: Path) -> None:
    writer = llama(tmp_path / "model.gguf")
    for i in range(3000):
        writer.add_tensor(f"vision.{i}", np.zeros(1, np.float32))
    with pytest.raises(ConversionError, match=r"vision\.0.* and 2980 more") as caught:
        jr.load_model(str(finish(writer)))
    assert len(str(caught.value)) < 1000
