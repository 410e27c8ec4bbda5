"""Rotary embedding: frequencies, angles, and the turn itself.

Letters: B batch row, T token, H query heads, G key/value heads, K head width, W rotated channels of
a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.models.spec import Rope


def frequencies(rope: Rope, width: int) -> np.ndarray:  # [W / 2] float32, radians per token
    """Rotary frequencies with the scaling of their kind; zeros, which turn nothing, for "none".

    In float32 and rounded where Hugging Face rounds: far into a prompt the last digit of a
    frequency is many last digits of an angle.
    """
    channels = np.arange(0, width, 2, dtype=np.float32)
    powers = np.power(np.float32(rope.base), channels / np.float32(width))
    plain = 1 / powers
    if rope.kind == "none":
        return np.zeros_like(plain)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "proportional":
        turning = int(rope.share * width // 2)
        return np.where(channels / 2 < turning, plain, 0) / np.float32(rope.factor)
    if rope.kind == "longrope":  # of short prompts
        return 1 / (np.array(rope.short_factor, np.float32) * powers)
    factor = np.float32(rope.factor)
    if rope.kind == "llama3":
        # Wavelengths (tokens per turn) beyond the original context are stretched by `factor`,
        # those well inside it are kept, and those between are blended.
        turns = np.float32(rope.original_context) / (np.float32(2 * math.pi) / plain)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return (1 - keep) * plain / factor + keep * plain
    if rope.kind == "yarn":
        # The same idea with a ramp over channels, between those that make `beta_fast` and
        # `beta_slow` turns within the original context.
        def channel(turns: float) -> float:
            ratio = math.log(rope.original_context / (turns * 2 * math.pi))
            return width * ratio / (2 * math.log(rope.base))

        low, high = channel(rope.beta_fast), channel(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high  # the library's own guard
        ramp = (channels / 2 - np.float32(low)) / np.float32(high - low)
        keep = 1 - np.clip(ramp, 0, 1)
        return 1 / (factor * powers) * (1 - keep) + plain * keep
    return plain


def frequencies_by_length(rope: Rope, width: int) -> np.ndarray:  # [N, W / 2]
    """For prompts of up to 1, 2, 4, ... original contexts, and of any length at the end.

    Longrope has two sets, by `short_factor` and `long_factor`. Dynamic NTK as Qwen-1 has it
    multiplies the base by a ** (W / (W - 2)), where a = 2 ** ceil(log2(length / original) + 1) - 1
    is 1, 3, 7, ...
    """
    if rope.kind == "longrope":
        long = dataclasses.replace(rope, short_factor=rope.long_factor)
        return np.stack([frequencies(each, width) for each in (rope, long)])
    steps = range(math.ceil(math.log2(rope.factor)) + 1)
    bases = [rope.base * (2 ** (step + 1) - 1) ** (width / (width - 2)) for step in steps]
    return np.stack([frequencies(Rope(base=base), width) for base in bases])


def angles(
    positions: jax.Array,  # [B, T]
    rope: Rope,
    width: int,  # W
    lengths: jax.Array | None = None,  # [B, T] tokens of the whole prompt, where that matters
) -> tuple[jax.Array, jax.Array]:  # cos, sin [B, T, 1, W / 2], float32
    turns = frequencies(rope, width)[None, None, None]
    if rope.by_length:
        assert lengths is not None
        each = jnp.asarray(frequencies_by_length(rope, width))
        borders = rope.original_context * 2 ** jnp.arange(len(each) - 1)
        turns = each[(lengths[..., None] > borders[None, None]).sum(-1)][:, :, None]
    turn = positions[..., None, None].astype(jnp.float32) * turns
    return jnp.cos(turn) * rope.attention_factor, jnp.sin(turn) * rope.attention_factor


def rotate(
    x: jax.Array,  # [B, T, H or G, K]
    angles: tuple[jax.Array, jax.Array],  # cos, sin
) -> jax.Array:
    """Rotary position embedding on the two halves of each head (the Hugging Face layout).

    Where there are angles for the first W channels of a head only, the others stay as they are.
    """
    cos, sin = (a.astype(x.dtype) for a in angles)
    width = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :width], 2, -1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x.shape[-1]:
        parts.append(x[..., width:])
    return jnp.concatenate(parts, -1)
