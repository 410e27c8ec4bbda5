"""One prompt's replies under the edits of a finished run, beside each other."""

import numpy as np

from jax_refusal.config import GenerateConfig, MeshConfig
from jax_refusal.edits import ablate, add, rows
from jax_refusal.fields import check_fields, check_number
from jax_refusal.run.study import resume_study


def side_by_side(
    workdir: str,
    instructions: list[str],
    max_new_tokens: int = 64,
    coefficient: float = 1.0,
    mesh: tuple[int, int] = (1, 1),  # (data, model) axes
) -> list[dict[str, str]]:
    """Each instruction's reply unedited, with the run's direction ablated, subtracted and added.

    All conditions are rows of one job. Raises ConfigError for numbers that are not allowed,
    StudyError where the run is not finished, WorkdirError where the model or the adapter is no
    longer what the run used.
    """
    check_number("coefficient", coefficient)
    check_fields(GenerateConfig, max_new_tokens=max_new_tokens)
    check_fields(MeshConfig, data=mesh[0], model=mesh[1])
    study = resume_study(workdir, "selection", mesh=mesh)
    choice, layers = study.selection(), study.model.arch.layers
    edits = {
        "unedited": study.identity_edit,
        "ablated": ablate(choice.direction, layers),
        f"added x {-coefficient:g}": add(
            choice.direction, layers, layer=choice.layer, coefficient=-coefficient
        ),
        f"added x {coefficient:g}": add(
            choice.direction, layers, layer=choice.layer, coefficient=coefficient
        ),
    }
    each = len(instructions)
    replies = study.replies(
        study.encoded(instructions * len(edits)),
        rows(*edits.values()),
        max_new_tokens,
        "generate",
        row_edit=np.repeat(range(len(edits)), each).tolist(),
    )
    texts = [study.chat.decode(ids).strip() for ids in replies]
    return [dict(zip(edits, texts[i::each], strict=True)) for i in range(each)]
