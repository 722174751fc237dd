"""Turn tables of facts into records: CSV and TSV in their common dialects, and Excel's .xlsx."""

from __future__ import annotations

import csv
import datetime
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from forgetlearn.errors import FactError, missing_extra, plain, some
from forgetlearn.facts.forms import KNOWN, TableRow
from forgetlearn.facts.names import NUMBERED_FOLDED, SYNONYMS, fold

DELIMITERS = ",;\t|"
LINE = re.compile(r"[^\r\n]+(?:\r\n|\r|\n)?|\r\n|\r|\n")
HEAD = 2**20  # letters in which the header is looked for
LARGEST_BOOK = 2**30  # bytes that an .xlsx may unpack to
COMMON = frozenset(fold(name) for name in (*KNOWN, *(name for names in SYNONYMS.values() for name in names)))


@dataclass(frozen=True)
class Table:
    """The records of a table, the number of blank rows (which are no records), and how it was read, in words."""

    records: list[object]
    blank_rows: int
    read_as: str


def parse_csv(text: str, source: str, columns: Iterable[str] = (), usual: str = ",") -> Table:
    """Read a table of text; the delimiter is the one that gives the header the most known names.

    `columns` are names that the header is known to have; `usual` is the delimiter if several do equally well.

    Raises:
        FactError: the text is no CSV, a row has other cells than the header, or a column is there twice.
    """
    lines = _Lines(text)
    said = re.compile(r"sep=([^\r\n])[\r\n]", re.IGNORECASE).match(text, lines.start())
    if said:  # Excel's own way to name it
        delimiter = said[1]
        next(lines)
    else:
        head = text[lines.start() : lines.start() + HEAD]
        delimiter = _delimiter(head, {fold(name) for name in columns} | COMMON, usual)
    try:
        records, blank = _records(lines.rows(delimiter), source, delimiter)
    except csv.Error as error:
        hint = " Is a quote left open? JSON and JSONL have no limit." if "field limit" in str(error) else ""
        raise FactError(f"{source} is not CSV at line {lines.number}: {error}.{hint}") from error
    return Table(records, blank, f"a table, its cells divided by {_shown(delimiter)}")


class _Lines:
    """Feeds the lines of a text to csv.reader. Skips empty lines between rows, but keeps them in quoted cells."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.number = text, 0, 0
        self.between_rows = True

    def start(self) -> int:
        """Return the position of the next line that is not empty."""
        found = re.compile(r"[\r\n]*").match(self.text, self.place)
        return found.end() if found else self.place

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.between_rows:
            self._pass(self.start())
            self.between_rows = False
        found = LINE.match(self.text, self.place)
        if not found:
            raise StopIteration
        self._pass(found.end())
        return found[0]

    def _pass(self, end: int) -> None:
        ends = [self.text.count(mark, self.place, end) for mark in ("\n", "\r", "\r\n")]
        unended = end > self.place and self.text[end - 1] not in "\r\n"  # the last line of a file may be
        self.number += ends[0] + ends[1] - ends[2] + unended
        self.place = end

    def rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows, each with the number of its last line."""
        self.between_rows = True
        for row in csv.reader(self, delimiter=delimiter, strict=True):
            yield self.number, row
            self.between_rows = True


def _shown(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}.get(delimiter, repr(delimiter))


def _delimiter(head: str, known: set[str], usual: str) -> str:
    """Return the delimiter that gives the header the most known names; ties go to more cells, then to `usual`."""

    def sense(delimiter: str) -> tuple[int, int, bool]:
        try:
            header = next(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter))
        except (csv.Error, StopIteration):
            return -1, 0, False
        names = [fold(name.strip()) for name in header]
        n_known = sum(name in known or NUMBERED_FOLDED.fullmatch(name) is not None for name in names)
        return n_known, len(names), delimiter == usual

    return max(DELIMITERS, key=sense)


def _records(rows: Iterator[tuple[int, Sequence[str]]], source: str, delimiter: str | None) -> tuple[list[object], int]:
    """Return the records under a header, and the number of blank rows; Excel, which pads rows, has no delimiter."""
    header = _header(next(rows, (0, ()))[1], source)
    records: list[object] = []
    n_blank = empty = 0
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            n_blank += bool(row)
            empty += not row
            continue
        if delimiter is None:  # a sheet may end in rows without cells; one between others is blank
            n_blank, empty = n_blank + empty, 0
        extra = any(cell.strip() for cell in row[len(header) :])
        if extra or (delimiter is not None and len(row) < len(header)):
            raise FactError(_uneven(f"{source}, record {len(records) + 1} (line {line})", row, header, delimiter))
        records.append(TableRow(zip(header, [*row, *[""] * (len(header) - len(row))], strict=False)))
    return records, n_blank


def _header(cells: Sequence[str], source: str) -> list[str]:
    """Return the names of the columns, each once; a nameless column is named by its position."""
    header = [cell.strip() or f"(column {number}, without a name)" for number, cell in enumerate(cells, 1)]
    if twice := sorted(name for name, count in Counter(header).items() if count > 1):
        raise FactError(f"{source}: the header names {some(twice)} more than once.")
    return header


def _uneven(where: str, row: Sequence[str], header: Sequence[str], delimiter: str | None) -> str:
    text = plain((delimiter or " | ").join(row))
    shown = text if len(text) <= 120 else text[:119] + "…"
    remedy = "Give every column a name."
    if delimiter is not None:
        remedy = f'Does a cell hold {delimiter!r}? Put it in quotes: "a{delimiter}b".'
    return f"{where} has {len(row)} cells, but the header has {len(header)}: {shown}\n{remedy}"


# Excel -------------------------------------------------------------------------------------------


def parse_xlsx(path: Path) -> Table:
    """Read the one sheet of an Excel file that is not empty; numbers and dates become text.

    Raises:
        FactError: the file is no .xlsx, unpacks to more than a gigabyte, or has several sheets with something in them.
        MissingExtraError: openpyxl is not installed.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise missing_extra(f"{path}, an Excel file", "excel", error) from error
    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(part.file_size for part in packed.infolist())) > LARGEST_BOOK:
                raise FactError(f"{path} would unpack to {size / 1e9:.1f} GB. Save it as CSV.")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            return _sheet(book.worksheets, str(path))
        finally:
            book.close()
    except FactError:
        raise
    except Exception as error:  # whatever zip, XML and openpyxl raise for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise FactError(f"{path} cannot be read as an Excel file (.xlsx): {type(error).__name__}: {reason}") from error


def _sheet(sheets: Iterable[Any], source: str) -> Table:
    filled = {}
    for sheet in sheets:
        rows = _rows(sheet)
        first = next((row for row in rows if any(cell.strip() for cell in row[1])), None)
        if first:
            filled[str(sheet.title)] = (first, rows)
    if len(filled) != 1:
        found = f"{len(filled)} sheets with something in them: {some(list(filled))}" if filled else "no sheet with rows"
        raise FactError(f"{source} has {found}. Leave one, or save that one as CSV.")
    ((title, (first, rest)),) = filled.items()
    records, blank = _records(chain([first], rest), source, None)
    return Table(records, blank, f"Excel, sheet {title!r}")


def _rows(sheet: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a sheet with their numbers, as text."""
    sheet.reset_dimensions()  # the size that a file states may be wrong
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        yield number, [_cell(value) for value in row]


def _cell(value: object) -> str:
    """Return a cell's value as text: a year as "1990", not "1990.0"; a date in ISO format."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.15g}"  # the digits that Excel keeps
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
