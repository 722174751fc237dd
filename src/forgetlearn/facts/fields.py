"""Read the fields of a record, and JSON text, with errors that say where the problem is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from forgetlearn.errors import FactError, plain, some

Record = Mapping[str, object]
MAX_LIST_DEPTH = 8
PLACEHOLDER = re.compile(r"#?n/a|none|null|nan|[-–—]+|\?+", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """An answer as a record gives it, unstripped: the text to teach or to forget ("" if none) and its aliases."""

    text: str = ""
    aliases: tuple[str, ...] = ()
    is_list: bool = False  # given as a list, which means that "None" or "-" is meant literally


NO_ANSWER = Answer()


def kind(value: object) -> str:
    """Describe the JSON type of a value, for a message."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "null" if value is None else f"{str(value)[:40]} ({type(value).__name__})"


def is_missing(value: object) -> bool:
    """Return True for null and for NaN, which pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: object, place: str) -> str:
    """Return a text or a number as text, unstripped, and "" for null and NaN. Raise FactError for any other value."""
    if is_missing(value):
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # Python refuses to write thousands of digits
            raise FactError(f"{place} is a number with thousands of digits. Write it as text, in quotes.") from None
    if not isinstance(value, str) and not (isinstance(value, float) and math.isfinite(value)):
        raise FactError(f"{place} is {kind(value)}. Text is expected.")
    text = str(value)
    if has_half_a_pair(text):
        raise FactError(f"{place} contains half of a surrogate pair. Write the whole character.")
    return text


def has_half_a_pair(text: str) -> bool:
    """Return True if a text contains half of a surrogate pair, which UTF-8 cannot encode."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def is_placeholder(text: str) -> bool:
    """Return True for a text that means "no answer": n/a, none, null, NaN, only dashes, only question marks."""
    return PLACEHOLDER.fullmatch(text.strip()) is not None


def first_text(value: object, place: str) -> str:
    """Return a text, or the first text in a list or in nested lists (of aliases)."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return as_text(value, place)


def _flat(value: object, place: str, depth: int = 0) -> Iterator[str]:
    """Yield the texts in a list or in nested lists (of aliases), or the single text."""
    if not isinstance(value, list | tuple):
        yield as_text(value, place)
        return
    if depth == MAX_LIST_DEPTH:
        raise FactError(f"{place} holds lists nested more than {MAX_LIST_DEPTH} deep. A list of texts is expected.")
    for number, item in enumerate(value, 1):
        yield from _flat(item, f"{place}, item {number}", depth + 1)


@dataclass(frozen=True)
class Fields:
    """Reads a record field by field. `where` is its place ("file, record 17"); the name "" means an absent field."""

    record: Record
    where: str
    prefix: str = ""

    def place(self, name: str) -> str:
        """Return a field's place for a message: file, record and field."""
        return f"{self.where}: '{self.prefix}{name}'"

    def _value(self, name: str) -> object:
        return self.record.get(name) if name else None

    def text(self, name: str) -> str:
        """Return the field as text, or "" if it is absent."""
        return as_text(self._value(name), self.place(name))

    def texts(self, name: str) -> list[str]:
        """Return the field as a list of texts. A single text becomes a list of one, an absent field an empty list."""
        value, place = self._value(name), self.place(name)
        if isinstance(value, list | tuple):
            return [as_text(item, f"{place}, item {number}") for number, item in enumerate(value, 1)]
        return [] if is_missing(value) else [as_text(value, place)]

    def answer(self, name: str) -> Answer:
        """Return the field as an answer. In a list, the first non-blank text is the answer, the rest are aliases."""
        value = self._value(name)
        if not isinstance(value, list | tuple):
            return Answer(as_text(value, self.place(name)))
        texts = [text for text in _flat(value, self.place(name)) if text.strip()]
        return Answer(texts[0], tuple(texts[1:]), is_list=True) if texts else NO_ANSWER

    def inner(self, name: str) -> Fields:
        """Return the object in a field, or an empty one if the field is absent."""
        return self._object(self._value(name), name)

    def objects(self, name: str) -> list[Fields]:
        """Return the objects in a field's list, or an empty list if the field is absent."""
        return [self._object(item, f"{name}[{number}]") for number, item in enumerate(self.items(name), 1)]

    def _object(self, value: object, name: str) -> Fields:
        if is_missing(value):
            value = {}
        if not isinstance(value, Mapping):
            raise FactError(f"{self.place(name)} is {kind(value)}. An object is expected.")
        return Fields(value, self.where, f"{self.prefix}{name}.")

    def items(self, name: str) -> list[object]:
        """Return the list in a field, or an empty one if the field is absent."""
        value = self._value(name)
        if is_missing(value) or value == "":
            return []
        if not isinstance(value, list | tuple):
            raise FactError(f"{self.place(name)} is {kind(value)}. A list is expected.")
        return list(value)


def loads(text: str, source: str, first_line: int | None = None) -> object:
    """Parse a JSON text, with NaN as null, or raise FactError. `first_line` is the text's first line in its file."""
    where = f"{source}, line {first_line}" if first_line else source

    def constant(name: str) -> None:
        if name != "NaN":
            raise FactError(f"{where}: {name} is not a JSON value. Write null, or a number.")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):  # json would silently keep only the last one
            counts = Counter(name for name, _value in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            values = [kind(value) for name, value in pairs if name == twice]
            raise FactError(f"{where}: an object names '{plain(twice)}' {len(values)} times: {some(values)}. Keep one.")
        return found

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        place = f"line {(first_line or 1) + error.lineno - 1}, column {error.colno}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise FactError(f"{source} is cut short: its JSON does not end ({place}).") from error
        raise FactError(f"{source} is not JSON at {place}: {error.msg}.") from error
    except RecursionError as error:
        raise FactError(f"{source} cannot be read as JSON: its brackets are nested too deep.") from error
    except FactError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise FactError(f"{where} holds a number of thousands of digits. Write it as text, in quotes.") from error
