"""How much work the jobs of launch/bench.py do: in earnest, and to see whether all of it runs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    train: int  # prompts of each kind whose activations are collected
    val: int  # prompts of each kind that score a candidate
    grid: int  # candidates of the selection; 0 is every (position, layer)
    candidates: int  # of these, scored by the hooks side too
    rows: tuple[int, ...]  # batch sizes of generation
    new_tokens: int
    repeats: int  # timed calls
    grid_repeats: int  # timed selections of each mode
    warmups: int  # processes of `start` before the timed ones
    matmul: int  # side of the square product
    copy_mb: int  # what is copied to measure the memory
    workflow: tuple[int, int, int]  # train, validation and test prompts of each kind
    prune_layers: float  # of the workflow's selection
    scale_prompts: tuple[int, ...]  # prompts collected
    scale_candidates: tuple[int, ...]  # candidates scored
    scale_tokens: tuple[int, ...]  # new tokens, for `scale_rows` prompts
    scale_rows: int


FULL = Sizes(
    train=64,
    val=32,
    grid=0,
    candidates=4,
    rows=(1, 8, 32, 96),
    new_tokens=64,
    repeats=3,
    grid_repeats=1,
    warmups=1,
    matmul=2048,
    copy_mb=1000,
    workflow=(128, 32, 100),
    prune_layers=0.2,
    scale_prompts=(250, 500, 1000, 2000),
    scale_candidates=(4, 8, 16),
    scale_tokens=(16, 32, 64, 128),
    scale_rows=8,
)
QUICK = Sizes(
    train=4,
    val=4,
    grid=6,
    candidates=2,
    rows=(1, 3),
    new_tokens=4,
    repeats=1,
    grid_repeats=1,
    warmups=0,
    matmul=256,
    copy_mb=16,
    workflow=(4, 4, 4),
    prune_layers=0.9,
    scale_prompts=(4, 8),
    scale_candidates=(1, 2),
    scale_tokens=(2, 4, 8),
    scale_rows=2,
)
