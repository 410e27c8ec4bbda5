"""One prompt's replies side by side, from a finished workdir.

python -m launch.generate --workdir=DIR --prompt="..." [--max_new_tokens=64] [--coefficient=1.0]
    [--mesh=DATA,MODEL]
"""

import re
import sys

from absl import flags

from launch import common

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "An instruction; may be given several times.", required=True
)
TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length of the replies.", lower_bound=1)
COEFFICIENT = flags.DEFINE_float("coefficient", 1.0, "Multiple of the direction that is added.")
MESH = flags.DEFINE_list("mesh", ["1", "1"], "Devices on the data and the model axis.")
flags.register_validator(
    "mesh",
    lambda axes: len(axes) == 2 and all(re.fullmatch("-1|[0-9]{1,8}", axis) for axis in axes),
    "two numbers, as in --mesh=1,8",
)


def main(_: list[str]) -> None:
    from jax_refusal.run.side_by_side import side_by_side

    data, model = map(int, MESH.value)
    replies = side_by_side(
        WORKDIR.value, PROMPT.value, TOKENS.value, COEFFICIENT.value, (data, model)
    )
    for prompt, by_edit in zip(PROMPT.value, replies, strict=True):
        print(f"\n# {prompt}")
        for name, reply in by_edit.items():
            print(f"\n## {name}\n{reply}")


if __name__ == "__main__":
    common.start(main, sys.argv)
