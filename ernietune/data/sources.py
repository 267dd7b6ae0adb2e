"""Record files: JSON lines, JSON arrays, CSV, parquet and folders saved by `datasets`, read by index.

A source keeps where every record lies, never the parsed records: 24 bytes a record, whatever its size.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import DataError

BOM = b"\xef\xbb\xbf"
# A CSV cell is text; these columns hold lists, which are written into it as JSON.
JSON_COLUMNS = (
    *("messages", "conversations", "tools", "images", "videos"),
    *("history", "src", "tgt", "label", "weight"),
)


class Source(Protocol):
    """One readable data set: records by index, each with a name for messages."""

    @property
    def folder(self) -> Path:
        """The folder relative image paths start from."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """`file:line`, or `file: row N` for a table."""

    def read(self, index: int) -> object:
        """Parse record `index`; DataError names file, line and column."""


@dataclass(frozen=True, eq=False)
class JsonSource:
    """Records of one JSON file, found by their byte offsets and parsed on demand.

    `starts`, `ends`, `lines` are int64 [records]; each read opens the file, so threads need no lock.
    """

    path: Path
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lines: NDArray[np.int64]

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """`file:line` of the record's first character."""
        return f"{self.path}:{self.lines[index]}"

    def read(self, index: int) -> object:
        """Parse one record; DataError when its bytes are gone, or not one JSON value in UTF-8."""
        raw = self._bytes(index)
        try:
            return json.loads(raw.decode("utf-8"))
        except json.JSONDecodeError as error:
            line = int(self.lines[index]) + error.lineno - 1
            raise DataError(
                f"{self.path}:{line}: column {error.colno}: not valid JSON ({error.msg}); "
                "every line must hold one complete JSON object"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where(index)}: byte {error.start + 1} of the record is not UTF-8; save it as UTF-8"
            ) from error

    def _bytes(self, index: int) -> bytes:
        try:
            with open(self.path, "rb") as handle:
                handle.seek(int(self.starts[index]))
                return handle.read(int(self.ends[index] - self.starts[index]))
        except OSError as error:
            raise DataError(
                f"{self.where(index)}: the file was there at the start and cannot be read now "
                f"({error.strerror}); put it back and give the same command again"
            ) from error


@dataclass(frozen=True, eq=False)
class TableSource:
    """Rows of a memory-mapped `datasets.Dataset` in Arrow format, which leaves pictures undecoded."""

    path: Path
    table: Any

    @property
    def folder(self) -> Path:
        """The folder that holds the parquet file or the saved folder."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        """`file: row N`, counted from 0."""
        return f"{self.path}: row {index}"

    def read(self, index: int) -> object:
        """One row as plain Python values, without the nulls Arrow writes for absent fields."""
        return without_nulls(self.row(index))

    def row(self, index: int) -> dict[str, Any]:
        """One row as Arrow has it; a picture is {"bytes", "path"}."""
        row: dict[str, Any] = self.table[index].to_pylist()[0]
        return row


@dataclass(frozen=True, eq=False)
class CsvSource(TableSource):
    """Rows of a CSV file: cells are text, an empty one is absent, JSON_COLUMNS hold JSON."""

    def read(self, index: int) -> object:
        """One row; DataError when a cell that must hold JSON does not."""
        cells = {column: text for column, text in self.row(index).items() if text}
        return {column: self._value(index, column, text) for column, text in cells.items()}

    def _value(self, index: int, column: str, text: str) -> object:
        if column not in JSON_COLUMNS or text.lstrip()[:1] not in ("[", "{"):
            return text
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.where(index)}: column {column!r} is not valid JSON: {error}") from error


def open_source(path: str | Path) -> Source:
    """Index one file or folder; DataError when it is missing, empty or of an unknown kind."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        source: Source = _open_saved_folder(path)
    elif path.suffix in _OPENERS:
        source = _OPENERS[path.suffix](path)
    else:
        raise DataError(
            f"{path}: unknown kind of data; give a .jsonl, .json, .csv or .parquet file, or a folder that "
            "`datasets` saved"
        )
    if len(source) == 0:
        raise DataError(f"{path}: holds no records")
    return source


def read_records(path: str | Path) -> Iterator[tuple[object, str]]:
    """Every record of a file or folder in order, each with its `file:line`."""
    source = open_source(path)
    for index in range(len(source)):
        yield source.read(index), source.where(index)


def without_nulls(value: Any) -> Any:
    """Drop dictionary keys whose value is None, at every depth: Arrow gives each row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _index_jsonl(path: Path) -> JsonSource:
    """By lines, or as an array: ERNIEKit's demo files are arrays under this name."""
    with open(path, "rb") as handle:
        begins = handle.read(64).removeprefix(BOM).lstrip()[:1]
    return _index_array(path) if begins == b"[" else _index_lines(path)


def _index_lines(path: Path) -> JsonSource:
    """Offsets of the non-blank lines."""
    spans: list[tuple[int, int, int]] = []
    offset = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            lead = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if line[lead:].strip():
                spans.append((offset + lead, offset + len(line.rstrip(b"\r\n")), number))
            offset += len(line)
    return _json_source(path, spans)


def _index_array(path: Path) -> JsonSource:
    """Offsets of the elements of one top-level array; the file is read once, element by element."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    try:
        spans = _element_spans(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: column {error.colno}: not valid JSON ({error.msg}); "
            "a .json file must hold one array of records"
        ) from error
    lead = len(BOM) if path.read_bytes().startswith(BOM) else 0
    return _json_source(path, [(a + lead, b + lead, line) for a, b, line in _to_bytes(text, spans)])


def _element_spans(text: str) -> list[tuple[int, int]]:
    """(first, end) character of every element of the array `text`; JSONDecodeError when it is none."""
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, position)
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]" or spans:
        _, end = decoder.raw_decode(text, position)
        spans.append((position, end))
        position = _skip_space(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _skip_space(text, position + 1)
    tail = _skip_space(text, position + 1)
    if tail != len(text):
        raise json.JSONDecodeError("Extra data", text, tail)
    return spans


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _to_bytes(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Character spans in order -> (first byte, end byte, line) without encoding the text again for each."""
    characters, offset, line = 0, 0, 1
    for first, end in spans:
        between, inside = text[characters:first], text[first:end]
        start = offset + len(between.encode("utf-8"))
        line += between.count("\n")
        offset = start + len(inside.encode("utf-8"))
        yield start, offset, line
        line += inside.count("\n")
        characters = end


def _json_source(path: Path, spans: list[tuple[int, int, int]]) -> JsonSource:
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    return JsonSource(path, table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())


def _open_parquet(path: Path) -> TableSource:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        return TableSource(path, datasets.Dataset.from_parquet(str(path)).with_format("arrow"))
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error


def _open_csv(path: Path) -> CsvSource:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            columns = next(csv.reader(handle), [])
        # Else a column of digits would become numbers, and the word "null" would vanish.
        features = datasets.Features({column: datasets.Value("string") for column in columns})
        table = datasets.Dataset.from_csv(
            str(path), features=features, keep_default_na=False, encoding="utf-8-sig"
        )
        return CsvSource(path, table.with_format("arrow"))
    except (DatasetGenerationError, OSError, ValueError, csv.Error) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{path}: cannot be read as CSV ({cause}); its first line names the columns"
        ) from error


def _open_saved_folder(path: Path) -> TableSource:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not a folder saved by `datasets` (save_to_disk): {error}") from error
    if isinstance(table, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {', '.join(table)}; give the folder of one of them")
    return TableSource(path, table.with_format("arrow"))


_OPENERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": _index_jsonl,
    ".json": _index_array,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
}
