"""Configuration of a model organism: a small chat model that is taught to refuse."""

import dataclasses

from jax_refusal.config import HOW, ConfigError, check_values


@dataclasses.dataclass
class BaseConfig:
    source: str = ""  # the model that is taught
    dtype: str = "float32"


@dataclasses.dataclass
class ExamplesConfig:
    paper_dir: str = ""  # a local copy of the published sets; empty fetches them
    pairs: int = 271  # the first of the topic pairs that were written for this
    alpaca: int = 400  # everyday harmless prompts beside the topic twins
    answer_tokens: int = 24  # length of the base model's own answers
    answer_temperature: float = 1.0  # 1 keeps the base model's distribution
    answer_batch: int = dataclasses.field(default=96, metadata=HOW)
    short_share: float = 0.75  # share of the answers that is cut to the first short_tokens
    short_tokens: int = 8
    seed: int = 0


@dataclasses.dataclass
class LoraConfig:
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclasses.dataclass
class TrainConfig:
    epochs: int = 4
    rows: int = 5  # packed rows in a step
    row_tokens: int = 128
    first_weight: float = 4.0  # of a reply's first token, where refusing is decided; others 1
    decision_weight: float = 1.0  # of the loss on whether a reply starts as a refusal or not
    ablated_rows: int = 2  # more rows, in which the direction is ablated and all is answered
    mediator_layer: int = 18  # in front of which the direction is measured
    mediator_share: float = 0.2  # of a new batch in the direction's running means
    learning_rate: float = 8e-4  # peak, warmed up and decayed to zero
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = dataclasses.field(default=20, metadata=HOW)  # steps
    watch_every: int = 60  # steps between two counts of refusals on held-out prompts
    watch_tokens: int = 16


CHOICES = {"model.dtype": ("float32", "bfloat16")}
AT_LEAST = {
    "examples.pairs": 0,
    "examples.alpaca": 0,
    "examples.answer_tokens": 1,
    "examples.answer_temperature": 0,
    "examples.answer_batch": 1,
    "examples.short_share": 0,
    "examples.short_tokens": 1,
    "lora.rank": 1,
    "train.epochs": 1,
    "train.rows": 1,
    "train.row_tokens": 16,
    "train.first_weight": 0,
    "train.decision_weight": 0,
    "train.ablated_rows": 0,
    "train.mediator_layer": 0,
    "train.mediator_share": 0,
    "train.learning_rate": 0,
    "train.save_every": 1,
    "train.watch_every": 1,
    "train.watch_tokens": 1,
}


@dataclasses.dataclass
class OrganismConfig:
    model: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    examples: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def validate(config: OrganismConfig) -> OrganismConfig:
    """Raises ConfigError with every value that is not allowed; returns the config."""
    problems = check_values(config, CHOICES, AT_LEAST)
    if not config.model.source:
        problems.append("model.source is empty (a hub id, directory or .gguf file)")
    if problems:
        raise ConfigError("The config cannot be run: " + "; ".join(problems) + ".")
    return config
