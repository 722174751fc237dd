"""Read the records of a file or of a data set on the hub, and report how the file was read."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from forgetlearn.errors import FactError, missing_extra, some
from forgetlearn.facts.fields import kind, loads
from forgetlearn.facts.forms import is_record, no_form
from forgetlearn.facts.tables import Source, parse_csv, parse_xlsx

TABLES = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", *TABLES, ".xlsx")
SAVE_AS = {".xls": ".xlsx", ".ods": ".xlsx", ".txt": ".csv or .tsv, if it is a table", ".parquet": ".jsonl"}
# UTF-32 comes first, because the mark of UTF-32-LE begins with the mark of UTF-16-LE.
MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
ASSUMED = "cp1252 (Western Windows; assumed, since it is not UTF-8)"
HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>[\w.%:\[\]-]+))?")


def is_hub_id(source: str) -> bool:
    """Return True for the id of a data set on the hub, `owner/name` or `owner/name:split`, that is not a path."""
    return bool(HUB.fullmatch(source)) and not source.lower().endswith(SUFFIXES) and not Path(source).exists()


def read_source(source: str | Path, columns: Mapping[str, str]) -> Source:
    """Return the unchecked records of a JSON, JSONL, CSV, TSV or Excel file, or of a data set on the hub.

    Raises:
        FactError: the file is missing, empty, damaged, a folder or a pipe, its suffix or encoding is unknown, or the
            data set cannot be loaded.
        MissingExtraError: openpyxl (for an Excel file) or `datasets` (for the hub) is not installed.
    """
    name = str(source)
    try:
        return _load_hub(name) if is_hub_id(name) else _parse_file(Path(source), columns)
    except OSError as error:  # the name is too long, or the folder may not be entered
        raise FactError(f"{name[:200]}: {error.strerror or error}. Give an existing file of facts.") from None


def _load_hub(source: str) -> Source:
    name, _colon, split = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"{source}, a data set on the hub", "hub", error) from error
    try:
        return Source(list(datasets.load_dataset(name, split=split or "train")))
    except Exception as error:  # the library may raise anything, depending on the network and the data set
        reason = " ".join(str(error).split())[:300]
        raise FactError(
            f"{source} is not a path here, and could not be loaded from the hub: {type(error).__name__}: {reason}"
        ) from error


def _parse_file(path: Path, columns: Mapping[str, str]) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise FactError(f"{path} is a folder. Give a file of facts in it.")
    if not path.exists():
        raise FactError(f"{path} does not exist. {_near_files(path)}")
    if not path.is_file():
        raise FactError(f"{path} is a pipe or a device. Write the facts to a regular file and give that.")
    if suffix not in SUFFIXES:
        hint = f" Save it as {SAVE_AS[suffix]}." if suffix in SAVE_AS else ""
        raise FactError(f"{path}: suffix '{path.suffix}' is unknown. Known are {', '.join(SUFFIXES)}.{hint}")
    if suffix == ".xlsx":
        return parse_xlsx(path)
    text, encoding = _decoded(path, suffix in TABLES)
    if not text.strip():
        raise FactError(f"{path} is empty.")
    if suffix in TABLES:
        table = parse_csv(text, str(path), columns.values(), "\t" if suffix == ".tsv" else ",")
        return replace(table, read_as=f"{table.read_as}; {encoding}")
    found = _parse_jsonl(text, str(path)) if suffix == ".jsonl" else _parse_json(text, str(path), columns)
    return replace(found, read_as="" if encoding == "UTF-8" else encoding)


def _near_files(path: Path) -> str:
    """Return a hint for a missing file: files with similar names in its folder."""
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either. Check the path."
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 3)
    return f"In the same folder: {some(near)}." if near else f"Give an existing file ({', '.join(SUFFIXES)})."


def _decoded(path: Path, is_table: bool) -> tuple[str, str]:
    """Return the text without its byte-order mark, and its encoding: the mark's, else UTF-8, else (tables) cp1252."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror}.") from error
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "UTF-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark or not is_table or _is_damaged_utf8(data):
            what = f"{encoding}, as its first bytes say, and broken at" if mark else f"not {encoding} at"
            raise FactError(f"{path} is {what} byte {len(mark) + error.start}. Save it as UTF-8.") from error
        try:
            text, encoding = data.decode("cp1252"), ASSUMED
        except UnicodeDecodeError as other:
            raise FactError(f"{path} is neither UTF-8 nor cp1252 at byte {other.start}. Save it as UTF-8.") from other
    if "\0" in re.split(r"[\r\n]", text[:200], maxsplit=1)[0]:
        raise FactError(f"{path} has NUL in its first line. Is it UTF-16 without a byte-order mark? Save it as UTF-8.")
    return text, encoding


def _is_damaged_utf8(data: bytes) -> bool:
    """Return True if some non-ASCII letters are valid UTF-8, so that reading them as cp1252 would garble them."""
    return any(letter > "\x7f" and letter != "\ufffd" for letter in set(data.decode("utf-8", "replace")))


def _parse_json(text: str, source: str, columns: Mapping[str, str]) -> Source:
    """Return the records: a list, the only list in an object, one record, or JSON lines with the wrong suffix."""
    lines = (line[0].rstrip() for line in _lines(text))
    first = next(lines, "")
    second = next(lines, "") if first[:1] == "{" and first[-1:] == "}" else ""
    if second and all(line[0] == "{" and line[-1] == "}" for line in chain([second], lines)):
        return _parse_jsonl(text, source)
    value = loads(text, source)
    if isinstance(value, list):
        return Source(value)
    if not isinstance(value, Mapping):
        raise FactError(f"{source} holds {kind(value)}. A list of records is expected.")
    if is_record(value, columns):
        return Source([value])
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1:
        return Source(lists[0])
    raise FactError(no_form(value, value, source) + "\nAn object around records must hold exactly one list.")


def _lines(text: str) -> Iterator[re.Match[str]]:
    """Yield each non-blank line, without leading white space, in linear time."""
    # splitlines would also split at U+2028 and similar characters, which may occur inside a JSON text.
    return re.finditer(r"[^\s][^\n]*", text)


def _parse_jsonl(text: str, source: str) -> Source:
    records, lines = [], []
    line, counted = 1, 0
    for found in _lines(text):
        line += text.count("\n", counted, found.start())
        counted = found.start()
        lines.append(line)
        records.append(loads(found[0], source, line))
    return Source(records, lines)
