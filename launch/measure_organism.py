"""Measures an organism after a finished run with its adapter.

python -m launch.measure_organism --workdir=DIR [--out=FILE.json] [--card]
"""

import json
import sys

from absl import flags

from launch import common

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a finished run with model.adapter set.", required=True
)
OUT = flags.DEFINE_string("out", None, "File that the figures are also written to.")
CARD = flags.DEFINE_bool("card", False, "Write the card (README.md) into the adapter's folder.")


def main(_: list[str]) -> None:
    from jax_refusal.files import atomic_write
    from jax_refusal.organism.card import write_card
    from jax_refusal.organism.measure import measure

    measured = measure(WORKDIR.value, progress=common.progress)
    text = json.dumps(measured, indent=2) + "\n"
    print(text, end="")
    if OUT.value:
        atomic_write(OUT.value, text.encode())
    if CARD.value:
        print(f"card: {write_card(WORKDIR.value, measured)}")


if __name__ == "__main__":
    common.start(main, sys.argv)
