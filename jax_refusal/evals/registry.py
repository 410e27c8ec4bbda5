"""The judges that a config can name."""

import re
from collections.abc import Callable, Sequence

from jax_refusal.evals.judge import Judge, JudgeError
from jax_refusal.evals.substring import Substring

JUDGES: dict[str, Callable[[], Judge]] = {"substring": Substring}


def find_judges(names: Sequence[str], own: Sequence[Judge] = ()) -> dict[str, Judge]:
    """Name -> judge, in the order of the names; `own` are judges that are not in the registry.

    Raises JudgeError for names that are unknown or given twice, and for none.
    """
    given = {judge.name: judge for judge in own}
    known = sorted({*JUDGES, *given})
    wrong = [name for name in names if name not in known or not re.fullmatch(r"[\w-]+", name)]
    if wrong or not names or len(set(names)) < len(names):
        raise JudgeError(
            f"evals.judges={tuple(names)!r}: "
            + (f"{wrong} are no judges. " if wrong else "each judge once, and at least one. ")
            + f"Known are {', '.join(known)}; one of your own is given to run.pipeline.run."
        )
    taken = [judge.name for judge in own if judge.name in JUDGES]
    if taken or len(given) < len(own):
        raise JudgeError(f"{taken or list(given)}: a judge of your own needs a name of its own.")
    return {name: given[name] if name in given else JUDGES[name]() for name in names}
