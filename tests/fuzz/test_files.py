"""Damaged files of every kind that is read: the right numbers, or one error of the library.

What is right says the library that wrote the file, where it reads the damaged one at all. A fault
names its seed and case; FUZZ_CASES=20000 FUZZ_SEED=7 runs a long campaign.
"""

import io
import itertools
import json
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save

from jax_refusal.checkpoints import gguf as gguf_file
from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.gguf_header import read_header
from jax_refusal.checkpoints.sources import Source, SourceError, fingerprint
from jax_refusal.checkpoints.tensors import ConversionError, Tensor, read_safetensors
from jax_refusal.checkpoints.torch_pickle import TorchFileError, read_torch
from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf
from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import UnsupportedModel
from jax_refusal.study.directions import DirectionError, read_direction
from tests.fuzz.damage import altered, as_json, campaign, damaged, rearranged

ERRORS = (SourceError, ConversionError, UnsupportedModel, TorchFileError, DirectionError)


def values(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor[(slice(None),) * len(tensor.shape)]
        assert found[name].shape == tensor.shape
    return found


def same(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    """Equal to the bit, NaN too."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        other = np.asarray(theirs[name])
        assert array.dtype == other.dtype and array.shape == other.shape, name
        assert array.tobytes() == other.tobytes(), name


RNG = np.random.default_rng(0)
TENSORS = {
    "model.embed.weight": RNG.normal(size=(5, 4)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=4).astype(np.float16),
    "head": RNG.normal(size=(2, 2)),
}


# Safetensors files and their index


def merged(files: list[Path]) -> dict[str, np.ndarray]:
    """The tensors of some files as their library reads them, those of later files first."""
    found: dict[str, np.ndarray] = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_safetensors(tmp_path: Path) -> None:
    whole, path = save(TENSORS), tmp_path / "a.safetensors"
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])

    def check(rng: np.random.Generator) -> None:
        if rng.random() < 0.3:
            path.write_bytes(damaged(rng, whole, range(end)))
        else:
            text = as_json(rng, altered(rng, header))
            path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
        same(values(read_safetensors([path])), merged([path]))

    campaign(check, ERRORS)


def damaged_json(rng: np.random.Generator, value: Any) -> bytes:
    if rng.random() < 0.3:
        return damaged(rng, json.dumps(value).encode())
    return as_json(rng, altered(rng, value))


def test_indexes(tmp_path: Path) -> None:
    names = list(TENSORS)
    files = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, inside in files.items():
        (tmp_path / file).write_bytes(save({name: TENSORS[name] for name in inside}))
    weight_map = {name: file for file, inside in files.items() for name in inside}
    index = tmp_path / "model.safetensors.index.json"
    whole = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    source = Source("x", directory=tmp_path)

    def check(rng: np.random.Generator) -> None:
        index.write_bytes(damaged_json(rng, whole))
        found = source.weight_files()
        stated = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        same(values(read_safetensors(found)), merged([tmp_path / name for name in stated]))

    campaign(check, ERRORS)


def test_configs(tmp_path: Path) -> None:
    fields = {"model_type": "llama", "hidden_size": 64, "rope_scaling": {"factor": 2.0, "a": [1]}}
    source = Source("x", directory=tmp_path)

    def check(rng: np.random.Generator) -> None:
        (tmp_path / "config.json").write_bytes(damaged_json(rng, fields))
        found = source.config()
        # As text, since NaN is not equal to itself.
        assert json.dumps(found) == json.dumps(json.loads((tmp_path / "config.json").read_bytes()))

    campaign(check, ERRORS)


# GGUF


def write_gguf(path: Path, most: int = 0) -> Path:
    """A Llama of one layer, some of whose tensors are quantised; in parts of so many tensors."""
    D, F, V = 32, 32, 12
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *"abcdefgh", "ab", "cd"])
    writer.add_token_types([3, 3, *[1] * 10])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    blocks = {f"attn_{x}": (D, D) for x in ("q", "k", "v", "output")} | {"ffn_down": (D, F)}
    blocks |= {"ffn_gate": (F, D), "ffn_up": (F, D), "attn_norm": (D,), "ffn_norm": (D,)}
    shapes = {"token_embd": (V, D), **{f"blk.0.{k}": x for k, x in blocks.items()}}
    shapes |= {"output_norm": (D,), "output": (V, D)}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in name and len(shape) > 1 else None
        array = RNG.normal(size=shape).astype(np.float32)
        stored = gguf.quantize(array, kind) if kind is not None else array
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(value: Any) -> tuple[int, bytes]:
    """GGUF's type of a value, and the value as its bytes."""
    if isinstance(value, bool):
        return 7, bytes([value])
    if isinstance(value, int):
        return (10, value.to_bytes(8, "little")) if value >= 0 else (5, b"\xff" * 4)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    items = [packed(each) for each in value] or [(4, b"")]
    alike = [content for kind, content in items if kind == items[0][0]]
    return 9, struct.pack("<IQ", items[0][0], len(alike) * bool(value)) + b"".join(alike)


def rebuilt(header: dict[str, Any], data: bytes) -> bytes:
    """A GGUF file with this header, valid as far as the header can say something invalid."""
    fields, tensors = header.get("fields", {}), header.get("tensors", {})
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, value in fields.items():
        kind, value = packed(value)
        content += packed(key)[1] + struct.pack("<I", kind) + value
    for name, (shape, kind, offset) in tensors.items():
        content += packed(name)[1] + struct.pack("<I", len(shape))
        content += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    return content + bytes(-len(content) % 32) + data


def test_gguf_headers(tmp_path: Path) -> None:
    """Headers that are well formed and say something else."""
    written = read_header(write_gguf(tmp_path / "whole.gguf"))
    start = min(tensor.offset for tensor in written.tensors)
    data = (tmp_path / "whole.gguf").read_bytes()[start:]
    tensors = {t.name: [list(t.shape[::-1]), t.kind, t.offset - start] for t in written.tensors}
    header = {"fields": written.metadata, "tensors": tensors}
    path = tmp_path / "model.gguf"
    path.write_bytes(rebuilt(header, data))
    check_gguf(path)

    def check(rng: np.random.Generator) -> None:
        try:
            path.write_bytes(rebuilt(altered(rng, header), data))
        except (TypeError, ValueError, OverflowError, AttributeError, struct.error):
            raise SourceError("this header cannot be written") from None
        check_gguf(path)
        check_tokenizer(path)

    campaign(check, ERRORS)


def check_tokenizer(path: Path) -> None:
    try:
        tokenizer_from_gguf(path)
    except ValueError as error:  # what `load_chat` makes a SourceError of
        raise SourceError(str(error)) from None


def check_gguf(path: Path) -> None:
    """The model as it is read, and as the gguf package reads it; and its tokenizer."""
    arch = architecture(gguf_file.read_config(path))
    tensors = hf.unwrapped(arch, gguf_file.read_tensors(path, arch))
    hf.check(arch, tensors)
    found = values(tensors)
    assert fingerprint(Source("x", gguf=path))
    try:
        theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    except Exception:  # of any kind: it is no judge of this file
        return
    norm = theirs.get("output_norm.weight")
    if norm is not None:
        np.testing.assert_array_equal(found["model.norm.weight"], norm.data)
    down = theirs.get("blk.0.ffn_down.weight")
    if down is not None:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(down.data, down.tensor_type)
        np.testing.assert_array_equal(found["model.layers.0.mlp.down_proj.weight"], expected)


def test_gguf(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path, header = tmp_path / "model.gguf", range(whole.index(b"output.weight") + 60)

    def check(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, whole, header))
        check_gguf(path)

    campaign(check, ERRORS)


def test_parts_of_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", most=5)
    parts = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert len(parts) == 3

    def check(rng: np.random.Generator) -> None:
        paths = list(parts)
        for path, content in parts.items():
            path.write_bytes(content)
        changed = paths[rng.integers(3)]
        header = parts[changed]
        changed.write_bytes(damaged(rng, header, range(header.rindex(b".weight") + 32)))
        check_gguf(paths[rng.integers(3)])

    campaign(check, ERRORS)


def test_tokenizers_in_gguf(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    places = range(whole.index(b"tokenizer.ggml.model"), whole.index(b"token_embd"))

    def check(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, whole, places))
        check_tokenizer(path)

    campaign(check, ERRORS)


# Directions


def test_torch_files(tmp_path: Path) -> None:
    """The pickle is damaged, and then the archive around it."""
    path = tmp_path / "d.pt"
    grid = torch.tensor(TENSORS["model.embed.weight"])
    torch.save({"a": [grid[1], grid.half()], 15: {"b": grid.T, "c": (None, 2.5, "x", True)}}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    (pickle,) = (name for name in entries if name.endswith("data.pkl"))
    places = [at for _, _, at in pickletools.genops(entries[pickle])]
    cuts = [*places, len(entries[pickle])]
    instructions = [entries[pickle][i:j] for i, j in itertools.pairwise(cuts)]

    def check(rng: np.random.Generator) -> None:
        if rng.random() < 0.2:
            path.write_bytes(damaged(rng, whole))
        else:
            changed = rearranged(rng, instructions)
            if rng.random() < 0.2:
                changed = damaged(rng, entries[pickle])
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in entries.items():
                    archive.writestr(name, changed if name == pickle else content)
        ours = read_torch(path)
        try:
            theirs = torch.load(path, weights_only=True)
        except Exception:  # of any kind: it is no judge of this file
            return
        equal(ours, theirs)

    campaign(check, ERRORS)


def equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, np.ndarray) and ours.shape == tuple(theirs.shape)
        assert ours.tobytes() == theirs.detach().numpy().tobytes()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            equal(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other)
    else:
        assert type(ours) is type(theirs) and repr(ours) == repr(theirs)


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npy", "npz"])
def test_directions(suffix: str, tmp_path: Path) -> None:
    path, array = tmp_path / f"d.{suffix}", TENSORS["head"]
    buffer = io.BytesIO()
    if suffix == "pt":
        torch.save({"a": torch.tensor(array)}, buffer)
    elif suffix == "safetensors":
        buffer.write(save({"a": array}))
    elif suffix == "npy":
        np.save(buffer, array)
    else:
        np.savez_compressed(buffer, a=array)
    whole = buffer.getvalue()

    def check(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, whole))
        found = read_direction(path)
        assert found.dtype == np.float64 and np.isfinite(found).all() and found.size < 10**6

    campaign(check, ERRORS)
