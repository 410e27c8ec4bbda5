"""Instruction sets: ours, the published ones, or a user's own; splits and the paper's sampling."""

import dataclasses
import http.client
import json
import os
import random
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

from jax_refusal.config import DataConfig
from jax_refusal.data.prompt_files import Instruction, PromptError, parse, read_instructions
from jax_refusal.files import atomic_write

SPLITS = ("train", "val", "test")
KINDS = ("harmful", "harmless")

# The published splits have one home: the authors' repository. Their harmful training split was
# drawn without a seed, so it cannot be drawn again from AdvBench, MaliciousInstruct and TDC2023.
PUBLISHED = (
    "https://raw.githubusercontent.com/andyrdt/refusal_direction/"
    "0b9c8bc56a73b42f595fd173156d4aefe9a9143c/dataset"
)
HUB = "hub:"  # data.paper_dir="hub:OWNER/NAME@REVISION" is a dataset on the hub with those files


Split = dict[str, list[Instruction]]  # "train", "val", "test"


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Both kinds of instruction, each in three splits that share no text."""

    harmful: Split
    harmless: Split

    def texts(self, kind: str, split: str) -> list[str]:
        return [instruction.text for instruction in getattr(self, kind)[split]]


def load_prompts(config: DataConfig) -> Instructions:
    """The instruction sets of a run, sampled as the config says.

    With a seed, the draws follow the paper's order from one random stream: harmful train, harmless
    train, harmful val, harmless val, harmless test (PAPER 2.1); without, files are taken in order.
    Raises PromptError.
    """
    if config.harmful:
        pools = {
            kind: _cut(read_instructions(Path(getattr(config, kind))), config, kind)
            for kind in KINDS
        }
        prompts = Instructions(**pools)
    elif config.source == "paper":
        prompts = _draw({kind: _published_splits(config, kind) for kind in KINDS}, config)
    else:
        prompts = _draw({kind: builtin(kind) for kind in KINDS}, config)
    _check_disjoint(prompts)
    return prompts


def builtin(kind: str) -> Split:
    """The set written for this project: 128 topic pairs, so that the difference is intent."""
    pairs = json.loads(
        resources.files("jax_refusal.data").joinpath("builtin_prompts.json").read_text()
    )
    return {
        split: [Instruction(p[kind], p["category"]) for p in pairs if p["split"] == split]
        for split in SPLITS
    }


def _published_splits(config: DataConfig, kind: str) -> Split:
    names = {split: f"{kind}_{split}" for split in SPLITS}
    if kind == "harmful":  # the paper tests on benchmark sets, not on the split
        names["test"] = config.paper_test
    return {split: published(config, name) for split, name in names.items()}


def published(config: DataConfig, name: str) -> list[Instruction]:
    """A published set: from data.paper_dir, the user's cache, or its home (and then cached)."""
    folder = "processed" if name == config.paper_test else "splits"
    if config.paper_dir.startswith(HUB):
        return read_instructions(_from_hub(config.paper_dir, f"{folder}/{name}.json"))
    if config.paper_dir:
        for place in ("splits", "processed", ""):
            path = Path(config.paper_dir) / place / f"{name}.json"
            if path.is_file():
                return read_instructions(path)
        raise PromptError(
            f"data.paper_dir={config.paper_dir!r} has no {name}.json, neither in itself nor in "
            "splits/ or processed/."
        )
    cached = cache_directory() / "published" / Path(PUBLISHED).parent.name / f"{name}.json"
    if not cached.is_file():
        address = f"{PUBLISHED}/{folder}/{name}.json"
        try:
            with urllib.request.urlopen(address, timeout=60) as response:
                content = response.read()
            parse(content.decode("utf-8"), address)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise PromptError(
                f"The published set {name} could not be fetched from {address} ({error}). Connect, "
                'or point data.paper_dir at a copy of it, or use data.source="builtin".'
            ) from None
        try:
            atomic_write(cached, content)
        except OSError as error:
            raise PromptError(f"{cached} cannot be written ({error.strerror}).") from None
    return read_instructions(cached)


def _from_hub(paper_dir: str, file: str) -> Path:
    """A set's file in the hub's cache, fetched if it is not there yet."""
    import huggingface_hub
    from huggingface_hub import errors

    dataset, _, revision = paper_dir.removeprefix(HUB).partition("@")
    if not revision:
        raise PromptError(
            f"data.paper_dir={paper_dir!r} names no revision; give {HUB}OWNER/NAME@REVISION, so "
            "that a later run reads the same prompts."
        )
    given = f"data.paper_dir={paper_dir!r}"
    try:
        fetched = huggingface_hub.hf_hub_download(
            dataset, file, repo_type="dataset", revision=revision
        )
    except errors.RemoteEntryNotFoundError:
        raise PromptError(f"{given} has no {file}.") from None
    except errors.RepositoryNotFoundError:
        raise PromptError(
            f"{given}: the hub has no such dataset, or it is gated and needs a token "
            "(huggingface-cli login)."
        ) from None
    except errors.RevisionNotFoundError:
        raise PromptError(f"{given}: no revision {revision!r} there.") from None
    except errors.HFValidationError as error:
        raise PromptError(f"{given} is no hub id ({error}).") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise PromptError(
            f"{given}: {file} is not in the hub cache, and the hub could not be reached "
            f"({type(error).__name__}). Connect, or give a local copy."
        ) from error
    return Path(fetched)


def cache_directory() -> Path:
    """Where fetched data and compiled programs are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jax_refusal"


def _draw(pools: dict[str, Split], config: DataConfig) -> Instructions:
    """The paper's draws, in the paper's order, from one stream."""
    stream = random.Random(config.seed)
    drawn: dict[str, Split] = {kind: {} for kind in KINDS}
    for split in ("train", "val"):
        for kind in KINDS:
            drawn[kind][split] = _sample(pools, kind, split, config, stream)
    # A harmful test set that is wanted whole takes nothing from the stream (the paper: all of
    # JailbreakBench); a part of one is drawn aside, so that the harmless draw stays the same.
    aside = random.Random(config.seed)
    whole = len(pools["harmful"]["test"]) == config.n_test
    drawn["harmful"]["test"] = (
        pools["harmful"]["test"] if whole else _sample(pools, "harmful", "test", config, aside)
    )
    drawn["harmless"]["test"] = _sample(pools, "harmless", "test", config, stream)
    return Instructions(**drawn)


def _sample(
    pools: dict[str, Split], kind: str, split: str, config: DataConfig, stream: random.Random
) -> list[Instruction]:
    pool, count = pools[kind][split], getattr(config, f"n_{split}")
    if count > len(pool):
        raise PromptError(
            f"data.n_{split}={count}, and the {kind} {split} set ({config.source}) has {len(pool)}."
        )
    return pool[:count] if config.seed is None else stream.sample(pool, count)


def _cut(pool: list[Instruction], config: DataConfig, kind: str) -> Split:
    """A user's file: the first n_train, the next n_val, the next n_test, shuffled if seeded."""
    counts = [config.n_train, config.n_val, config.n_test]
    if sum(counts) > len(pool):
        raise PromptError(
            f"data.{kind} has {len(pool)} instructions; data.n_train + n_val + n_test = {counts} "
            f"needs {sum(counts)}."
        )
    if config.seed is not None:
        pool = random.Random(config.seed).sample(pool, len(pool))
    ends = [sum(counts[: i + 1]) for i in range(3)]
    return {
        split: pool[end - count : end]
        for split, count, end in zip(SPLITS, counts, ends, strict=True)
    }


def _check_disjoint(prompts: Instructions) -> None:
    """No prompt is trained on and tested on, and none is both harmful and harmless."""
    seen: dict[str, str] = {}
    for kind in KINDS:
        for split in SPLITS:
            for text in set(prompts.texts(kind, split)):
                place = f"{kind} {split}"
                if text in seen:
                    raise PromptError(f"{text[:60]!r} is in both {seen[text]} and {place}.")
                seen[text] = place
