"""Turn tables of facts into records: CSV and TSV in their common dialects, and Excel's .xlsx."""

from __future__ import annotations

import csv
import datetime
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from forgetlearn.errors import FactError, missing_extra, plain, some
from forgetlearn.facts.forms import KNOWN, TableRow, place
from forgetlearn.facts.names import NUMBERED_FOLDED, SYNONYMS, fold

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
HEAD = 2**20  # characters that are searched for the header
LARGEST_BOOK = 2**30  # bytes that an .xlsx may expand to
COMMON = frozenset(map(fold, chain(KNOWN, *SYNONYMS.values())))


@dataclass(frozen=True)
class Source:
    """The unchecked records of a source, and how they were read, if that had to be detected."""

    records: Sequence[object]
    lines: Sequence[int] = ()  # the line of each record in its file, if it has one
    read_as: str = ""
    blank_rows: int = 0  # rows of a table that are not records


def parse_csv(text: str, source: str, columns: Iterable[str], usual: str) -> Source:
    """Read a table from text, with the delimiter that gives the header the most known names.

    `columns` are further names to expect in the header; `usual` is the delimiter to take if several do equally well.
    """
    start = len(text) - len(text.lstrip("\r\n"))
    lines = io.StringIO(text, newline="")
    stated = re.compile(r"sep=([^\r\n])[\r\n]", re.IGNORECASE).match(text, start)
    if stated:  # Excel's own way to name the delimiter
        delimiter = stated[1]
    else:
        delimiter = _delimiter(text[start : start + HEAD], {fold(name) for name in columns} | COMMON, usual)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = ((reader.line_num, row) for row in reader if row)
    try:
        if stated:
            next(rows)
        return _table(rows, source, delimiter)
    except csv.Error as error:
        hint = " Is a quote left open? JSON and JSONL have no limit." if "field limit" in str(error) else ""
        raise FactError(f"{source} is not CSV at line {reader.line_num}: {error}.{hint}") from error


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


def _table(rows: Iterator[tuple[int, list[str]]], source: str, delimiter: str | None) -> Source:
    """Return the records under a header, from (line, row) pairs. `delimiter` is None for Excel, which pads rows."""
    header = _header(next(rows, (0, []))[1], source)
    records: list[TableRow] = []
    lines: list[int] = []
    n_blank = n_empty = 0
    for line, row in rows:
        if not any(cell.strip() for cell in row):
            n_blank += bool(row)
            n_empty += not row
            continue
        n_blank, n_empty = n_blank + n_empty, 0  # a sheet may end in rows without cells, which are not counted
        extra = any(cell.strip() for cell in row[len(header) :])
        if extra or (delimiter is not None and len(row) < len(header)):
            raise FactError(_uneven(place(source, len(records) + 1, line), row, header, delimiter))
        records.append(TableRow(zip(header, [*row, *[""] * (len(header) - len(row))], strict=False)))
        lines.append(line)
    read_as = f"a table, its cells divided by {DELIMITERS.get(delimiter or '', repr(delimiter))}"
    return Source(records, lines, read_as, n_blank)


def _header(cells: Sequence[str], source: str) -> list[str]:
    """Return the names of the columns. A column without a name gets its position; a repeated name raises FactError."""
    header = [cell.strip() or f"(column {number}, without a name)" for number, cell in enumerate(cells, 1)]
    if twice := sorted(name for name, count in Counter(header).items() if count > 1):
        raise FactError(f"{source}: the header names {some(twice)} more than once.")
    return header


def _uneven(where: str, row: Sequence[str], header: Sequence[str], delimiter: str | None) -> str:
    text = plain((delimiter or " | ").join(row))
    shown = text if len(text) <= 120 else text[:119] + "…"
    if len(row) < len(header):
        remedy = f"Is a cell missing? An empty cell still needs its {delimiter!r}."
    elif delimiter is None or len(header) == 1:  # a title stands above the header
        remedy = f"The header is {plain(' | '.join(header))[:120]!r}. Remove lines above it, and name every column."
    else:
        remedy = f'Does a cell hold {delimiter!r}? Put it in quotes: "a{delimiter}b".'
    return f"{where} has {len(row)} cell{'s' * (len(row) != 1)}, but the header has {len(header)}: {shown}\n{remedy}"


# Excel -------------------------------------------------------------------------------------------


def parse_xlsx(path: Path) -> Source:
    """Read the only non-empty sheet of an Excel file; numbers and dates become text."""
    try:
        import openpyxl
    except ImportError as error:
        raise missing_extra(f"{path}, an Excel file", "excel", error) from error
    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(part.file_size for part in packed.infolist())) > LARGEST_BOOK:
                raise FactError(f"{path} would expand to {size / 1e9:.1f} GB. Save it as CSV.")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            return _sheet(book.worksheets, str(path))
        finally:
            book.close()
    except FactError:
        raise
    except Exception as error:  # zip, XML and openpyxl may raise anything for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise FactError(f"{path} cannot be read as an Excel file (.xlsx): {type(error).__name__}: {reason}") from error


def _sheet(sheets: Iterable[ReadOnlyWorksheet], source: str) -> Source:
    filled = {}
    for sheet in sheets:
        rows = _rows(sheet)
        if header := next((row for row in rows if any(cell.strip() for cell in row[1])), None):
            filled[str(sheet.title)] = chain([header], rows)
    if len(filled) != 1:
        found = f"{len(filled)} sheets with something in them: {some(list(filled))}" if filled else "no sheet with rows"
        raise FactError(f"{source} has {found}. Leave one, or save that one as CSV.")
    ((title, rows),) = filled.items()
    return replace(_table(rows, source, None), read_as=f"Excel, sheet {title!r}")


def _rows(sheet: ReadOnlyWorksheet) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a sheet as (number, cells), with the cells as text."""
    sheet.reset_dimensions()  # the size that the file states may be wrong
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
