"""Instruction sets: ours, a user's own, and the published ones in the paper's order of draws."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from jax_refusal.config import DataConfig
from jax_refusal.data.prompts import KINDS, SPLITS, PromptError, builtin, load_prompts
from tests import shared


def write(path: Path, texts: list[str], **fields) -> str:
    path.write_text(json.dumps([{"instruction": text} | fields for text in texts]))
    return str(path)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """Two files of 12 instructions, as fields of DataConfig."""
    return {
        kind: write(tmp_path / f"{kind}.json", [f"{kind} {i}" for i in range(12)], category="c")
        for kind in KINDS
    }


def test_builtin_counts():
    for kind in KINDS:
        sizes = {split: len(builtin(kind)[split]) for split in SPLITS}
        assert sizes == {"train": 64, "val": 32, "test": 32}


def test_builtin_instructions_are_all_different_and_all_categories_are_in_every_split():
    everything = [i.text.strip().lower() for k in KINDS for s in SPLITS for i in builtin(k)[s]]
    assert len(set(everything)) == len(everything) == 256
    categories = {split: {i.category for i in builtin("harmful")[split]} for split in SPLITS}
    assert categories["train"] == categories["val"] == categories["test"]
    assert "" not in categories["train"]


def test_builtin_is_made_of_pairs_that_share_topic_and_category():
    path = Path(__file__).parents[2] / "jax_refusal/data/builtin_prompts.json"
    pairs = json.loads(path.read_text(encoding="utf-8"))
    assert len({pair["topic"] for pair in pairs}) == len(pairs) == 128
    for split in SPLITS:
        harmful, harmless = (builtin(kind)[split] for kind in KINDS)
        assert [i.category for i in harmful] == [i.category for i in harmless]


def test_builtin_drawn_in_part_is_a_part_of_each_split():
    prompts = load_prompts(DataConfig(n_train=10, n_val=5, n_test=7))
    for kind in KINDS:
        for split, count in zip(SPLITS, (10, 5, 7), strict=True):
            texts = prompts.texts(kind, split)
            assert len(set(texts)) == count
            assert set(texts) <= {i.text for i in builtin(kind)[split]}


def test_a_seed_decides_the_draw():
    sizes = {"n_train": 10, "n_val": 5, "n_test": 7}
    first = load_prompts(DataConfig(seed=1, **sizes))
    assert first == load_prompts(DataConfig(seed=1, **sizes))
    assert first != load_prompts(DataConfig(seed=2, **sizes))


def test_without_a_seed_the_order_is_the_files():
    prompts = load_prompts(DataConfig(seed=None, n_train=3, n_val=3, n_test=3))
    for kind in KINDS:
        for split in SPLITS:
            assert prompts.texts(kind, split) == [i.text for i in builtin(kind)[split][:3]]


def test_own_files_without_a_seed_are_cut_in_file_order(own):
    prompts = load_prompts(DataConfig(**own, seed=None, n_train=5, n_val=4, n_test=2))
    for kind in KINDS:
        assert prompts.texts(kind, "train") == [f"{kind} {i}" for i in range(5)]
        assert prompts.texts(kind, "val") == [f"{kind} {i}" for i in range(5, 9)]
        assert prompts.texts(kind, "test") == [f"{kind} {i}" for i in range(9, 11)]
    assert prompts.harmful["train"][0].category == "c"


def test_own_files_with_a_seed_are_shuffled_the_same_way_every_time(own):
    sizes = {"n_train": 5, "n_val": 4, "n_test": 3}
    first = load_prompts(DataConfig(**own, seed=3, **sizes))
    assert first == load_prompts(DataConfig(**own, seed=3, **sizes))
    for kind in KINDS:
        drawn = [text for split in SPLITS for text in first.texts(kind, split)]
        assert drawn != sorted(drawn) and len(set(drawn)) == 12


def test_too_few_instructions(own):
    with pytest.raises(PromptError, match=r"data\.harmful has 12.*\[5, 5, 3\] needs 13"):
        load_prompts(DataConfig(**own, n_train=5, n_val=5, n_test=3))
    with pytest.raises(PromptError, match=r"data\.n_train=65.*harmful train set.* has 64"):
        load_prompts(DataConfig(n_train=65, n_val=1, n_test=1))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"instruction": "a"}, {"instruction": " "}], "item 1"),
        ([{"instruction": "a"}, {"instruction": 3}], 'item 1: .*no "instruction" that is a text'),
        ([{"prompt": "a"}], "item 0"),
        ([3], "item 0: '3'"),
        ([{"instruction": "a", "category": ["x"]}], r"item 0: the category \['x'\] is not a text"),
        ([], "must be a list .* not empty"),
        ({"instruction": "a"}, "must be a list"),
    ],
)
def test_malformed_own_files_name_the_file_and_the_item(tmp_path, own, rows, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(PromptError, match=rf"bad\.json.*{words}"):
        load_prompts(DataConfig(harmful=str(path), harmless=own["harmless"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"[{", "not valid JSON"), (b"\xff\xfe", r"not UTF-8 \(UTF-16\)")],
)
def test_unreadable_own_files(tmp_path, own, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=rf"bad\.json (is )?{words}"):
        load_prompts(DataConfig(harmful=str(path), harmless=own["harmless"]))


@pytest.mark.parametrize(
    ("harmful", "harmless", "places"),
    [
        (["a", "b", "a"], ["x", "y", "z"], "harmful train and harmful test"),
        (["a", "b", "c"], ["x", "a", "z"], "harmful train and harmless val"),
    ],
)
def test_one_text_in_two_places_is_refused(tmp_path, harmful, harmless, places):
    files = {
        "harmful": write(tmp_path / "harmful.json", harmful),
        "harmless": write(tmp_path / "harmless.json", harmless),
    }
    with pytest.raises(PromptError, match=f"'a' is in both {places}"):
        load_prompts(DataConfig(**files, seed=None, n_train=1, n_val=1, n_test=1))


def test_the_papers_draws_in_the_papers_order():
    """One stream from seed 42: train, then validation, of both kinds, then harmless test."""
    folder = shared.folder("instructions")

    def pool(name: str) -> list[str]:
        rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return [row["instruction"] for row in rows]

    before = random.getstate()
    random.seed(42)
    expected = {
        ("harmful", "train"): random.sample(pool("harmful_train"), 128),
        ("harmless", "train"): random.sample(pool("harmless_train"), 128),
        ("harmful", "val"): random.sample(pool("harmful_val"), 32),
        ("harmless", "val"): random.sample(pool("harmless_val"), 32),
        ("harmful", "test"): pool("jailbreakbench"),
        ("harmless", "test"): random.sample(pool("harmless_test"), 100),
    }
    random.setstate(before)
    prompts = load_prompts(DataConfig(source="paper", paper_dir=str(folder)))
    assert random.getstate() == before  # the global stream is nobody's business
    assert {key: prompts.texts(*key) for key in expected} == expected
    assert Counter(i.category for i in prompts.harmful["test"])["Privacy"] == 10


def test_a_part_of_the_harmful_test_set_leaves_the_other_draws_as_they_are():
    folder = str(shared.folder("instructions"))
    whole = load_prompts(DataConfig(source="paper", paper_dir=folder))
    other = load_prompts(DataConfig(source="paper", paper_dir=folder, paper_test="strongreject"))
    assert other.harmless == whole.harmless
    assert other.harmful["train"] == whole.harmful["train"]
    assert len(other.harmful["test"]) == 100


def paper_folder(root: Path, harmless_test: str = "harmless_test") -> Path:
    """The published layout, ten instructions a set."""
    for name in [f"{kind}_{split}" for kind in KINDS for split in SPLITS]:
        (root / "splits").mkdir(parents=True, exist_ok=True)
        stem = harmless_test if name == "harmless_test" else name
        write(root / "splits" / f"{name}.json", [f"{stem} {i}" for i in range(10)])
    (root / "processed").mkdir()
    write(root / "processed" / "jailbreakbench.json", [f"jbb {i}" for i in range(10)])
    return root


SMALL = {"source": "paper", "n_train": 3, "n_val": 3, "n_test": 10}


def test_paper_dir_may_be_the_authors_layout(tmp_path):
    prompts = load_prompts(DataConfig(**SMALL, paper_dir=str(paper_folder(tmp_path))))
    assert prompts.texts("harmful", "test") == [f"jbb {i}" for i in range(10)]


def test_a_paper_dir_that_lacks_a_set_is_named(tmp_path):
    (paper_folder(tmp_path) / "splits" / "harmless_val.json").unlink()
    with pytest.raises(PromptError, match=r"paper_dir=.*no harmless_val\.json"):
        load_prompts(DataConfig(**SMALL, paper_dir=str(tmp_path)))


def test_duplicates_across_published_splits_are_refused(tmp_path):
    folder = paper_folder(tmp_path, harmless_test="harmful_train")
    with pytest.raises(PromptError, match="is in both harmful train and harmless test"):
        load_prompts(DataConfig(**(SMALL | {"n_train": 10}), paper_dir=str(folder)))
