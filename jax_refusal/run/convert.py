"""A model, edited or not, written for other programs; with a card that says what was done to it.

Formats: a Hugging Face directory, an Orbax one for fast sharded reload, a LoRA adapter of rank 1 in
the PEFT format, a GGUF control vector for llama.cpp. The directory is written whole or not at all.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_refusal import config as configs
from jax_refusal.checkpoints import export, lora, orbax
from jax_refusal.checkpoints.export import ExportError
from jax_refusal.checkpoints.loading import load_model, read_checkpoint, read_config
from jax_refusal.checkpoints.quantised import registry as quantised
from jax_refusal.checkpoints.sources import Source, file_sha256, fingerprint, locate
from jax_refusal.data.chat import load_chat
from jax_refusal.edits import Edit, ablate, add, multiple, unit_vector
from jax_refusal.fields import FINITE
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import Architecture
from jax_refusal.report.model_card import model_card
from jax_refusal.run.directions import model_of
from jax_refusal.run.folders import whole_folder
from jax_refusal.run.measured import measured
from jax_refusal.run.study import CHOICE, read_run
from jax_refusal.run.workdir import versions
from jax_refusal.study import orthogonalize as weights
from jax_refusal.study.directions import IN_WORKDIR, check_width, read_direction

EDITS = ("none", "orthogonalize", "addition")
FORMATS = ("hf", "orbax", "peft", "gguf-control-vector")
# What a format can hold.
HOLDS = {
    "hf": EDITS,
    "orbax": EDITS,
    "peft": ("orthogonalize",),
    "gguf-control-vector": ("addition",),
}
CONTROL_VECTOR = "control_vector.gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written; empty fields are taken from the workdir, or from the source."""

    to: str
    out: str
    edit: str = "none"
    source: str = ""
    adapter: str = ""  # a PEFT LoRA adapter to merge into the source
    workdir: str = ""  # of a run: gives source, adapter and direction
    direction: str = ""  # a .pt or .safetensors file
    tensor: str = ""  # which one, where the file holds several
    layer: int | None = None  # of an addition
    coefficient: float = 1.0  # of an addition, multiple of the direction
    dtype: str = ""  # float32, bfloat16 or float16; empty is that of the source
    approximate: bool = False  # go on where an edit of the weights is not exact
    ignore_config_fields: tuple[str, ...] = ()  # of config.json that you vouch for


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model and the direction that a request asks for, found and checked."""

    source: Source
    adapter: str
    ignore: tuple[str, ...]
    config: dict[str, Any]  # config.json, or what a GGUF file says in its words
    arch: Architecture
    dtype: str  # of what is written
    direction: np.ndarray | None  # [D]
    layer: int | None
    facts: dict[str, Any]  # for the card

    @property
    def computed(self) -> str:
        """The dtype of the model here, which holds every number of what is written."""
        return "float32" if self.dtype == "float16" else self.dtype


def convert(request: Request, log: Callable[[str], None] = print) -> Path:
    """Writes what the request asks for and returns its directory.

    Raises ExportError, WeightEditError, EditError, DirectionError, and the errors of sources and
    workdirs.
    """
    _check(request)
    origin = _origin(request)
    facts = origin.facts
    with whole_folder(Path(request.out)) as folder:
        if request.to == "gguf-control-vector":
            assert origin.direction is not None and origin.layer is not None
            vector = np.asarray(multiple(origin.direction, request.coefficient))
            export.write_control_vector(folder / CONTROL_VECTOR, vector, origin.layer, origin.arch)
        else:
            log(f"loading {origin.source.name}")
            model = load_model(
                origin.source,
                origin.computed,
                adapter=origin.adapter or None,
                ignore_config_fields=origin.ignore,
            )
            edited = _edited(model, request, origin)
            facts |= {"edited leaves": _changed(model, edited)}
            edited = _as_written(edited, origin.dtype)
            if request.edit != "none":
                edit = _in_the_stream(request, origin)
                facts |= {"measured": measured(model, edited, edit, origin.source)}
            _write(edited, model, request, origin, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
        text = model_card(dataclasses.asdict(request), facts, hashes, versions())
        (folder / "README.md").write_text(text, encoding="utf-8")
    log(f"wrote {request.out}")
    return Path(request.out)


def _check(request: Request) -> None:
    """What can be said without reading anything."""
    problems = []
    if request.to not in HOLDS:
        problems.append(f"--to={request.to} (allowed: {', '.join(FORMATS)})")
    if request.edit not in EDITS:
        problems.append(f"--edit={request.edit} (allowed: {', '.join(EDITS)})")
    if not problems and request.edit not in HOLDS[request.to]:
        problems.append(
            f"--to={request.to} cannot hold --edit={request.edit} (it holds: "
            f"{', '.join(HOLDS[request.to])})"
        )
    if request.dtype not in ("", *export.DTYPES):
        problems.append(f"--dtype={request.dtype} (allowed: {', '.join(export.DTYPES)})")
    if not request.source and not request.workdir:
        problems.append("--source or --workdir has to name the model")
    if request.edit == "none" and request.direction:
        problems.append("--direction goes with --edit=orthogonalize or --edit=addition")
    if request.adapter and request.workdir:
        problems.append("--adapter goes with --source: a --workdir brings its own")
    if request.edit != "none" and not request.direction and not request.workdir:
        problems.append(f"--edit={request.edit} needs --direction or --workdir")
    if request.edit == "addition" and request.layer is None and request.direction:
        problems.append("--edit=addition of a --direction needs its --layer")
    if request.edit != "addition" and request.layer is not None:
        problems.append("--layer goes with --edit=addition")
    if request.coefficient not in FINITE:
        problems.append(f"--coefficient={request.coefficient} (allowed: {FINITE})")
    elif request.edit == "addition" and not request.coefficient:
        problems.append("--coefficient=0 adds nothing: --edit=none is the unedited model")
    elif request.edit != "addition" and request.coefficient != 1:
        problems.append("--coefficient goes with --edit=addition")
    if jax.process_count() > 1:
        problems.append(f"it runs in one process, and there are {jax.process_count()}")
    out = Path(request.out)
    if out.is_symlink():
        problems.append(f"--out={out} is a link; name the folder that it leads to")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"--out={out} is there already and not empty; nothing is overwritten")
    if problems:
        raise ExportError("This cannot be converted: " + "; ".join(problems) + ".")


def _origin(request: Request) -> Origin:
    """Finds the model and the direction, and checks that they belong together."""
    facts: dict[str, Any] = {}
    config, layer = configs.RunConfig(), request.layer
    recorded = None  # fingerprint of the model that the direction was found in
    if request.workdir:
        work, config = read_run(request.workdir)
        recorded = work.manifest["identity"].get("model")
        if request.edit != "none" and not request.direction:
            if not work.done("selection"):
                raise ExportError(f"{request.workdir} has no selected direction: finish the run.")
            choice = work.read_json(CHOICE)
            layer = choice["layer"] if layer is None else layer
            c = config.selection
            thresholds = {"kl": c.kl_threshold, "induce": c.induce_threshold}
            facts |= {"choice": choice, "thresholds": thresholds | {"pruned": c.prune_layers}}
    source = locate(request.source or config.model.source)
    found = fingerprint(source)
    _check_model(source, found, recorded, request.workdir)
    adapter = request.adapter or config.model.adapter
    if adapter and request.to == "peft":
        raise ExportError(
            f"The model has the adapter {adapter} merged in, and an adapter of rank 1 cannot "
            "hold both. Convert to a Hugging Face directory instead."
        )
    ignore = (*config.model.ignore_config_fields, *request.ignore_config_fields)
    arch, _ = read_checkpoint(source, ignore)
    original = read_config(source)
    dtype = request.dtype or export.stored_dtype(source, original)
    if source.directory is not None:
        export.beside(source.directory)  # refused before anything is computed
    facts |= {"source": source.name, "fingerprint": found, "dtype": dtype, "family": arch.family}
    facts |= {"packed": quantised.label(original, ignore)}
    if adapter:
        facts |= {"adapter": adapter, "adapter_fingerprint": lora.fingerprint(adapter)}
    direction = None
    if request.edit != "none":
        path = request.direction or request.workdir
        direction = check_width(read_direction(path, request.tensor), arch.width, path)
        _check_model(source, found, model_of(path), path)
        file = Path(path).expanduser()
        file = file / IN_WORKDIR if file.is_dir() else file
        unit_vector(direction)  # refused before anything is computed
        norm = float(np.linalg.norm(direction))
        facts["direction"] = {"file": str(file), "sha256": file_sha256(file), "norm": norm}
        if request.edit == "addition" and not multiple(direction, request.coefficient).any():
            raise ExportError(
                f"--coefficient={request.coefficient:g} times a direction of norm {norm:.3g} is "
                "zero in float32: there is nothing to add."
            )
    return Origin(
        source, adapter, ignore, original, arch, dtype, direction, layer, facts | {"layer": layer}
    )


def _check_model(source: Source, found: str, recorded: str | None, workdir: str) -> None:
    """ExportError where a run was of other weights than these, by their fingerprints."""
    if recorded not in (None, found):
        raise ExportError(
            f"{source.name} is not the model of {workdir}: its fingerprint is {found[:16]}..., the "
            f"run's is {recorded[:16]}.... A direction belongs to the weights it was found in."
        )


def _edited(model: Transformer, request: Request, origin: Origin) -> Transformer:
    if request.edit == "none":
        return model
    assert origin.direction is not None
    if request.to == "peft":
        return lora.merge(model, weights.rank_one(model, origin.direction))
    if request.edit == "orthogonalize":
        return weights.orthogonalize(model, origin.direction, approximate=request.approximate)
    assert origin.layer is not None
    return weights.bake_addition(
        model,
        origin.direction,
        origin.layer,
        request.coefficient,
        approximate=request.approximate,
    )


def _as_written(model: Transformer, dtype: str) -> Transformer:
    """The model with its numbers as this dtype holds them; refused where one is too large."""
    arrays = model.leaves()
    weights.check_finite(arrays, export.numpy_dtype(dtype))
    if dtype == "float16":
        arrays = {path: leaf.astype("float16").astype(leaf.dtype) for path, leaf in arrays.items()}
        return Transformer(model.arch, arrays)
    return model


def _changed(model: Transformer, edited: Transformer) -> list[str]:
    before, after = model.leaves(), edited.leaves()
    return [path for path, leaf in after.items() if leaf is not before.get(path)]


def _in_the_stream(request: Request, origin: Origin) -> Edit:
    """The edit that the weights are to hold."""
    layers = origin.arch.layers
    assert origin.direction is not None
    if request.edit == "orthogonalize":
        return ablate(origin.direction, layers)
    assert origin.layer is not None
    return add(origin.direction, layers, layer=origin.layer, coefficient=request.coefficient)


def _write(
    edited: Transformer, model: Transformer, request: Request, origin: Origin, folder: Path
) -> None:
    if request.to == "peft":
        assert origin.direction is not None
        adapter = weights.rank_one(model, origin.direction)
        for name, content in lora.files(adapter, model.arch, origin.source.name, "float32").items():
            (folder / name).write_bytes(content)
        return
    if origin.source.gguf is not None:
        chat = load_chat(origin.source)
        export.write_tokenizer(chat.tokenizer, chat.stop_ids, folder)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        original = origin.config | {
            name: getattr(chat.tokenizer, name)
            for name in special
            if getattr(chat.tokenizer, name) is not None
        }
    else:
        assert origin.source.directory is not None
        export.copy_beside(origin.source.directory, folder)
        original = origin.config
    if request.to == "orbax":
        config = export.config(edited.arch, original, origin.dtype, origin.ignore)
        export.write_json(folder / "config.json", config)
        stored = export.numpy_dtype(origin.dtype)
        arrays = {path: leaf.astype(stored) for path, leaf in edited.leaves().items()}
        orbax.save(Transformer(edited.arch, arrays), folder / "orbax")
    else:
        export.write_hugging_face(edited, original, folder, origin.dtype, origin.ignore)
