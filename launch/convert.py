"""Writes a model, edited or not, for other programs.

python -m launch.convert --source=MODEL --to=orbax --out=DIR
python -m launch.convert --source=MODEL --adapter=LORA --to=hf --out=DIR
python -m launch.convert --workdir=RUN --edit=orthogonalize --to=hf --out=DIR
python -m launch.convert --source=MODEL --direction=FILE --layer=14 --edit=addition \\
    --coefficient=-1 --to=gguf-control-vector --out=DIR
"""

import sys

from absl import flags

from launch import common

SOURCE = flags.DEFINE_string("source", "", "A model source; empty is that of --workdir.")
ADAPTER = flags.DEFINE_string("adapter", "", "A PEFT LoRA adapter to merge into --source.")
WORKDIR = flags.DEFINE_string("workdir", "", "A run with the direction (and source) to use.")
DIRECTION = flags.DEFINE_string("direction", "", "A .pt, .safetensors, .npy or .npz file.")
TENSOR = flags.DEFINE_string("tensor", "", "Name of the tensor, where that file holds several.")
EDIT = flags.DEFINE_string("edit", "none", "none, orthogonalize or addition.")
TO = flags.DEFINE_string("to", None, "hf, orbax, peft or gguf-control-vector.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to be made; never one with files.", required=True)
LAYER = flags.DEFINE_integer("layer", None, "Layer of an addition; empty is the run's.")
COEFFICIENT = flags.DEFINE_float("coefficient", 1.0, "Multiple of the direction that is added.")
DTYPE = flags.DEFINE_string(
    "dtype",
    "",
    "float32, bfloat16 or float16 (computed in float32); empty is what the source's config.json "
    "says. Packed weights leave as bfloat16, those of a GGUF file as float32.",
)
IGNORE = flags.DEFINE_list(
    "ignore_config_fields", [], "Fields of the source's config.json that you vouch for."
)
APPROXIMATE = flags.DEFINE_bool(
    "approximate", False, "Go on where an edit of the weights is not exact; the card measures it."
)


def main(_: list[str]) -> None:
    from jax_refusal.run.convert import Request, convert

    request = Request(
        to=TO.value,
        out=OUT.value,
        edit=EDIT.value,
        source=SOURCE.value,
        adapter=ADAPTER.value,
        workdir=WORKDIR.value,
        direction=DIRECTION.value,
        tensor=TENSOR.value,
        layer=LAYER.value,
        coefficient=COEFFICIENT.value,
        dtype=DTYPE.value,
        approximate=APPROXIMATE.value,
        ignore_config_fields=tuple(IGNORE.value),
    )
    print(convert(request, common.log))


if __name__ == "__main__":
    common.start(main, sys.argv)
