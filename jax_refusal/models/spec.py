"""What a decoder is made of, as frozen values: a mixer and ordered branches for each layer.

Letters: L layers, D residual width, H query heads, G key/value heads, K head width, F MLP width,
V vocabulary, E experts.

A spec says what a layer computes, never how layers are run (see `drivers`). Layers that differ in
window or rotary embedding alone are of one shape; `phases` finds how shapes repeat.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache, cached_property
from typing import ClassVar


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that this decoder does not compute."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base angle, and how long contexts are scaled."""

    base: float
    # default, linear, llama3, yarn, longrope, proportional; none turns nothing; prompt_ntk is
    # Qwen-1's: its base grows with the length of the whole prompt, up to `factor` original contexts
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # turns within the original context: yarn keeps what makes more
    beta_slow: float = 1.0  # and divides by `factor` what makes fewer
    truncate: bool = True  # yarn rounds the borders between those to whole channels
    original_context: int = 0  # tokens
    # longrope, one for each frequency: of prompts up to the original context, and of longer ones
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0  # cosine and sine are multiplied by it
    share: float = 1.0  # proportional: of the channels, those that turn fastest; others do not

    @property
    def by_length(self) -> bool:
        """Whether tokens are turned by the length of the whole prompt that they are of."""
        return self.kind in ("prompt_ntk", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention with grouped queries."""

    by_layer: ClassVar[tuple[str, ...]] = ("window", "rope")  # may be data: layers keep their shape

    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    score_scale: float  # of <q, k>
    window: int = 0  # tokens that are seen; 0 is all
    rope: int = 0  # an index of `Architecture.ropes`
    rotary_width: int = 0  # the first channels of each head that are turned; 0 is all K
    qk_norm: str = ""  # of queries and keys: "", each "head", or the whole "projection"
    value_norm: bool = False  # of each head's values, without weights
    keys_are_values: bool = False  # but for norm and rotation
    kv_source: int | None = None  # the earlier layer whose keys and values are read, not its own
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False  # a learned score for each head, which takes attention and gives nothing
    gate: bool = False  # each head's output is multiplied by the sigmoid of a projection of its own
    score_cap: float = 0.0  # scores become cap * tanh(score / cap); 0 is none

    @property
    def remembers(self) -> tuple[str, ...]:
        """What it keeps of each token, as keys of `cache.AXES`."""
        return () if self.kv_source is not None else ("k", "v")

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of what it remembers."""
        return {"kv_heads": self.kv_heads, "head_width": self.head_width}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent:
    """A mixer that remembers a matrix for each head, and of a few tokens what its convolutions see.

    Keys say where in the state values are put, queries where it is read; key heads are shared by
    groups of value heads.
    """

    by_layer: ClassVar[tuple[str, ...]] = ()
    kv_source: ClassVar[int | None] = None
    remembers: ClassVar[tuple[str, ...]] = ("state", "q_tail", "k_tail", "v_tail")

    heads: int  # H, of values
    key_heads: int  # G
    key_width: int  # N
    value_width: int  # P
    taps: int  # tokens that a convolution sees, its own among them

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of what it remembers."""
        return {
            "state_heads": self.heads,
            "key_heads": self.key_heads,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "tail": self.taps - 1,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNet(Recurrent):
    """Gated delta rule: a key's old value in the state makes way for the new one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2(Recurrent):
    """A state-space model (Mamba-2): values are added to a state that fades."""

    conv_bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(activation(gate x) * up x)."""

    width: int  # F
    activation: str = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """A router sends each token to some of E gated MLPs."""

    experts: int  # E
    experts_per_token: int
    width: int  # F of an expert
    activation: str = "silu"
    norm_topk_prob: bool = True  # the shares of a token's experts are made to add up to 1
    bias: bool = False  # of the router, and of the experts' three projections
    swiglu_limit: float = 0.0  # gate <= limit, |up| <= limit, and up + 1; 0 is none
    shared_width: int = 0  # F of an expert that every token goes through; 0 is none
    shared_gate: bool = False  # what it writes is multiplied by the sigmoid of a projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpAndMoe:
    """An MLP and experts side by side, each with norms of its own (Gemma 4 26B-A4B)."""

    mlp: Mlp
    moe: Moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedInput:
    """A gate that reads the stream lets in what a token's own embedding holds for this layer."""

    width: int
    activation: str


Mixer = Attention | DeltaNet | Mamba2
Branch = Mlp | Moe | MlpAndMoe | GatedInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: what mixes tokens, then branches; each is a site of the residual stream."""

    mixer: Mixer
    branches: tuple[tuple[str, Branch], ...]  # (site, branch), in order
    pre_norm: bool = True  # of what mixer and MLP read
    post_norm: bool = False  # of what they write
    scale: bool = False  # the stream is multiplied by a number at the end of the layer
    write_scale: float = 1.0  # what mixer and branches write is multiplied by it

    @property
    def shape(self) -> "LayerSpec":
        """The same for all layers whose differences can be data."""
        none = dict.fromkeys(self.mixer.by_layer, 0)
        return dataclasses.replace(self, mixer=dataclasses.replace(self.mixer, **none))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInput:
    """What the embedding of a token holds for each layer (Gemma 4 E2B and E4B)."""

    width: int  # of one layer's input
    vocab: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """How a checkpoint names one leaf, and lays it out; see `params`."""

    name: str
    layout: str = ""  # "" as the leaf's declaration has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How the tensors of a family are named in a checkpoint, where that is not the usual way."""

    layer: str = "model.layers.{layer}."  # what stands in front of a layer's tensors
    tensors: tuple[tuple[str, Stored], ...] = ()  # leaf name -> what it is called

    @cached_property
    def of_leaf(self) -> dict[str, Stored]:
        return dict(self.tensors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The static shape of a decoder. Hashable: it is part of what jit compiles for."""

    family: str
    vocab: int  # V
    width: int  # D
    context: int  # tokens, the longest sequence that is computed as the family means it
    specs: tuple[LayerSpec, ...]  # [L]
    ropes: tuple[Rope, ...]
    norm_epsilon: float
    norm: str = "plain"  # a key of `ops.NORMS`
    tied_head: bool = False
    embed_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float = 0.0
    query_scale: float = 0.0  # queries are 1 + this * log(1 + position // query_period) longer
    query_period: int = 0  # tokens
    query_log: int = 0  # tokens; beyond, a query is log(position + 1) / log(this) times as long
    token_input: TokenInput | None = None
    naming: Naming = Naming()
    wrapped: bool = False  # the checkpoint holds more than this text model

    @property
    def layers(self) -> int:
        return len(self.specs)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __hash__(self) -> int:  # each call of a compiled program asks for it
        return self._hash

    def first_needed(self, layer: int) -> int:
        """The earliest layer whose keys and values are read by `layer` or one behind it."""
        read = [spec.mixer.kv_source for spec in self.specs[layer:]]
        return min([layer, *(source for source in read if source is not None)])

    @property
    def shares_kv(self) -> bool:
        return any(spec.mixer.kv_source is not None for spec in self.specs)

    @property
    def prefix_reusable_until(self) -> int:
        """Tokens up to which the start of a prompt is computed the same however it goes on."""
        grow = [rope.original_context for rope in self.ropes if rope.by_length]
        return min([*grow, self.context])

    def room(self, prompt: int) -> int:
        """Tokens of a prompt of this length and its reply that are computed as the family means it.

        Where a reply leaves the original context, longrope would turn what was read before it by
        other frequencies.
        """
        borders = [rope.original_context for rope in self.ropes if rope.kind == "longrope"]
        return min([border for border in borders if prompt <= border] + [self.context])


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place of a phase's pattern: the layers that have this shape and are scanned together."""

    number: int  # among all slots of the model; leaves and cache entries are counted by it
    specs: tuple[LayerSpec, ...]  # of its layers, all of one shape
    layers: tuple[int, ...]  # of the model, in order

    @property
    def spec(self) -> LayerSpec:
        """What holds for all of its layers, and of `varying` fields what holds for the first."""
        return self.specs[0]

    @cached_property
    def varying(self) -> dict[str, tuple[int, ...]]:
        """Fields of the mixer that differ between its layers, with each layer's value."""
        fields = self.spec.mixer.by_layer
        values = {name: tuple(getattr(s.mixer, name) for s in self.specs) for name in fields}
        return {name: each for name, each in values.items() if len(set(each)) > 1}

    @property
    def name(self) -> str:
        return f"blocks.{self.number}"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A pattern of layers that repeats: slots, one after the other, `repeats` times."""

    slots: tuple[Slot, ...]
    repeats: int


@cache
def phases(arch: Architecture) -> tuple[Phase, ...]:
    """The layers of a model as repeating patterns, as few and as short as they can be."""
    numbers: dict[LayerSpec, int] = {}
    shapes = [numbers.setdefault(spec.shape, len(numbers)) for spec in arch.specs]
    found: list[Phase] = []
    start = slots = 0
    while start < len(shapes):
        period, repeats = _repeating(shapes[start:])
        stop = start + period * repeats
        places = [range(start + i, stop, period) for i in range(period)]
        pattern = [
            Slot(slots + i, tuple(arch.specs[layer] for layer in layers), tuple(layers))
            for i, layers in enumerate(places)
        ]
        found.append(Phase(tuple(pattern), repeats))
        start, slots = stop, slots + period
    return tuple(found)


def _repeating(shapes: Sequence[int]) -> tuple[int, int]:
    """Length and repeats of the pattern at the start that covers most layers, the shortest such."""
    best = (1, 1)
    for period in range(1, len(shapes) // 2 + 1):
        repeats = 1
        while shapes[period * repeats : period * (repeats + 1)] == shapes[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


@cache
def slots(arch: Architecture) -> tuple[Slot, ...]:
    """Every slot of the model, in order."""
    return tuple(slot for phase in phases(arch) for slot in phase.slots)


def place(arch: Architecture, layer: int) -> tuple[int, int]:
    """The slot of a layer, and where in its stack it lies."""
    for slot in slots(arch):
        if layer in slot.layers:
            return slot.number, slot.layers.index(layer)
    raise IndexError(f"layer={layer} is not in 0..{arch.layers - 1}.")
