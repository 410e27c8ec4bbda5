"""Measures an organism after a finished run with its adapter.

python -m launch.measure_organism --workdir=DIR [--out=FILE.json]
"""

import json
import pathlib
import sys

from absl import flags

from launch import common

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a finished run with model.adapter set.", required=True
)
OUT = flags.DEFINE_string("out", None, "File that the figures are also written to.")


def main(_: list[str]) -> None:
    from jax_refusal.organism.measure import measure

    text = json.dumps(measure(WORKDIR.value, progress=common.progress), indent=2) + "\n"
    print(text, end="")
    if OUT.value:
        pathlib.Path(OUT.value).write_text(text)


if __name__ == "__main__":
    common.start(main, sys.argv)
