"""The static shape of a decoder: everything that families differ in, as named switches.

Letters: L layers, D residual width, H query heads, G key/value heads, K head width, F MLP width,
V vocabulary, E experts. What differs between the layers of one model is a tuple [L].
"""

import dataclasses


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
    short_factor: tuple[float, ...] = ()  # longrope, one for each frequency
    attention_factor: float = 1.0  # cosine and sine are multiplied by it
    share: float = 1.0  # proportional: of the channels, those that turn fastest; others do not


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static shape of a decoder. Hashable: it is part of what jit compiles for."""

    family: str
    naming: str  # how the checkpoint names its tensors, a key of `names.NAMING`
    vocab: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    mlp_width: int  # F, of an expert where there are experts
    context: int  # tokens, the longest sequence that is computed as the family means it
    norm_epsilon: float
    ropes: tuple[Rope, ...]
    score_scale: float  # of <q, k>
    rope_of_layer: tuple[int, ...] = ()  # [L] an index of `ropes`; () is all 0
    rotary_width: int = 0  # the first channels of each head that are turned; 0 is all K
    # [L] sliding-window length in tokens, 0 is unlimited; () is all 0.
    windows: tuple[int, ...] = ()
    norm: str = "plain"  # a key of `layers.NORMS`
    pre_norm: bool = True  # of what attention and MLP read
    post_norm: bool = False  # of what attention and MLP write
    qk_norm: str = ""  # of queries and keys: "", each "head", or the whole "projection"
    activation: str = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    sinks: bool = False  # a learned score for each head, which takes attention and gives nothing
    score_cap: float = 0.0  # scores become cap * tanh(score / cap); 0 is none
    logit_cap: float = 0.0
    experts: int = 0  # E; 0 is one MLP for all tokens
    experts_per_token: int = 0
    shares_add_up: bool = True  # the shares of a token's experts are made to add up to 1
    expert_bias: bool = False  # of the router, and of the experts' three projections
    swiglu_limit: float = 0.0  # of experts: gate <= limit, |up| <= limit, and up + 1; 0 is none
    query_growth: float = 0.0  # queries are 1 + growth * log(1 + position // period) longer
    query_period: int = 0  # tokens
    query_log: int = 0  # tokens; beyond, a query is log(position + 1) / log(this) times as long
    wrapped: bool = False  # the checkpoint holds more than this text model
    # Layers of several shapes, see `kinds`: those without a window have other heads, and the last
    # ones may read the keys and values of an earlier layer.
    global_head_width: int = 0  # K of layers without a window; 0 is one shape for all
    global_kv_heads: int = 0  # G of them
    keys_are_values: bool = False  # in them, but for norm and rotation
    kv_of_layer: tuple[int, ...] = ()  # [L] the layer whose keys and values are read; () is its own
    wide_mlp: int = 0  # F of layers that read another's; 0 is F
    layer_scale: bool = False  # the stream is multiplied by a number at the end of each layer
    per_layer_width: int = 0  # of what a token's own embedding for a layer holds; 0 is none
    per_layer_vocab: int = 0
    expert_width: int = 0  # F of experts beside an MLP; 0 is one or the other

    @property
    def cache_heads(self) -> int:
        """Key/value heads of `head_width` that hold what any layer remembers of a token."""
        wide = self.global_kv_heads * self.global_head_width // self.head_width
        return max(self.kv_heads, wide)

    @property
    def cache_layers(self) -> int:
        """The layers with keys and values of their own, which come first."""
        own = [layer for layer, source in enumerate(self.kv_of_layer) if layer == source]
        return len(own) if own else self.layers

    def first_needed(self, layer: int) -> int:
        """The earliest layer whose keys and values are read by `layer` or one behind it."""
        return min(self.kv_of_layer[layer:], default=layer)

    @property
    def steady(self) -> int:
        """Tokens up to which the start of a prompt is computed the same however it goes on."""
        grow = [rope.original_context for rope in self.ropes if rope.kind == "prompt_ntk"]
        return min(grow, default=self.context)
