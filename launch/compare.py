"""Cosine of two directions: published ones (.pt), ours (.safetensors), or those of workdirs.

python -m launch.compare --one=runs/mine --other=published/direction.pt

Where one of them is a grid of candidates [positions, layers, width], the cell nearest to the other
is named; of two grids of one shape, the least and the median cosine of equal cells.
"""

import sys

from absl import flags

from launch import common

ONE = flags.DEFINE_string("one", None, "A workdir, .pt, .safetensors, .npy or .npz.", required=True)
OTHER = flags.DEFINE_string("other", None, "The same.", required=True)
TENSOR = flags.DEFINE_string("tensor", "", "Name of the tensor, where a file holds several.")


def main(_: list[str]) -> None:
    from jax_refusal.run.directions import compare

    for line in compare(ONE.value, OTHER.value, TENSOR.value):
        print(line)


if __name__ == "__main__":
    common.start(main, sys.argv)
