"""The decoder's leaves as files that other programs read: the way back of hf.py.

Letters: L layers, D residual width.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.sources import Source, inside
from jax_refusal.checkpoints.tensors import Tensor
from jax_refusal.families.registry import QUANTISATION, architecture, family_of
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import Architecture, Mlp, UnsupportedModel

SHARD_BYTES = 5 * 10**9  # of one safetensors file
DTYPES = ("float32", "bfloat16", "float16")  # that weights are written in
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# What belongs to a model beside its weights and config. Code of a checkpoint is not copied.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class ExportError(ValueError):
    """A model that the asked-for format cannot hold; the message says why."""


def numpy_dtype(name: str) -> np.dtype:
    """One of DTYPES as numpy knows it."""
    return np.dtype(np.float16) if name == "float16" else hf.numpy_dtype(name)


def stored_dtype(source: Source, original: Mapping[str, Any]) -> str:
    """The dtype that a source's weights are written in again, one of DTYPES.

    As transformers finds it: what config.json says, or the text_config in it; without a word, that
    of the first tensor. Packed weights leave in what is beside them. What is wider, or a GGUF
    file's, is float32.
    """
    text = original.get("text_config")
    configs = [original, text if isinstance(text, Mapping) else {}]
    found = [config.get(key) for config in configs for key in ("dtype", "torch_dtype")]
    said = next((str(each).removeprefix("torch.") for each in found if each is not None), "")
    if original.get("quantization_config"):
        return "float16" if said == "float16" else "bfloat16"
    if not said and source.directory is not None and source.orbax is None:
        said = _first_dtype(source.weight_files()[0])
    return said if said in DTYPES else "float32"


def _first_dtype(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        dtypes = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118
    return {"F16": "float16", "BF16": "bfloat16"}.get(dtypes[0], "") if dtypes else ""


def config(
    arch: Architecture,
    original: Mapping[str, Any],
    dtype: str,
    ignore: tuple[str, ...] = (),  # fields that the user vouched for when the model was loaded
) -> dict[str, Any]:
    """The original config.json with what an edit changed; weights leave dequantised.

    Of a multimodal checkpoint it is the text model's own, as the tensors of `hf.stored` are.
    Raises ExportError where the family's config has no word for the architecture.
    """
    original = {name: original[name] for name in original if name not in QUANTISATION}
    if arch.wrapped:
        original = _text(arch, original)
    key = "dtype" if "dtype" in original else "torch_dtype"
    changed = {**original, "tie_word_embeddings": arch.tied_head, key: dtype}
    if named := family_of(arch).export_class:
        changed.setdefault("architectures", [named])
    branches = [branch for spec in arch.specs for _, branch in spec.branches]
    if any(isinstance(branch, Mlp) and branch.bias for branch in branches):
        changed["mlp_bias"] = True
    # Neither how the source names its tensors nor what lay around them is for a config to say.
    meant = dataclasses.replace(arch, wrapped=False)
    try:
        read = architecture(changed, ignore)
        same = dataclasses.replace(read, naming=arch.naming) == meant
    except UnsupportedModel:
        same = False
    if not same:
        raise ExportError(
            f"The config.json of a {arch.family} model has no field for what the edit changed, so "
            "that no other program would read the edited weights as they are."
        )
    return changed


def _text(arch: Architecture, wrapper: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model inside, with what only the wrapper says of it."""
    said = ("dtype", "torch_dtype", "transformers_version", *SPECIAL)
    outer = {name: wrapper[name] for name in said if wrapper.get(name) is not None}
    inner = {k: v for k, v in wrapper["text_config"].items() if k not in QUANTISATION}
    if {"dtype", "torch_dtype"} & set(inner):  # one of the two names
        outer = {name: outer[name] for name in outer if not name.endswith("dtype")}
    given = {name: value for name, value in inner.items() if value is not None or name not in outer}
    return {**outer, **given, "architectures": [family_of(arch).export_class]}


def write_hugging_face(
    model: Transformer,
    original: Mapping[str, Any],  # config.json of the source
    folder: Path,
    dtype: str,
    ignore: tuple[str, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """config.json and the safetensors shards of the model, indexed where there are several."""
    from safetensors.numpy import save_file

    write_json(folder / "config.json", config(model.arch, original, dtype, ignore))
    wanted = numpy_dtype(dtype)
    found = hf.stored(model)
    shards = list(_shards(found, wanted.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        whole = {n: found[n][(slice(None),) * len(found[n].shape)].astype(wanted) for n in names}
        save_file(
            {name: np.ascontiguousarray(x) for name, x in whole.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = wanted.itemsize * sum(math.prod(tensor.shape) for tensor in found.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def beside(source: Path) -> list[Path]:
    """The tokenizer, the generation config and the licence of a Hugging Face directory.

    Raises SourceError for a link that leads out of it: what it leads to is not the checkpoint's.
    """
    there = {path for pattern in BESIDE for path in source.glob(pattern)}
    found = (inside(source, path.name) for path in sorted(there))
    return [path for path in found if path.is_file() and path.suffix != ".py"]


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names make a tokenizer, or part of one."""
    return any(name.startswith(("tokenizer", "vocab.json", "qwen.tiktoken")) for name in names)


def copy_beside(source: Path, folder: Path) -> None:
    """Copies what is `beside` the weights."""
    for path in beside(source):
        shutil.copyfile(path, folder / path.name)


def write_tokenizer(tokenizer: Any, stop_ids: tuple[int, ...], folder: Path) -> None:
    """The tokenizer that was inside a GGUF file, and a generation config that ends replies."""
    tokenizer.save_pretrained(str(folder))
    stops = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(stop_ids)}
    write_json(folder / "generation_config.json", stops)


def write_control_vector(
    path: Path,
    vector: np.ndarray,  # [D], what is added
    layer: int,
    arch: Architecture,
) -> None:
    """A GGUF control vector that llama.cpp adds to the input of block `layer`, at every token.

    llama.cpp adds `direction.N` to the output of block N, which is the input of block N + 1, and
    knows no direction.0: so layers 0 and 1 cannot be reached.
    """
    import gguf

    if not 2 <= layer < arch.layers:
        raise ExportError(
            f"layer={layer}: llama.cpp adds direction.N behind block N, from N = 1 on: a control "
            f"vector can act on the input of layers 2 to {arch.layers - 1}."
        )
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", arch.family)
    writer.add_uint32("controlvector.layer_count", arch.layers - 1)
    writer.add_tensor(f"direction.{layer - 1}", np.asarray(vector, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shards(found: Mapping[str, Tensor], itemsize: int, most: int) -> Iterator[list[str]]:
    """Names in order, cut where a file would pass `most` bytes."""
    names: list[str] = []
    size = 0
    for name, tensor in found.items():
        bytes_ = itemsize * math.prod(tensor.shape)
        if names and size + bytes_ > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
