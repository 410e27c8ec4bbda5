"""How far edited weights are from the same edit of the stream, for the card of what is written."""

from typing import Any

import numpy as np

from jax_refusal.api import logits
from jax_refusal.checkpoints import export
from jax_refusal.checkpoints.export import ExportError
from jax_refusal.checkpoints.sources import Source, SourceError
from jax_refusal.data.chat import ChatError, load_chat
from jax_refusal.data.prompts import builtin
from jax_refusal.edits import Edit
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import Architecture

PROMPTS = 8  # of the builtin harmless set, or of random tokens
RANDOM_TOKENS = 32  # of each of those, where there is no tokenizer or no chat template


def measured(model: Transformer, edited: Transformer, edit: Edit, source: Source) -> dict[str, Any]:
    """Differences in logits. Raises ExportError where they are not finite."""
    prompts, on = _prompts(source, model.arch)
    length = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    real = mask.astype(bool)
    ours = np.asarray(logits(edited, ids, mask))[real]
    stream = np.asarray(logits(model, ids, mask, edit))[real]
    if not (np.isfinite(ours).all() and np.isfinite(stream).all()):
        raise ExportError(
            "The edited model's logits are not finite (NaN or infinity): the edit is too large for "
            "this model. Take a smaller coefficient or direction."
        )
    return {
        "tokens": int(real.sum()),
        "on": on,
        "largest_difference": float(np.abs(ours - stream).max()),
        "largest_logit": float(np.abs(stream).max()),
        "same_next_token": float(np.mean(ours.argmax(-1) == stream.argmax(-1))),
    }


def _prompts(source: Source, arch: Architecture) -> tuple[list[list[int]], str]:
    """Token ids, and what they are: a model without a tokenizer can be edited all the same."""
    lacks = "chat template"
    try:
        texts = [i.text for i in builtin("harmless")["val"][:PROMPTS]]
        return load_chat(source).encode(texts), "everyday prompts"
    except ChatError:
        pass
    except SourceError:
        folder, lacks = source.directory, "tokenizer"
        if folder is None or export.has_tokenizer(path.name for path in export.beside(folder)):
            raise  # it has one, and that is damaged
    shape = (PROMPTS, min(RANDOM_TOKENS, arch.context))
    prompts = np.random.default_rng(0).integers(arch.vocab, size=shape).tolist()
    return prompts, f"pseudo-random text, for want of a {lacks}"
