"""What a run would need on a TPU slice, compiled for it without one.

python -m launch.plan --config=configs/llama_3_70b_instruct.py --topology=v5e:4x4 \\
    [--config.mesh.model=16] [--model_config=config.json]

Needs the TPU compiler: pip install 'jax_refusal[tpu]'. Ends with 1 where a program does not fit.
"""

import sys

from absl import flags
from ml_collections import config_flags

from launch import common

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, and overrides of its fields."
)
TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:SHAPE of a slice: v5e:4x4.", required=True)
MODEL_CONFIG = flags.DEFINE_string(
    "model_config", "", "A config.json to plan for; empty is that of config.model.source."
)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "Of the longest prompts.")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from jax_refusal.plan.table import plan, table

    planned = plan(
        common.settings(CONFIG),
        TOPOLOGY.value,
        model_config=MODEL_CONFIG.value,
        prompt_tokens=PROMPT_TOKENS.value,
        log=common.log,
    )
    print(table(planned))
    if not planned.fits:
        sys.exit(1)


if __name__ == "__main__":
    common.start(main, sys.argv)
