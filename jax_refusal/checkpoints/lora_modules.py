"""Which matrices of a model the tensors of a PEFT adapter change, and where in them.

Letters: E experts, M rank, I inputs and O outputs of a projection.

PEFT names A and B after the module that holds the weight, as the transformers of the day named it.
One of many parameters in a module (experts) is adapted by a wrapper around the module, and the next
one by a wrapper around that: the first one's tensors lie deepest, behind `base_layer`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from jax_refusal.checkpoints import hf
from jax_refusal.checkpoints.lora_config import Settings
from jax_refusal.checkpoints.tensors import Tensor
from jax_refusal.families.registry import family_of
from jax_refusal.messages import shown
from jax_refusal.models.params import STREAM, WRITES, Leaf
from jax_refusal.models.spec import Architecture

PREFIX = "base_model.model."
A, B, MAGNITUDES = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
TENSOR = re.compile(re.escape(PREFIX) + rf"(?P<module>.+)\.(?P<part>{A}|{B}|{MAGNITUDES})")
FOR_TRAINING = ".lora_velora_embed"  # what VeLoRA keeps for its backward pass
INNER = ".base_layer"
FRONTS = [front for front, stands in hf.PREFIXES.items() if stands == "model."]


@dataclasses.dataclass(frozen=True)
class Spot:
    """One tensor of the model that an adapter changes: a matrix, or those of all experts."""

    key: str  # what the config's patterns are matched with
    group: hf.TensorGroup
    place: tuple[int, ...]  # of the tensor among those of its group

    @property
    def experts(self) -> int:
        """E, of one tensor; 1 for a matrix."""
        return self.group.shape[0] if len(self.group.shape) == 3 else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """O of all parts together, I."""
        first, second = self.group.shape[-2:]
        return (first, second) if outputs_first(self.group.parts[0]) else (second, first)

    def shapes(self, settings: Settings) -> dict[str, tuple[int, ...]]:
        """Of each tensor in the file."""
        (out, into), rank = self.sizes, settings.rank_of(self.key) * self.experts
        shapes = {A: (rank, into), B: (out, rank)}
        return {**shapes, MAGNITUDES: (out,)} if settings.magnitudes else shapes

    def halves(
        self,
        a: np.ndarray,  # [M E, I]
        b: np.ndarray,  # [O, M E]
    ) -> tuple[np.ndarray, np.ndarray]:  # [E, M, I] and [E, O, M]
        """A counts experts outside of the rank, and B inside of it."""
        a = a.reshape(self.experts, -1, a.shape[1])
        return a, b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)

    def outputs(self, part: Leaf) -> np.ndarray:
        """Which of the outputs of all parts are a part's."""
        if len(self.group.parts) == 1:
            return np.arange(self.sizes[0])
        along = self.group.along
        whole = np.arange(self.group.shape[along])
        own = whole[self.group.where(part, 0, part.sizes[along])]
        return self.group.own(part, own.reshape(*[1] * along, -1)).ravel()


def outputs_first(leaf: Leaf) -> bool:
    """Whether the last two dimensions of a stored projection are outputs and inputs."""
    return (STREAM in leaf.dimensions[-2]) == (leaf.role == WRITES)


def unfolded(leaf: Leaf) -> list[str]:
    """The axes of [L, O, I] or [L, E, O, I], the same however a checkpoint stores the leaf."""
    *stacked, first, second = leaf.dimensions
    matrix = (first, second) if outputs_first(leaf) else (second, first)
    return [*leaf.counted, *(axis for held in (*stacked, *matrix) for axis in held)]


@dataclasses.dataclass(frozen=True)
class Given:
    """What an adapter's file holds."""

    names: dict[str, str]  # a module as the text model names it -> as the file does
    parts: dict[str, dict[str, Tensor]]  # the latter -> by A, B and MAGNITUDES
    front: str  # what the file puts in place of `model.`

    def spelled(self, name: str) -> str:
        """A name of the text model as the file would write it."""
        return self.front + name.removeprefix("model.") if self.front else name


def sort_out(tensors: Mapping[str, Tensor], arch: Architecture) -> tuple[Given, list[str]]:
    """The modules of the text model in an adapter's file, and what is wrong with names in it.

    An adapter of a multimodal model fits its text model alone too, and the other way about.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        if found := TENSOR.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = tensor
        elif not name.endswith(FOR_TRAINING):
            problems.append(f"tensor {name} is no A or B of a linear layer")
    front = next((p for p in FRONTS if any(module.startswith(p) for module in parts)), "")
    inside = dataclasses.replace(arch, wrapped=arch.wrapped or bool(front))
    names: dict[str, str] = {}
    for spelled in parts:
        name = _in_text_model(spelled, inside)
        if not name:  # another modality's, or of weights that nothing reads
            continue
        if name in names:
            problems.append(f"{names[name]} and {spelled} are one module")
        names.setdefault(name, spelled)
    return Given(names, parts, front), problems


def _in_text_model(module: str, arch: Architecture) -> str:
    """A module's name without what a multimodal model puts around it; "" for what is not in it."""
    inner = module.removesuffix(INNER)
    found = next(iter(hf.unwrapped(arch, {f"{inner}.weight": None})), "")
    return found and found.removesuffix(".weight") + module.removeprefix(inner)


def fit(given: Given, settings: Settings, arch: Architecture) -> tuple[dict[str, Spot], list[str]]:
    """Spots by module of the file, and where file, config and model contradict each other.

    Experts lie one by one or all in one tensor: it is read as the way that fits.
    """
    namings = (dataclasses.replace(arch, naming=naming) for naming in family_of(arch).namings)
    fits = [_fit(given, settings, hf.groups(named)) for named in namings]
    spots, problems = min(fits, key=lambda found: len(found[1]))
    if beyond := [layer for layer in settings.layers if layer >= arch.layers]:
        problems.append(f"layers_to_transform has {shown(beyond)} of 0 to {arch.layers - 1}")
    return spots, problems


def _fit(
    given: Given, settings: Settings, groups: Iterable[hf.TensorGroup]
) -> tuple[dict[str, Spot], list[str]]:
    every, wanted = _spots(settings, given.spelled, groups)
    spots, problems = {}, []
    for name, spelled in given.names.items():
        if name in wanted:
            wrong = list(_wrong(spelled, given.parts[spelled], wanted[name].shapes(settings)))
            problems += wrong
            if not wrong:
                spots[spelled] = wanted[name]
        elif name in every:
            problems.append(f"{spelled} is in the file, and the config does not name it")
        else:
            problems.append(f"{spelled} is no linear layer in a block of this model")
    if not settings.leaves_it_open:
        lacking = [spot.key for name, spot in wanted.items() if name not in given.names]
        problems += [f"{key} is named by the config, and not in the file" for key in lacking]
    return spots, problems


def _wrong(
    module: str, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    for part in dict.fromkeys((*given, *shapes)):
        if part not in given:
            yield f"{module} has no {part}"
        elif part not in shapes:
            yield f"{module} has {part}, and the config does not name it"
        elif given[part].shape != shapes[part]:
            yield f"{PREFIX}{module}.{part} has shape {given[part].shape}, not {shapes[part]}"


def _spots(
    settings: Settings, spelled: Callable[[str], str], groups: Iterable[hf.TensorGroup]
) -> tuple[set[str], dict[str, Spot]]:
    """All modules that may be adapted, and the spots of those that the config names."""
    every: set[str] = set()
    wanted: dict[str, Spot] = {}
    inside: dict[str, list[Spot]] = {}
    for group in filter(_is_projection, groups):
        for place, tensor in group.names.items():
            module = tensor.rpartition(".")[0]
            linear = len(group.shape) == 2
            every |= {module} if linear else {module, module + INNER}
            if linear and settings.names(spelled(module)):
                wanted[module] = Spot(spelled(module), group, place)
            elif settings.names_parameter(spelled(tensor)):
                inside.setdefault(module, []).append(Spot(spelled(tensor), group, place))
    for module, spots in inside.items():
        for depth, spot in enumerate(reversed(spots)):
            wanted[module + INNER * depth] = spot
    return every, wanted


def _is_projection(group: hf.TensorGroup) -> bool:
    """Matrices of layers, one by one or all experts' in one tensor, whose parts share inputs."""
    first = group.parts[0]
    stacked = len(group.shape) == 3 and first.dimensions[0] == ("experts",)
    fused_inputs = len(group.parts) > 1 and STREAM in first.dimensions[group.along]
    return (
        (stacked or (len(group.shape) == 2 and group.name.endswith(".weight")))
        and first.counted[:1] == ("layers",)
        and STREAM in first.axes
        and not fused_inputs
    )
