"""Files of instructions: JSON, JSON Lines, CSV and plain text, by the ending of the name.

All say the same: an instruction, and perhaps its category, for each row. What cannot be meant is an
error that names the file and the line; only empty lines are passed over.
"""

import csv
import dataclasses
import io
import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

INSTRUCTION, CATEGORY = "instruction", "category"
LARGEST = 2**28  # bytes
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class PromptError(ValueError):
    """An instruction set that is missing, too small or malformed."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    text: str
    category: str = ""


def read_instructions(path: Path) -> list[Instruction]:
    """The instructions of a file, in its order.

    .jsonl, .ndjson: a line is a text, or {"instruction": ..., "category": ...} with the category
    optional. .csv, .tsv: columns of those names. .txt: a line is an instruction. Any other name: a
    JSON list of what a line of .jsonl may be.
    """
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".csv": lambda text, name: _table(text, name, ","),
        ".tsv": lambda text, name: _table(text, name, "\t"),
        ".txt": _lines,
    }
    text, name = _text(path), str(path)
    rows = readers.get(path.suffix.lower(), _json_list)(text, name)
    found = [_instruction(row, place) for place, row in rows]
    if not found:
        raise PromptError(f"{path} has no instructions.")
    return found


def parse(text: str, name: str) -> list[Instruction]:
    """The instructions of a JSON list."""
    return [_instruction(row, place) for place, row in _json_list(text, name)]


def _text(path: Path) -> str:
    try:
        status = path.stat()
        small = stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST
        content = path.read_bytes() if small else None
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}).") from None
    if content is None:
        raise PromptError(f"{path} is no file of {LARGEST >> 20} MiB at most.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = MARKS.get(content[:2], f"line {line} has the byte 0x{content[error.start]:02x}")
        raise PromptError(f"{path} is not UTF-8 ({found}): save it as UTF-8.") from None


def _instruction(row: Any, place: str) -> Instruction:
    if isinstance(row, str):
        row = {INSTRUCTION: row}
    text = row.get(INSTRUCTION) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        there = f" Its fields are {list(row)[:20]!s:.200}." if isinstance(row, dict) else ""
        raise PromptError(
            f'{place}: {str(row)[:60]!r} has no "instruction" that is a text and not empty.{there}'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{place}: {text[:60]!r} holds half of a character.") from error
    category = row.get(CATEGORY) or ""
    if not isinstance(category, str):
        raise PromptError(f"{place}: the category {category!r:.60} is not a text.")
    return Instruction(text, category)


def _numbered(text: str, name: str) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each after its place."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield f"{name}, line {number}", line.strip()


def _lines(text: str, name: str) -> Iterable[tuple[str, Any]]:
    return _numbered(text, name)


def _json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for place, line in _numbered(text, name):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{place} is not valid JSON: {error}.") from None


def _json_list(text: str, name: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        # JSON Lines are often named .json: where the first line stands alone, it is they.
        first = next(_numbered(text, name), ("", ""))[1]
        if (
            isinstance(error, json.JSONDecodeError)
            and error.msg == "Extra data"
            and first[:1] in ("{", '"')
        ):
            return _json_lines(text, name)
        raise PromptError(
            f"{name} is not valid JSON: {error}. (Other files of instructions end in .jsonl, .csv, "
            ".tsv or .txt.)"
        ) from None
    if not isinstance(rows, list) or not rows:
        raise PromptError(
            f'{name} must be a list of {{"instruction": ...}} or of texts that is not empty.'
        )
    return ((f"{name}, item {i}", row) for i, row in enumerate(rows))


def _table(text: str, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows below a row of names. Strict: a quote that is not closed would swallow what follows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    try:
        for row in reader:
            place, start = f"{name}, line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [cell.strip().lower() for cell in row]
                if names.count(INSTRUCTION) != 1 or names.count(CATEGORY) > 1:
                    raise PromptError(
                        f"{place}: the columns are {row[:20]!s:.200}; one must be {INSTRUCTION!r}, "
                        f"and one may be {CATEGORY!r}."
                    )
            elif len(row) != len(names):
                raise PromptError(
                    f"{place}: {len(row)} fields under {len(names)} columns. A text that holds "
                    f"{delimiter!r} stands in quotes."
                )
            else:
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise PromptError(f"{name}, line {start}: {error}.") from None
