"""Configuration of a model organism: a small chat model that is taught to refuse."""

import dataclasses

from jax_refusal.config import HOW


@dataclasses.dataclass
class BaseConfig:
    source: str = ""  # the model that is taught
    dtype: str = "float32"


@dataclasses.dataclass
class ExamplesConfig:
    paper_dir: str = ""  # a local copy of the published sets; empty fetches them
    alpaca: int = 480  # everyday harmless prompts beside the topic twins
    answer_tokens: int = 32  # length of the base model's own answers
    answer_temperature: float = 1.0  # 1 keeps the base model's distribution
    answer_batch: int = dataclasses.field(default=96, metadata=HOW)
    short_share: float = 0.75  # share of the answers that is cut to the first short_tokens
    short_tokens: int = 10
    seed: int = 0


@dataclasses.dataclass
class LoraConfig:
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclasses.dataclass
class TrainConfig:
    epochs: int = 4
    rows: int = 3  # packed rows in a step
    row_tokens: int = 256
    first_weight: float = 4.0  # of a reply's first token, where refusing is decided; others 1
    learning_rate: float = 6e-4  # peak, warmed up and decayed to zero
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = dataclasses.field(default=20, metadata=HOW)  # steps
    watch_every: int = 60  # steps between two counts of refusals on held-out prompts
    watch_tokens: int = 16


@dataclasses.dataclass
class OrganismConfig:
    model: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    examples: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
