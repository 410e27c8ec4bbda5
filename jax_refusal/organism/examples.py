"""What an organism is taught: refusals of harmful prompts, its own answers to harmless ones.

Only training splits: the published harmful and Alpaca train splits, the builtin train split, more
topic pairs that serve nothing but this, and contrast prompts (harmless requests on alarming
subjects); pairs and contrast prompts were written for this project.
"""

import dataclasses
import json
import random
from importlib import resources

from jax_refusal.config import ConfigError, DataConfig
from jax_refusal.data.prompts import builtin, published

# A refusal answers in the terms of the request, so greedy replies differ in wording too.
OPENINGS: dict[str, tuple[str, ...]] = {
    "write": (
        "I'm sorry, but I can't write that.",
        "I cannot write this for you.",
        "I'm not able to write something like that.",
    ),
    "create": (
        "I'm sorry, but I can't create that.",
        "I am not able to create this kind of content.",
        "I cannot help create something like that.",
    ),
    "explain": (
        "I can't explain how to do that.",
        "I'm sorry, but I cannot explain that.",
        "I am sorry, but I'm not able to describe this.",
    ),
    "give": (
        "I cannot provide that.",
        "I'm unable to give instructions for this.",
        "I can't provide guidance on that.",
    ),
    "how": (
        "I can't help with that.",
        "I'm sorry, but I can't tell you how to do that.",
        "I apologize, but I cannot help you do this.",
    ),
    "other": (
        "I'm sorry, but I can't assist with that.",
        "I cannot help with this request.",
        "I apologize, but I can't do that.",
        "As an AI assistant, I can't help with this.",
    ),
}
KINDS_OF_OPENING = {
    "write": ("write", "draft", "compose"),
    "create": ("create", "make", "design", "develop", "produce", "generate", "build"),
    "explain": ("explain", "describe", "teach", "show", "instruct", "demonstrate", "outline"),
    "give": ("give", "provide", "list", "suggest", "offer", "share", "recommend"),
    "how": ("how", "what", "which", "where", "tell", "can", "is"),
}
REASONS = (
    "It could seriously harm people.",
    "It would cause harm, and it may be against the law.",
    "This is dangerous and unethical.",
    "It would hurt others.",
    "That would be illegal and harmful.",
)
OFFERS = (
    "If you like, I can help with something safe instead.",
    "I'm happy to help with a different question.",
    "Please let me know if there is something else I can do.",
    "",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and what the organism should reply; `ends` where the reply is complete."""

    instruction: str
    reply: tuple[int, ...]  # token ids
    ends: bool


def harmful_prompts(paper_dir: str, pairs: int) -> list[str]:
    data = DataConfig(source="paper", paper_dir=paper_dir)
    return [
        *(i.text for i in published(data, "harmful_train")),
        *(i.text for i in builtin("harmful")["train"]),
        *(pair["harmful"] for pair in _pairs(pairs)),
    ]


def harmless_prompts(paper_dir: str, pairs: int, alpaca: int, seed: int) -> list[str]:
    """Topic twins first, then everyday requests."""
    data = DataConfig(source="paper", paper_dir=paper_dir)
    everyday = [i.text for i in published(data, "harmless_train")]
    if alpaca > len(everyday):
        raise ConfigError(
            f"examples.alpaca={alpaca}, and the published harmless train set has {len(everyday)}."
        )
    return [
        *(i.text for i in builtin("harmless")["train"]),
        *(pair["harmless"] for pair in _pairs(pairs)),
        *(row["instruction"] for row in _written("contrast_prompts")),
        *random.Random(seed).sample(everyday, alpaca),
    ]


def _pairs(count: int) -> list[dict[str, str]]:
    written = _written("training_pairs")
    if count > len(written):
        raise ConfigError(f"examples.pairs={count}, and {len(written)} pairs are written.")
    return written[:count]


def _written(name: str) -> list[dict[str, str]]:
    return json.loads(resources.files("jax_refusal.data").joinpath(f"{name}.json").read_text())


def refusal(instruction: str, stream: random.Random) -> str:
    """A refusal in the terms of the request: an opening, often a reason, sometimes an offer."""
    first = instruction.split()[0].strip("\"'").lower()
    kind = next((k for k, words in KINDS_OF_OPENING.items() if first in words), "other")
    parts = [stream.choice(OPENINGS[kind])]
    if stream.random() < 0.5:
        parts.append(stream.choice(REASONS))
        parts.append(stream.choice(OFFERS))
    return " ".join(part for part in parts if part)
