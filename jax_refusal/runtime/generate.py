"""Replies: prompts wait for one of a batch's rows, and leave it as soon as they are answered.

Letters: B batch row, N prefix tokens, R edit rows, I prompts, J requests prefilled at once.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.edits import Edit, num_rows, take
from jax_refusal.models.cache import Cache
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN, Driver, Unrolled
from jax_refusal.models.spec import Architecture
from jax_refusal.runtime import decode
from jax_refusal.runtime.batching import Prompts, bucket, left_padded, place, pools
from jax_refusal.runtime.decode import Rules, Sampling
from jax_refusal.runtime.prefix import shared_prefix
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of, to_host

# A full batch prefills a quarter of its rows at a time: prompts run well together, on average an
# eighth of the rows waits, and no second cache of all rows is held. Few rows come at once.
PREFILLS, AT_ONCE = 4, 32


class ContextError(ValueError):
    """A prompt and its reply are longer than the model's context."""


def check_capacity(prompts: Prompts, max_new_tokens: int, arch: Architecture) -> None:
    tokens, room = min(
        ((len(ids), arch.room(len(ids))) for ids in prompts.ids), key=lambda pair: pair[1] - pair[0]
    )
    if tokens + max_new_tokens > room:
        raise ContextError(
            f"A prompt of {tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"context of {room} tokens. Allow at most {max(0, room - tokens)} new tokens, or "
            "shorten the prompts."
        )


def generate(
    model: Transformer,
    prompts: Prompts,
    edit: Edit,  # [R]
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    row_edit: Sequence[int] | None = None,  # [I] which of the edit's rows each prompt is run with
    numbers: Sequence[int] | None = None,  # [I] prompts of one number are sampled with one noise
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = silent,
    title: str = "generate",
    on_reply: Callable[[int, list[int]], None] = lambda prompt, ids: None,  # as each is ready
) -> list[list[int]]:
    """New token ids of each prompt, in order; a reply's stop token is left out.

    Without row_edit the edit has one row, for all prompts, or one for each. Prompts of about equal
    length share a batch of at most batch_size rows. A row whose reply has ended takes in another
    prompt, so that long replies do not hold up the others.
    Raises ContextError where a prompt and its reply would not fit the model's context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; a reply has at least 1.")
    check_capacity(prompts, max_new_tokens, model.arch)
    prompts = prompts.for_rows_of(max(map(len, prompts.ids)), model.arch)
    which = _row_edit(edit, row_edit, len(prompts.ids))
    mesh = mesh_of(model)
    replies: list[list[int]] = [[] for _ in prompts.ids]
    rules = Rules(
        stop_ids=jnp.array(stop_ids, jnp.int32),
        limit=jnp.int32(max_new_tokens),
        sampling=Sampling(temperature=jnp.float32(temperature), key=jax.random.key(seed)),
    )
    with jax.set_mesh(mesh):
        numbered = range(len(prompts.ids)) if numbers is None else numbers
        job = _Job(model, prompts, edit, which, np.asarray(numbered), rules, batch_size)
        for prompt, ids in progress(job, title):
            replies[prompt] = ids[:-1] if ids and ids[-1] in stop_ids else ids
            on_reply(prompt, replies[prompt])
    return replies


def _row_edit(edit: Edit, row_edit: Sequence[int] | None, prompts: int) -> np.ndarray:
    rows = num_rows(edit)
    if row_edit is None:
        if rows not in (1, prompts):
            raise ValueError(
                f"The edit has {rows} rows for {prompts} prompts; it needs one, or one for every "
                "prompt, or row_edit to say which of them each prompt takes."
            )
        return np.arange(prompts) % rows
    wrong = sorted({which for which in row_edit if which not in range(rows)})
    if len(row_edit) != prompts or wrong:
        raise ValueError(
            f"row_edit has {len(row_edit)} entries{f', {wrong} among them' * bool(wrong)}: it "
            f"needs one of the edit's rows 0..{rows - 1} for each of {prompts} prompts."
        )
    return np.array(row_edit)


def driver(model: Transformer) -> Driver:
    """How decode steps run the layers: one by one on a CPU, where few rows wait for memory."""
    on_cpu = mesh_of(model).devices.flat[0].platform == "cpu"
    return Unrolled(model.unrolled()) if on_cpu else SCAN


class _Job:
    """Yields each prompt's number with its new tokens, in the order in which they are ready."""

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        edits: Edit,
        which: np.ndarray,  # [I]
        numbers: np.ndarray,  # [I]
        rules: Rules,
        batch_size: int,
    ):
        self.model, self.prompts, self.edits, self.which = model, prompts, edits, which
        self.numbers, self.rules = numbers, rules
        self.batch_size, self.mesh = batch_size, mesh_of(model)
        self.drive = driver(model)

    def __len__(self) -> int:
        return len(self.prompts.ids)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        # The shared tokens under every edit, where these are no more than the rows of a batch.
        edits, prefix = num_rows(self.edits), None
        if edits <= self.batch_size:
            prefix = shared_prefix(self.model, self.prompts, self.edits, edits)
        for members in pools([len(ids) - self.prompts.prefix for ids in self.prompts.ids]):
            yield from self._pool(members, prefix)

    def _sizes(self, prompts: int) -> tuple[int, int]:
        """Rows of the batch, and how many requests are prefilled together."""
        data, batches = self.mesh.shape["data"], -(-prompts // self.batch_size)
        # As full as if the prompts were shared out over whole batches.
        size = -(-prompts // batches)
        if batches == 1:
            size = min(self.batch_size, bucket(prompts, least=1))
        size = -(-size // data) * data
        if batches == 1 and size <= AT_ONCE * data:
            return size, size
        return size, -(-size // PREFILLS // data) * data

    def _pool(self, members: np.ndarray, prefix: Cache | None) -> Iterator[tuple[int, list[int]]]:
        """Replies to prompts that fit the same slots."""
        model, prompts = self.model, self.prompts
        size, group = self._sizes(len(members))
        slots = self._slots(members)
        replies = decode.empty(
            model,
            rows=size,
            slots=prompts.prefix + slots,
            capacity=bucket(int(self.rules.limit)),
            unrolled=isinstance(self.drive, Unrolled),
        )
        waiting, free, request = list(members), list(range(size)), np.full(size, -1)
        while waiting or len(free) < size:
            full = len(free) == size  # at the start a batch is filled whatever is left over
            while waiting and free and (full or len(free) >= min(group, len(waiting))):
                few = min(group, len(free), len(waiting))
                rows, new = free[:few], np.array(waiting[:few])
                free, waiting, request[rows] = free[few:], waiting[few:], new
                if len(members) > size:  # many groups: it pays to compile for shorter ones
                    slots = self._slots(new)
                replies = self._prefill(replies, rows, new, group, slots, prefix)
            target = jnp.int32(size - min(group, len(waiting)) if waiting else 0)
            replies = decode.advance(model, self.drive, replies, self.edits, target, self.rules)
            finished, count, first, ids = to_host(
                (replies.finished, replies.count, replies.first, replies.ids)
            )
            for row in np.flatnonzero(finished & (request >= 0)):
                ring = (first[row] + np.arange(count[row])) % ids.shape[1]
                yield int(request[row]), ids[row, ring].tolist()
                request[row] = -1
                free.append(int(row))

    def _slots(self, members: np.ndarray) -> int:
        """Slots for the longest of some prompts, without the prefix."""
        return bucket(max(len(self.prompts.ids[i]) for i in members) - self.prompts.prefix)

    def _prefill(
        self,
        replies: decode.Replies,
        rows: list[int],
        members: np.ndarray,
        group: int,
        slots: int,
        prefix: Cache | None,
    ) -> decode.Replies:
        """Puts the replies to these prompts in these rows; a group that is not full is filled up
        with its first prompt, for no row."""
        model, prompts, few = self.model, self.prompts, len(members)
        filled = np.concatenate([members, np.repeat(members[:1], group - few)])
        parts = [prompts.ids[i][prompts.prefix :] for i in filled]
        which = prefix_row = self.which[filled]
        if prefix is None and prompts.prefix:
            own = take(self.edits, which)
            prefix, prefix_row = shared_prefix(model, prompts, own, group), np.arange(group)
        per_prompt = (
            self.numbers[filled],
            which,
            prefix_row,
            [*rows, *[len(replies.finished)] * (group - few)],
        )
        number, edit, prefix_row, rows_ = (
            sharding.place(np.array(x, np.int32), self.mesh, "batch") for x in per_prompt
        )
        return decode.prefill(
            model,
            replies,
            place(left_padded(parts, prompts, slots), self.mesh),
            number,
            self.edits,
            edit,
            prefix,
            prefix_row,
            rows_,
            self.rules,
        )
