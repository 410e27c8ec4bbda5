"""Qwen-1 beyond the length it was trained on, against the formulas written out in float64.

The oracle reads one prompt at a time, without padding, cache or neighbours: log-n attention by
position, the rotary base by the length of the prompt. Letters: T token, D residual width, H heads,
K head width.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_refusal as jr
from jax_refusal.edits import ablate
from jax_refusal.evals.loss import reply_loss
from jax_refusal.families.registry import architecture
from jax_refusal.models.cache import Tokens, lengths
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.spec import UnsupportedModel
from jax_refusal.runtime import collect
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import ContextError, generate
from jax_refusal.study.scores import refusal_score
from jax_refusal.study.sweep import Sweep
from tests import qwen1
from tests.models.cases import SMALL
from tests.models.test_cache import nothing
from tests.models.test_families import stored
from tests.tolerances import INVARIANCE, PARITY, SCORES, assert_close

TRAINED, CONTEXT = 8, 48  # tokens
LENGTHS = (5, 8, 9, 16, 17, 33, 40)
SWITCHES = {"use_logn_attn": True, "use_dynamic_ntk": True}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    oracle = checkpoint(architecture="qwen2", num_key_value_heads=4, rms_norm_eps=1e-6, **SMALL)
    sizes = {"seq_length": TRAINED, "max_position_embeddings": CONTEXT}
    return qwen1.write_weights(tmp_path_factory.mktemp("qwen1"), stored(oracle), **sizes)


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return jr.load_model(str(folder))


class Oracle:
    def __init__(self, folder: Path, **switches: bool):
        self.w = {k: v.astype(float) for k, v in load_file(folder / "model.safetensors").items()}
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text()) | switches

    def __call__(
        self, ids: list[int], prompt: int | None = None, unit: np.ndarray | None = None
    ) -> np.ndarray:  # [T, V]
        """Logits; `prompt` of the tokens were read at once, the others written after.

        unit [D]: taken out of all that the residual stream is given.
        """
        c, w, T = self.config, self.w, len(ids)
        H, K, S = c["num_attention_heads"], c["kv_channels"], c["seq_length"]
        base, true_len = float(c["rotary_emb_base"]), prompt or T
        if c["use_dynamic_ntk"]:
            alpha = max(2 ** math.ceil(math.log2(true_len / S) + 1) - 1, 1)
            base *= alpha ** (K / (K - 2))
        angle = np.arange(T)[:, None] / base ** (np.arange(0, K, 2) / K)
        cos, sin = np.tile(np.cos(angle), 2)[:, None], np.tile(np.sin(angle), 2)[:, None]
        sharp = np.ones(T)
        if c["use_logn_attn"]:
            sharp = np.array([math.log(i, S) if i > S else 1.0 for i in range(1, T + 1)])

        def out(x):
            return x if unit is None else x - np.outer(x @ unit, unit)

        def norm(x, name):
            variance = np.square(x).mean(-1, keepdims=True) + c["layer_norm_epsilon"]
            return x / np.sqrt(variance) * w[name]

        def turn(x):  # [T, H, K]
            first, second = np.split(x, 2, -1)
            return x * cos + np.concatenate([-second, first], -1) * sin

        x = w["transformer.wte.weight"][ids]
        for layer in range(c["num_hidden_layers"]):
            name = f"transformer.h.{layer}."
            x = out(x)
            h = norm(x, name + "ln_1.weight")
            h = h @ w[name + "attn.c_attn.weight"].T + w[name + "attn.c_attn.bias"]
            q, k, v = (part.reshape(T, H, K) for part in np.split(h, 3, -1))
            scores = np.einsum("thk,shk->hts", turn(q) * sharp[:, None, None], turn(k)) / K**0.5
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hts,shk->thk", weights, v).reshape(T, H * K)
            x = x + out(mixed @ w[name + "attn.c_proj.weight"].T)
            h = norm(x, name + "ln_2.weight")
            gate, up = h @ w[name + "mlp.w2.weight"].T, h @ w[name + "mlp.w1.weight"].T
            x = x + out((gate / (1 + np.exp(-gate)) * up) @ w[name + "mlp.c_proj.weight"].T)
        return norm(x, "transformer.ln_f.weight") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def rows(sizes: tuple[int, ...], shared: int = 0) -> list[list[int]]:
    """Random prompts, the first `shared` tokens in common."""
    drawn = [np.random.default_rng(i).integers(400, size=n).tolist() for i, n in enumerate(sizes)]
    return [drawn[0][:shared] + row[shared:] for row in drawn]


def padded(prompts: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.zeros((2, len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        here = slice(len(ids[row]) - len(prompt), None) if left else slice(len(prompt))
        ids[row, here], mask[row, here] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("switches", [{}, {"use_logn_attn": False}, {"use_dynamic_ntk": False}])
def test_logits(switches: dict[str, bool], folder: Path, tmp_path: Path) -> None:
    """Every prompt of a batch by its own length, with both switches and with each alone."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | switches))
    model, oracle = jr.load_model(str(tmp_path)), Oracle(tmp_path, **SWITCHES | switches)
    prompts = rows(LENGTHS)
    ids, mask = padded(prompts, left=True)
    found = np.asarray(jr.logits(model, ids, mask))
    plain = Oracle(tmp_path, use_logn_attn=False, use_dynamic_ntk=False)
    for prompt, logits in zip(prompts, found, strict=True):
        logits = logits[len(logits) - len(prompt) :]
        assert_close(logits, oracle(prompt), PARITY, f"{len(prompt)} tokens")
        changed = np.abs(oracle(prompt) - plain(prompt)).max()
        assert (changed > 0.05) == (len(prompt) > TRAINED), len(prompt)


def test_padding_says_nothing(model: Transformer) -> None:
    prompts = rows(LENGTHS)
    sides = [jr.logits(model, *padded(prompts, left)) for left in (True, False)]
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        assert_close(sides[0][i, -n:], sides[1][i, :n], INVARIANCE)


def test_packed_rows(model: Transformer, oracle: Oracle) -> None:
    """Several prompts in a row, each with a rotary base of its own."""
    prompts = Prompts(rows(LENGTHS), prefix=0, positions=2)
    found = collect.last_logits(model, prompts, nothing(model), row_tokens=64)
    assert_close(found, np.stack([oracle(ids)[-1] for ids in prompts.ids]), PARITY)


def test_replies(model: Transformer, oracle: Oracle) -> None:
    """Greedy, past the trained length: the prompt's base is kept, queries still grow."""
    prompts = Prompts(rows((5, 8, 9, 16, 17, 33), shared=3), prefix=3)
    options: Any = {"stop_ids": (), "max_new_tokens": 15, "batch_size": 2}
    found = generate(model, prompts, nothing(model), **options)
    for prompt, reply in zip(prompts.ids, found, strict=True):
        logits = oracle([*prompt, *reply[:-1]], len(prompt))[len(prompt) - 1 :]
        assert reply == logits.argmax(-1).tolist(), len(prompt)
        top = np.sort(logits, -1)
        assert (top[:, -1] - top[:, -2]).min() > 1e-4  # no tie decides
    with pytest.raises(ContextError, match=f"context of {CONTEXT} tokens"):
        generate(model, prompts, nothing(model), stop_ids=(), max_new_tokens=16)


def test_a_short_prompt_keeps_the_shared_prefix(model: Transformer, oracle: Oracle) -> None:
    """Up to the trained length the start of a prompt is the same however it goes on."""
    prompts = Prompts(rows((5, 8, 7), shared=3), prefix=3)
    assert prompts.for_rows_of(TRAINED, model.arch).prefix == 3
    assert prompts.for_rows_of(TRAINED + 1, model.arch).prefix == 0
    found = collect.last_logits(model, prompts, nothing(model), row_tokens=16)
    assert_close(found, np.stack([oracle(ids)[-1] for ids in prompts.ids]), PARITY)


def test_loss(model: Transformer, oracle: Oracle) -> None:
    """Prompt and reply are one row, as in one pass of the published code."""
    prompts = Prompts(rows((5, 7, 20), shared=3), prefix=3)
    replies = rows((2, 6, 9))
    found = reply_loss(model, prompts, replies, nothing(model))
    for i, (prompt, reply) in enumerate(zip(prompts.ids, replies, strict=True)):
        logits = oracle([*prompt, *reply])[len(prompt) - 1 : -1]
        log_all = np.log(np.exp(logits).sum(-1))
        expected = (log_all - logits[np.arange(len(reply)), reply]).sum()
        assert abs(found.sums[i] - expected) < SCORES


def test_scores_of_candidates(model: Transformer, oracle: Oracle) -> None:
    """Selection's packed rows, under an edit."""
    prompts = Prompts(rows((9, 5, 20)), prefix=0)
    direction = np.random.default_rng(5).normal(size=(1, model.arch.layers, model.arch.width))
    sweep = Sweep(model, direction, prompts, prompts, [40, 43])
    unit = direction[0, 1] / np.linalg.norm(direction[0, 1])
    last = np.stack([oracle(ids, unit=unit)[-1] for ids in prompts.ids])
    expected = refusal_score(jnp.asarray(last, jnp.float32), jnp.array([40, 43])).mean()
    assert abs(sweep.bypass([(0, 1)])[0] - float(expected)) < SCORES
    edit = ablate(direction[0, 1], model.arch.layers)
    found = collect.last_logits(model, prompts, edit, row_tokens=64)
    assert_close(found, last, PARITY)


def test_lengths() -> None:
    """Counted from what shares a segment; positions behind a prefix count on."""
    tokens = Tokens(
        ids=jnp.zeros((1, 7), jnp.int32),
        positions=jnp.array([[0, 3, 4, 5, 3, 4, 0]]),
        segments=jnp.array([[0, 1, 1, 1, 2, 2, 0]]),
    )
    assert lengths(tokens)[0, 1:6].tolist() == [6, 6, 6, 5, 5]


def test_where_nothing_lies_beyond_there_is_nothing_to_compute() -> None:
    """So with Qwen-1.8B's file: its context ends where its training did."""
    config = qwen1.CONFIG | {"vocab_size": 9}
    off = {name: False for name in SWITCHES}
    assert architecture(config) == architecture(config | off)
    arch = architecture(config | {"seq_length": 128})
    assert (arch.query_log, arch.prefix_reusable_until, arch.context) == (128, 128, 512)
    assert arch.ropes[0].factor == 4.0
    plain = architecture(config | off | {"seq_length": 128})
    assert plain.prefix_reusable_until == plain.context == 512


def test_another_scaling_beside_dynamic_ntk_is_refused() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = qwen1.CONFIG | {"vocab_size": 9, "seq_length": 128, "rope_scaling": scaling}
    with pytest.raises(UnsupportedModel, match="'linear' cannot be had with use_dynamic_ntk"):
        architecture(config)
