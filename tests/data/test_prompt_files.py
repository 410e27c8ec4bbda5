"""Files of instructions, in all the forms that people have."""

import json
import os
from pathlib import Path

import pytest

from jax_refusal.config import DataConfig
from jax_refusal.data import prompt_files
from jax_refusal.data.prompt_files import Instruction, PromptError, read_instructions
from jax_refusal.data.prompts import load_prompts

ROWS = [
    Instruction("Name a color.", "art"),
    Instruction("Say “hi, you”.\nTwice."),
    Instruction("é"),
]
PLAIN = [Instruction(row.text.replace("\n", " ")) for row in ROWS]
OBJECTS = [{"instruction": r.text} | ({"category": r.category} if r.category else {}) for r in ROWS]
TEXTS = [row.text for row in PLAIN]
LINES = "".join(json.dumps(row) + "\n" for row in OBJECTS)
TABLE = 'instruction,category\nName a color.,art\n"Say “hi, you”.\nTwice.",\né,\n'

FORMS = {
    "a.json": (json.dumps(OBJECTS), ROWS),
    "texts.json": (json.dumps(TEXTS), PLAIN),
    "mixed.json": (json.dumps([OBJECTS[0], TEXTS[1], TEXTS[2]]), [ROWS[0], *PLAIN[1:]]),
    "lines.json": (LINES, ROWS),  # as they are often named
    "any name": (json.dumps(OBJECTS), ROWS),
    "a.jsonl": (LINES, ROWS),
    "A.NDJSON": (LINES, ROWS),
    "texts.jsonl": ("".join(json.dumps(text) + "\n" for text in TEXTS), PLAIN),
    "a.csv": (TABLE, ROWS),
    "order.csv": ("n, Category ,Instruction\n1,art,Name a color.\n", ROWS[:1]),
    "only.csv": ("instruction\nName a color.\né\n", [Instruction("Name a color."), ROWS[2]]),
    "quotes.csv": ('instruction\n"Say ""hi""."\n', [Instruction('Say "hi".')]),
    "a.tsv": ("instruction\tcategory\nName a color.\tart\n", ROWS[:1]),
    "a.txt": ("\n".join(TEXTS), PLAIN),
    "blanks.txt": ("\n  " + " \t\n\n  ".join(TEXTS) + "\n\n", PLAIN),
    "hash.txt": ("# a\n{b}\n", [Instruction("# a"), Instruction("{b}")]),
}


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, tmp_path: Path):
    text, rows = FORMS[name]
    assert read_instructions(write(tmp_path, name, text)) == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"])
def test_a_byte_order_mark_and_other_ends_of_lines(name: str, tmp_path: Path):
    text, rows = FORMS[name]
    if name == "a.csv":  # whose quoted text has a line end of its own
        text, rows = (
            text.replace("\nTwice", " Twice"),
            [PLAIN[1] if r is ROWS[1] else r for r in rows],
        )
    assert read_instructions(write(tmp_path, name, text, "utf-8-sig")) == rows
    assert read_instructions(write(tmp_path, name, text.replace("\n", "\r\n"))) == rows


def test_a_line_ends_where_editors_end_it(tmp_path: Path):
    """Not at other characters that Python takes for ends, which stand in texts."""
    text = "one\x0bb\x0cc\x1cd\x85e\u2028f\ntwo"
    assert [i.text for i in read_instructions(write(tmp_path, "a.txt", text))] == text.split("\n")


def test_text_within_a_cell_is_left_as_it_is(tmp_path: Path):
    (row,) = read_instructions(write(tmp_path, "a.csv", 'instruction\n"  a,\r\n b  "\n'))
    assert row.text == "  a,\r\n b  "


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "[{]", "is not valid JSON: .*line 1 column 3.*jsonl, .csv"),
        ("a.json", '{"instruction": "a"}', "must be a list .* not empty"),
        ("a.json", '{"instruction": ["a"]}', "must be a list .* not empty"),
        ("a.json", "[]", "must be a list .* not empty"),
        ("a.json", '["a", " "]', 'item 1: .* no "instruction"'),
        ("a.json", '["a", ["b"]]', 'item 1: .* no "instruction"'),
        ("a.json", '[{"goal": "a"}]', r"item 0: .* Its fields are \['goal'\]"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.json", "", "is not valid JSON"),
        ("a.json", '["\\ud800"]', "item 0: .* half of a character"),
        ("lines.json", '{"instruction": "a"}\n{"instruction": 3}\n', "line 2: .* no"),
        ("a.jsonl", '{"instruction": "a"}\n\n{"instruction": \n', "line 3 is not valid JSON"),
        ("a.jsonl", '{"instruction": "a"}\n[]\n', "line 2: .* no"),
        ("a.jsonl", '{"prompt": "a", "x": 1}', r"line 1: .* Its fields are \['prompt', 'x'\]"),
        ("a.jsonl", '[\n "a"\n]', "line 1 is not valid JSON"),
        ("a.jsonl", "\n \n", "has no instructions"),
        (
            "a.csv",
            "goal,target\na,b\n",
            r"line 1: the columns are \['goal', 'target'\]; one must be",
        ),
        ("a.csv", "Name a color.\nName a bird.\n", r"the columns are \['Name a color\.'\]"),
        ("a.csv", "instruction;category\na;b\n", r"the columns are \['instruction;category'\]"),
        ("a.csv", "instruction,Instruction\na,b\n", "one must be 'instruction'"),
        ("a.csv", "instruction\na\nOne, two, three.\n", "line 3: 3 fields under 1 columns.*quotes"),
        ("a.csv", "instruction,category\na,b\n\nc\n", "line 4: 1 fields under 2 columns"),
        ("a.csv", 'instruction\na\n"b\nc\nd\n', "line 3: unexpected end of data"),
        ("a.csv", 'instruction\n"b" c\n', "line 2: "),
        ("a.csv", "instruction,category\na,b\n ,c\n", 'line 3: .* no "instruction"'),
        ("a.csv", "instruction\n", "has no instructions"),
        ("a.csv", "instruction\n" + "a" * 200_000 + "\n", "line 2: field larger than field limit"),
        ("a.txt", "\n \n", "has no instructions"),
        ("a.txt", "", "has no instructions"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, text: str, words: str, tmp_path: Path):
    with pytest.raises(PromptError, match=rf"{name}[ ,:].*{words}|{name} {words}") as error:
        read_instructions(write(tmp_path, name, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\né\n".encode("latin-1"), "line 2 has the byte 0xe9"),
        ("a\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_another_encoding_is_named(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(PromptError, match=rf"a\.txt is not UTF-8 \({words}\): save it as UTF-8"):
        read_instructions(tmp_path / "a.txt")


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PromptError, match=r"absent\.txt cannot be read"):
        read_instructions(tmp_path / "absent.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.setattr(prompt_files, "LARGEST", 2**20)
    (tmp_path / "large.txt").write_bytes(b"a\n" * 2**20)
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "pipe.txt", tmp_path / "large.txt"):
        with pytest.raises(PromptError, match="is no file of 1 MiB at most"):
            read_instructions(path)


def test_a_study_of_files_of_two_forms(tmp_path: Path):
    files = {
        "harmful": write(tmp_path, "harmful.csv", "instruction\n" + "a\nb\nc\n"),
        "harmless": write(tmp_path, "harmless.txt", "d\ne\nf\n"),
    }
    config = DataConfig(
        **{kind: str(path) for kind, path in files.items()}, seed=None, n_train=1, n_val=1, n_test=1
    )
    prompts = load_prompts(config)
    assert prompts.texts("harmful", "test") == ["c"] and prompts.texts("harmless", "train") == ["d"]
