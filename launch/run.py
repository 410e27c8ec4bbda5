"""Runs a study: python -m launch.run --config=configs/NAME.py --workdir=DIR [--config.a.b=c]."""

import sys

from absl import flags
from ml_collections import config_flags

from launch import common

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, and overrides of its fields."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of this run's files; gs://... where gcsfs is installed.",
    required=True,
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from jax_refusal.report.page import closing_table
    from jax_refusal.run import pipeline

    metrics = pipeline.run(
        common.settings(CONFIG), WORKDIR.value, progress=common.progress, log=common.log
    )
    print(f"\n{closing_table(metrics)}\n")
    print(f"direction: position {metrics['position']}, layer {metrics['layer']}")
    print(f"report: {WORKDIR.value}/report.md")


if __name__ == "__main__":
    common.start(main, sys.argv, stopped=common.GOES_ON)
