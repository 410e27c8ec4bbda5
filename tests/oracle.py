"""The paper's method in plain PyTorch hooks: the slow, direct reading that tests compare against.

Written from the protocol of Arditi et al. 2024 and sharing no code with the library under test.
`m` is a Hugging Face Llama or Mistral, `prompts` are lists of token ids of any lengths. Letters:
B batch row, T token, D residual width, L layers, V vocabulary, P kept positions, N prompts.
Models run in their own dtype (float32 in tests), edits, means and scores in float64. A float64
model needs batch_size=1: its mask overflows in the float32 softmax of Hugging Face's attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Prompts = Sequence[Sequence[int]]
Row = dict[str, Any]
Edit = Callable[[Tensor], Tensor]


# Forward passes


def _layers(m: nn.Module) -> list[nn.Module]:
    """The L decoder blocks."""
    return list(m.model.layers)


def _batches(
    m: nn.Module, prompts: Prompts, batch_size: int
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Left-padded batches: the rows' slice of N, and ids, mask and positions, each [B, T].

    Positions count the unmasked tokens, so every prompt starts at 0 wherever its row starts.
    """
    if not all(len(p) for p in prompts):
        raise ValueError("a prompt has no tokens")
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(len(p) for p in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, prompt in enumerate(rows):
            ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[i, width - len(prompt) :] = 1
        inputs = {
            "input_ids": ids.to(m.device),
            "attention_mask": mask.to(m.device),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).to(m.device),
            "use_cache": False,
        }
        yield slice(start, start + len(rows)), inputs


@torch.no_grad()
def last_logits(m: nn.Module, prompts: Prompts, batch_size: int = 4) -> Tensor:
    """Logits after each prompt's last token: float64 [N, V], under whichever edits are active."""
    parts = [
        m(**inputs).logits[:, -1].double().cpu() for _, inputs in _batches(m, prompts, batch_size)
    ]
    return torch.cat(parts)


@torch.no_grad()
def mean_activations(
    m: nn.Module, prompts: Prompts, positions: int, batch_size: int = 4
) -> np.ndarray:
    """Mean input of every block at the last `positions` tokens of the prompts: float64 [P, L, D].

    Index p along P is position p - P of the prompt: the last row is the last token.
    """
    shortest = min(len(p) for p in prompts)
    if not 1 <= positions <= shortest:
        raise ValueError(f"positions={positions}: expected 1 to {shortest}, the shortest prompt")
    layers = _layers(m)
    total = torch.zeros((positions, len(layers), m.config.hidden_size), dtype=torch.float64)

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total[:, layer] += args[0][:, -positions:].double().sum(0).cpu()  # [P, D]

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(layers):
            stack.callback(block.register_forward_pre_hook(record(layer)).remove)
        for _, inputs in _batches(m, prompts, batch_size):
            m(**inputs)
    return (total / len(prompts)).numpy()


# Edits of the residual stream


def _vector(m: nn.Module, values: Tensor | np.ndarray) -> Tensor:
    """`values` as a float64 [D] tensor on the model's device."""
    vector = torch.as_tensor(np.asarray(values), dtype=torch.float64).to(m.device)
    if vector.shape != (m.config.hidden_size,):
        raise ValueError(f"shape {tuple(vector.shape)}: expected ({m.config.hidden_size},)")
    return vector


def _edit_input(edit: Edit) -> Callable[..., tuple[Any, ...]]:
    """A forward pre-hook that edits the module's first argument [B, T, D]."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (edit(args[0]), *args[1:])

    return hook


def _edit_output(edit: Edit) -> Callable[..., Any]:
    """A forward hook that edits the module's output [B, T, D], or the first of a tuple."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


# What a block adds to the residual stream comes from those of these modules that it has.
WRITERS = ("self_attn", "linear_attn", "mamba", "mlp", "block_sparse_moe", "shared_mlp")


@contextmanager
def ablation_hooks(m: nn.Module, direction: Tensor | np.ndarray) -> Iterator[None]:
    """Within the context, x <- x - <x, u> u at all positions, with u = direction / |direction| [D].

    It happens at the input of each block and at what its attention (o_proj and its bias) and its
    MLP (down_proj and its bias) write to the residual. A zero direction removes nothing.
    """
    unit = _vector(m, direction)
    norm = unit.norm()
    if norm > 0:
        unit = unit / norm

    def edit(x: Tensor) -> Tensor:
        wide = x.double()
        return (wide - (wide @ unit)[..., None] * unit).to(x.dtype)

    with ExitStack() as stack:
        for block in _layers(m):
            writers = [w for name in WRITERS if (w := getattr(block, name, None)) is not None]
            handles = [writer.register_forward_hook(_edit_output(edit)) for writer in writers]
            for handle in (block.register_forward_pre_hook(_edit_input(edit)), *handles):
                stack.callback(handle.remove)
        yield


@contextmanager
def addition_hooks(
    m: nn.Module, vector: Tensor | np.ndarray, layer: int, coefficient: float = 1.0
) -> Iterator[None]:
    """Within the context, coefficient * vector [D] joins the input of block `layer`, everywhere."""
    shift = coefficient * _vector(m, vector)
    hook = _edit_input(lambda x: (x.double() + shift).to(x.dtype))
    handle = _layers(m)[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# Scores and selection


def refusal_scores(logits: Tensor, token_ids: Sequence[int], eps: float = 1e-8) -> Tensor:
    """Log odds of the refusal tokens as the next token: logits [N, V] -> float64 [N]."""
    p = logits.double().softmax(-1)[:, list(token_ids)].sum(-1)
    return torch.log(p + eps) - torch.log(1.0 - p + eps)


def kl_divergence(base_logits: Tensor, edited_logits: Tensor, eps: float = 1e-6) -> Tensor:
    """KL(base || edited) of the next token, eps inside both logs: [N, V] twice -> float64 [N]."""
    p = base_logits.double().softmax(-1)
    q = edited_logits.double().softmax(-1)
    return (p * (torch.log(p + eps) - torch.log(q + eps))).sum(-1)


def candidate_scores(
    m: nn.Module,
    mean_diffs: np.ndarray,
    harmful_val: Prompts,
    harmless_val: Prompts,
    token_ids: Sequence[int],
    batch_size: int = 4,
) -> list[Row]:
    """The three scores of every candidate in mean_diffs [P, L, D], positions -P..-1, layers 0..L-1.

    refusal_score: mean on harmful prompts with the direction ablated (the paper's bypass).
    steering_score: mean on harmless prompts with the difference added at its layer (induce).
    kl_div_score: mean KL on harmless prompts, unedited against ablated.
    """
    base = last_logits(m, harmless_val, batch_size)
    n_positions, n_layers, _ = mean_diffs.shape
    rows: list[Row] = []
    for position in range(-n_positions, 0):
        for layer in range(n_layers):
            vector = mean_diffs[position, layer]
            with ablation_hooks(m, vector):
                harmful = last_logits(m, harmful_val, batch_size)
                harmless = last_logits(m, harmless_val, batch_size)
            with addition_hooks(m, vector, layer, 1.0):
                steered = last_logits(m, harmless_val, batch_size)
            rows.append(
                {
                    "position": position,
                    "layer": layer,
                    "refusal_score": float(refusal_scores(harmful, token_ids).mean()),
                    "steering_score": float(refusal_scores(steered, token_ids).mean()),
                    "kl_div_score": float(kl_divergence(base, harmless).mean()),
                }
            )
    return rows


def choose(
    rows: Sequence[Row],
    n_layers: int,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune: float = 0.2,
) -> tuple[int, int] | None:
    """(position, layer) of the least refusal_score that survives; None where nothing does.

    To survive: no score is NaN, KL <= kl_threshold, steering >= induce_threshold, and the layer
    is below int(n_layers * (1 - prune)). Equal scores go to the earlier row.
    """
    scores = ("refusal_score", "steering_score", "kl_div_score")
    best: Row | None = None
    for row in rows:
        if any(np.isnan(row[s]) for s in scores):
            continue
        if row["layer"] >= int(n_layers * (1.0 - prune)):
            continue
        if row["kl_div_score"] > kl_threshold or row["steering_score"] < induce_threshold:
            continue
        if best is None or row["refusal_score"] < best["refusal_score"]:
            best = row
    return None if best is None else (best["position"], best["layer"])


# Completions


def greedy(
    m: nn.Module, prompts: Prompts, max_new_tokens: int, eos_ids: Sequence[int]
) -> list[list[int]]:
    """Greedy new tokens of each prompt, one forward of the whole text per token and no cache.

    A completion ends with the first token of `eos_ids`, included, or at `max_new_tokens`.
    """
    completions: list[list[int]] = []
    for prompt in prompts:
        new: list[int] = []
        while len(new) < max_new_tokens and (not new or new[-1] not in eos_ids):
            new.append(int(last_logits(m, [[*prompt, *new]], 1)[0].argmax()))
        completions.append(new)
    return completions
