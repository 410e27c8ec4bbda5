"""Cross-entropy of replies against Hugging Face, one reply at a time."""

import numpy as np
import torch
from transformers import PreTrainedModel

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.evals.loss import reply_loss
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts
from tests import oracle, tolerances

INSTRUCTIONS = ["Name a color", "What is the tallest mountain on land?", "Say hi"]
REPLIES = [[7, 9, 30], [11], [5, 300, 8, 8, 41]]


def expected(hf: PreTrainedModel, prompts: Prompts) -> list[float]:
    sums = []
    for prompt, reply in zip(prompts.ids, REPLIES, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([[*prompt, *reply]])).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(-sum(float(logp[i, t]) for i, t in enumerate(reply)))
    return sums


def test_loss_equals_one_reply_at_a_time(
    model: Transformer, chat: Chat, hf: PreTrainedModel
) -> None:
    prompts = Prompts.encoded(chat, INSTRUCTIONS)
    nothing = jr.identity(model.arch.layers, model.arch.width)
    for rows, row_tokens in ((1, 64), (4, 256)):
        loss = reply_loss(model, prompts, REPLIES, nothing, rows=rows, row_tokens=row_tokens)
        tolerances.assert_close(loss.sums, expected(hf, prompts), tolerances.PARITY, "sums")
        assert np.isclose(loss.nats, loss.sums.sum() / 9)


def test_the_edit_reaches_the_loss(model: Transformer, chat: Chat, hf: PreTrainedModel) -> None:
    prompts = Prompts.encoded(chat, INSTRUCTIONS)
    direction = np.random.default_rng(0).normal(size=model.arch.width)
    loss = reply_loss(model, prompts, REPLIES, jr.ablate(direction, model.arch.layers))
    with oracle.ablation_hooks(hf, torch.tensor(direction)):
        tolerances.assert_close(loss.sums, expected(hf, prompts), tolerances.PARITY, "ablated")
