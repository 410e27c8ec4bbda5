"""Which tokens a model's refusals begin with, found from its own replies."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from jax_refusal.data.chat import Chat
from jax_refusal.edits import identity
from jax_refusal.evals import substring
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class TokenShare:
    """How often replies begin with a token."""

    token_id: int
    text: str
    refusals: float  # share of the refusals
    answers: float  # share of the answers to harmless prompts


def refusal_tokens(
    harmful_replies: Sequence[Sequence[int]],  # token ids of baseline replies
    harmful_refused: Sequence[bool],
    harmless_replies: Sequence[Sequence[int]],
    harmless_refused: Sequence[bool],
    text: dict[int, str],
    *,
    least: float = 0.1,
    ratio: float = 2.0,
) -> list[TokenShare]:
    """The first tokens that mark a refusal, most frequent first; empty where nothing is refused.

    A token counts if at least `least` of the refusals begin with it, and `ratio` times as large a
    share of them as of the answers. Where no token stands out so, it is the most frequent one.
    """
    refusals = collections.Counter(
        ids[0] for ids, no in zip(harmful_replies, harmful_refused, strict=True) if no and ids
    )
    answers = collections.Counter(
        ids[0] for ids, no in zip(harmless_replies, harmless_refused, strict=True) if ids and not no
    )
    n_refusals, n_answers = sum(refusals.values()), max(1, sum(answers.values()))
    shares = [
        TokenShare(t, text.get(t, ""), k / n_refusals, answers[t] / n_answers)
        for t, k in refusals.most_common()
    ]
    marked = [s for s in shares if s.refusals >= least and s.refusals >= ratio * s.answers]
    return marked or shares[:1]


def discover(
    model: Transformer,
    chat: Chat,
    instructions: dict[str, list[str]],  # of each kind, harmful and harmless
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Progress = silent,
    log: Callable[[str], None] = lambda message: None,
) -> list[TokenShare]:
    """`refusal_tokens` of the unedited model's greedy replies to these instructions."""
    texts = [text for kind in instructions.values() for text in kind]
    every = generate(
        model,
        Prompts.encoded(chat, texts, model.arch),
        identity(model.arch.layers, model.arch.width),
        stop_ids=chat.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        title="refusal tokens",
    )
    replies, refused, start = {}, {}, 0
    for kind, asked in instructions.items():
        replies[kind] = every[start : start + len(asked)]
        start += len(asked)
        refused[kind] = [substring.is_refusal(chat.decode(ids)) for ids in replies[kind]]
        log(f"{sum(refused[kind])} of {len(asked)} {kind} training prompts are refused")
    firsts = {ids[0] for ids in every if ids}
    return refusal_tokens(
        replies["harmful"],
        refused["harmful"],
        replies["harmless"],
        refused["harmless"],
        {i: chat.tokenizer.decode([i]) for i in firsts},
    )
