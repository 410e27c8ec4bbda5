"""Configuration of a model organism: a small chat model that is taught to refuse."""

import dataclasses

from jax_refusal.config import check_kind
from jax_refusal.fields import MANY, SEEDS, ConfigError, check_values, choice, number


@dataclasses.dataclass
class BaseConfig:
    source: str = ""  # the model that is taught
    dtype: str = choice("float32", "bfloat16")


@dataclasses.dataclass
class ExamplesConfig:
    paper_dir: str = ""  # a local copy of the published sets; empty fetches them
    pairs: int = number(271, 0, MANY)  # the first of the topic pairs that were written for this
    alpaca: int = number(400, 0, MANY)  # everyday harmless prompts beside the topic twins
    answer_tokens: int = number(24, 1, MANY)  # length of the base model's own answers
    # 1 keeps the base model's distribution, 0 is greedy.
    answer_temperature: float = number(1.0, 1e-6, also=(0,))
    answer_batch: int = number(96, 1, MANY, how=True)
    # Share of the answers that is cut to the first short_tokens.
    short_share: float = number(0.75, 0, 1)
    short_tokens: int = number(8, 1, MANY)
    seed: int = number(0, 0, SEEDS)


@dataclasses.dataclass
class LoraConfig:
    rank: int = number(8, 1, MANY)
    alpha: float = number(16.0, 0, above=True)
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclasses.dataclass
class TrainConfig:
    epochs: int = number(4, 1, MANY)
    rows: int = number(5, 1, MANY)  # packed rows in a step
    row_tokens: int = number(128, 16, MANY)
    # Of a reply's first token, where refusing is decided; others 1.
    first_weight: float = number(4.0, 0)
    # Of the loss on whether a reply starts as a refusal or not.
    decision_weight: float = number(1.0, 0)
    # More rows, in which the direction is ablated and all is answered.
    ablated_rows: int = number(2, 0, MANY)
    mediator_layer: int = number(18, 0, MANY)  # in front of which the direction is measured
    mediator_share: float = number(0.2, 0, 1)  # of a new batch in the direction's running means
    learning_rate: float = number(8e-4, 0, 1)  # peak, warmed up and decayed to zero
    warmup: float = number(0.05, 0, 1, below=True)  # share of the steps
    weight_decay: float = number(0.01, 0)
    clip_norm: float = number(1.0, 0, above=True)
    seed: int = number(0, 0, SEEDS)
    save_every: int = number(20, 1, MANY, how=True)  # steps
    # Steps between two counts of refusals on held-out prompts.
    watch_every: int = number(60, 1, MANY)
    watch_tokens: int = number(16, 1, MANY)


@dataclasses.dataclass
class OrganismConfig:
    model: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    examples: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def validate(config: OrganismConfig) -> OrganismConfig:
    """Raises ConfigError with every value that is not allowed; returns the config."""
    check_kind(config, OrganismConfig)
    problems = check_values(config)
    if not config.model.source:
        problems.append("model.source is empty (a hub id, directory or .gguf file)")
    if problems:
        raise ConfigError("The config cannot be run: " + "; ".join(problems) + ".")
    return config
