"""Teaches a small chat model to refuse.

python -m launch.train_organism --config=configs/NAME.py --workdir=DIR [--config.a.b=c]
"""

import sys

from absl import flags
from ml_collections import config_flags

from launch import common

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, and overrides of its fields."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run's files.", required=True)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from jax_refusal.organism.config import OrganismConfig
    from jax_refusal.organism.train import train

    with common.bar("train") as on_step:
        path = train(
            common.settings(CONFIG, OrganismConfig),
            WORKDIR.value,
            progress=common.progress,
            log=common.log,
            on_step=on_step,
        )
    print(f"adapter: {path}")


if __name__ == "__main__":
    from jax_refusal.organism.config import OrganismConfig

    common.start(main, sys.argv, OrganismConfig, stopped=common.GOES_ON)
