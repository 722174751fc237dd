"""From a file or a hub data set to drafts of facts: one reader per form that people pass around.

A reader only says which field is which. What is kept, stripped or left out is decided in facts.py.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from forgetlearn.errors import FactError, missing_extra, plain, some

Record = Mapping[str, object]

SUFFIXES = (".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Draft:
    """What one record says: texts as they stand in it, "" where it says nothing."""

    prompt: str
    new: str
    old: str
    subject: str = ""
    pred: str = ""  # ZsRE only: what the model of the original paper said
    new_aliases: tuple[str, ...] = ()  # other ways to write the new answer that count as right
    old_aliases: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    probes: tuple[tuple[str, str], ...] = ()


# Values with their place -------------------------------------------------------------------------


def kind(value: object) -> str:
    """The JSON kind of a value in words, for a message."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def as_text(value: object, place: str) -> str:
    """A text or a number as text, unstripped; None is "".

    Raises:
        FactError: anything else, or text that cannot be written as UTF-8.
    """
    if value is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or isinstance(value, str)):
        raise FactError(f"{place} is {kind(value)}. Text is expected.")
    text = str(value)
    if _has_half_a_pair(text):
        raise FactError(f"{place} holds half of a surrogate pair, which is no character. Write the whole character.")
    return text


def _has_half_a_pair(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def as_texts(value: object, place: str) -> list[str]:
    """A list of texts; one text is a list of one, None the empty list."""
    if isinstance(value, list | tuple):
        return [as_text(item, f"{place}, item {number}") for number, item in enumerate(value, 1)]
    return [] if value is None else [as_text(value, place)]


def first_text(value: object, place: str) -> str:
    """The text itself, or the first one of a list, or of a list of lists (of aliases)."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return as_text(value, place)


@dataclass(frozen=True)
class Fields:
    """One record read field by field, with errors that say where; `where` is "file, record 17"."""

    record: Record
    where: str
    prefix: str = ""

    def place(self, name: str) -> str:
        """File, record and field, for a message."""
        return f"{self.where}: '{self.prefix}{name}'"

    def text(self, name: str) -> str:
        """The field as text, "" where it is absent."""
        return as_text(self.record.get(name), self.place(name))

    def texts(self, name: str) -> list[str]:
        """The field as a list of texts, empty where it is absent."""
        return as_texts(self.record.get(name), self.place(name))

    def first(self, name: str) -> str:
        """The field's text, or the first one of its list."""
        return first_text(self.record.get(name), self.place(name))

    def inner(self, name: str) -> Fields:
        """The object in a field, empty where it is absent."""
        value = self.record.get(name)
        if not isinstance(value, Mapping | None):
            raise FactError(f"{self.place(name)} is {kind(value)}. An object is expected.")
        return Fields(value or {}, self.where, f"{self.prefix}{name}.")

    def items(self, name: str) -> list[object]:
        """The list in a field, empty where it is absent."""
        value = self.record.get(name)
        if value is None or value == "":
            return []
        if not isinstance(value, list | tuple):
            raise FactError(f"{self.place(name)} is {kind(value)}. A list is expected.")
        return list(value)


# One reader per form -----------------------------------------------------------------------------


def read_zsre(fields: Fields) -> Draft:
    """ZsRE: the new answer is `alt`, the old one `answers[0]` (EasyEdit's convention, not ROME's)."""
    return Draft(
        prompt=fields.text("src"),
        new=fields.text("alt"),
        old=fields.first("answers"),
        subject=fields.text("subject"),
        pred=fields.text("pred"),
        rephrases=tuple(fields.texts("rephrase")),
        probes=((fields.text("loc"), fields.text("loc_ans")),),
    )


def read_nested(fields: Fields) -> Draft:
    """COUNTERFACT as published: a neighbour's answer is the old answer."""
    rewrite = fields.inner("requested_rewrite")
    subject, template = rewrite.text("subject").strip(), rewrite.text("prompt")
    if template.strip() and "{}" not in template:
        raise FactError(f"{rewrite.place('prompt')} has no {{}} for the subject: {template[:60]!r}.")
    if not subject:
        raise FactError(f"{rewrite.place('subject')} is empty, and the prompt needs it.")
    old = rewrite.inner("target_true").text("str")
    return Draft(
        prompt=template.replace("{}", subject),
        new=rewrite.inner("target_new").text("str"),
        old=old,
        subject=subject,
        rephrases=tuple(fields.texts("paraphrase_prompts")),
        probes=tuple((prompt, old) for prompt in fields.texts("neighborhood_prompts")),
    )


def read_knowedit(fields: Fields) -> Draft:
    """KnowEdit: of several accepted answers the first one; locality probes of every group."""
    locality = fields.inner("locality")
    groups = [(locality, group, item) for group in locality.record for item in locality.items(group)]
    return Draft(
        prompt=fields.text("prompt") or fields.text("text"),
        new=fields.first("target_new") or fields.first("labels"),
        old=fields.first("ground_truth"),
        subject=fields.text("subject") or fields.text("concept"),
        rephrases=tuple(fields.texts("rephrase_prompt") or fields.texts("rephrase")),
        probes=tuple(_probe(item, owner.place(group)) for owner, group, item in groups),
    )


def read_own(fields: Fields) -> Draft:
    """The project's own names, of which flat COUNTERFACT uses a part; of several old answers the first one."""
    _check_spelling(fields)
    rephrases = [*fields.texts("rephrase_prompt"), *fields.texts("rephrase_prompts")]
    rephrases += [fields.text(f"rephrase_prompt_{n}") for n in _numbers(fields.record, "rephrase_prompt")]
    return Draft(
        prompt=fields.text("prompt"),
        new=fields.text("target_new"),
        old=fields.first("ground_truth"),
        subject=fields.text("subject"),
        rephrases=tuple(rephrases),
        probes=tuple(_own_probes(fields)),
    )


def _own_probes(fields: Fields) -> Iterator[tuple[str, str]]:
    prompts, answers = fields.texts("locality_prompt"), fields.texts("locality_ground_truth")
    if len(prompts) != len(answers) and any(prompts + answers):
        raise FactError(
            f"{fields.where}: {len(prompts)} in 'locality_prompt' and {len(answers)} in "
            "'locality_ground_truth'. Each probe needs its answer."
        )
    yield from zip(prompts, answers, strict=False)  # of unequal length only where all are empty
    numbers = {*_numbers(fields.record, "locality_prompt"), *_numbers(fields.record, "locality_ground_truth")}
    for n in sorted(numbers):
        yield fields.text(f"locality_prompt_{n}"), fields.text(f"locality_ground_truth_{n}")
    for item in fields.items("locality"):
        yield _probe(item, fields.place("locality"))


def _probe(item: object, place: str) -> tuple[str, str]:
    if isinstance(item, Mapping):
        answer = item.get("answer") if "answer" in item else item.get("ground_truth")
        return first_text(item.get("prompt"), f"{place}, prompt"), first_text(answer, f"{place}, answer")
    if isinstance(item, list | tuple) and len(item) == 2:
        return as_text(item[0], f"{place}, prompt"), as_text(item[1], f"{place}, answer")
    raise FactError(f"{place} holds {kind(item)}. Each probe is an object or a pair of prompt and answer.")


def _numbers(record: Record, base: str) -> list[int]:
    """The numbers n of the fields `base_n`, in their order."""
    found = (re.fullmatch(rf"{base}_([1-9][0-9]*)", name) for name in record)
    return sorted(int(match[1]) for match in found if match)


# Which form it is --------------------------------------------------------------------------------

OPTIONAL = (
    "ground_truth", "subject", "rephrase_prompt", "rephrase_prompts",
    "locality_prompt", "locality_ground_truth", "locality",
)  # fmt: skip
OWN = frozenset({"id", "case_id", "prompt", "target_new", *OPTIONAL})
NUMBERED = re.compile(r"(rephrase_prompt|locality_prompt|locality_ground_truth)_[1-9][0-9]*")
KNOWEDIT = frozenset(
    {"prompt", "text", "target_new", "labels", "subject", "concept", "ground_truth"}
    | {"rephrase_prompt", "rephrase", "locality"}
)


@dataclass(frozen=True)
class Form:
    """A way to write facts down: how it is recognised, what of it is used, and its reader."""

    name: str
    marks: str
    fits: Callable[[Record], bool]
    uses: frozenset[str]
    read: Callable[[Fields], Draft]

    def ignored(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Names of the fields that are there and that nothing reads."""
        unread = {name for record in records for name in record} - self.uses
        return tuple(sorted(name for name in unread if self.uses is not OWN or not NUMBERED.fullmatch(name)))


ZSRE = frozenset({"subject", "src", "alt", "answers", "pred", "rephrase", "loc", "loc_ans"})
NESTED = frozenset({"case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"})
GROUPS = "prompt or text, target_new or labels, and locality or portability by groups"


def _fits_zsre(record: Record) -> bool:
    return "src" in record and "alt" in record


def _fits_nested(record: Record) -> bool:
    return "requested_rewrite" in record


def _fits_counterfact(record: Record) -> bool:
    return "case_id" in record and "locality_prompt" in record and _fits_own(record)


def _fits_knowedit(record: Record) -> bool:
    if not (("prompt" in record or "text" in record) and ("target_new" in record or "labels" in record)):
        return False
    groups = isinstance(record.get("locality"), Mapping) or isinstance(record.get("portability"), Mapping)
    return groups or not _fits_own(record)  # without groups the own names say the same


def _fits_own(record: Record) -> bool:
    return "prompt" in record and "target_new" in record


# In this order: the first that fits. Flat COUNTERFACT and KnowEdit also have the names of the own form.
FORMS = (
    Form("zsre", "src, alt", _fits_zsre, ZSRE, read_zsre),
    Form("counterfact-nested", "requested_rewrite", _fits_nested, NESTED, read_nested),
    Form("counterfact", "case_id, prompt, target_new, locality_prompt", _fits_counterfact, OWN, read_own),
    Form("knowedit", GROUPS, _fits_knowedit, KNOWEDIT, read_knowedit),
    Form("own", "prompt, target_new", _fits_own, OWN, read_own),
)


def form_of(record: Record) -> Form | None:
    """The form of a record by its fields; None where no form fits."""
    return next((form for form in FORMS if form.fits(record)), None)


def read_records(records: Sequence[object], source: str) -> tuple[Form, list[Record], list[Draft]]:
    """The form that all records share, the records, and what each one says.

    Raises:
        FactError: no record; one that is no object, of no known form or of another form than the
            first; a field of the wrong type.
    """
    checked: list[Record] = []
    form: Form | None = None
    for number, record in enumerate(records, 1):
        where = f"{source}, record {number}"
        if not isinstance(record, Mapping):
            raise FactError(f"{where} is {kind(record)}. Each record must be an object with named fields.")
        if bad := [name for name in record if not isinstance(name, str) or _has_half_a_pair(name)]:
            raise FactError(f"{where}: a field is named {bad[0]!r}. A name is text, of whole characters.")
        found = form_of(record)
        if found is None:
            raise FactError(_no_form(record, where))
        form = form or found
        if found is not form:
            raise FactError(
                f"{where} is of the form {found.name} ({found.marks}), record 1 of the form {form.name} "
                f"({form.marks}). Put them into two files."
            )
        checked.append(record)
    if form is None:
        raise FactError(f"{source} holds no record.")
    read = form.read
    drafts = [read(Fields(record, f"{source}, record {n}")) for n, record in enumerate(checked, 1)]
    return form, checked, drafts


def _no_form(record: Record, where: str) -> str:
    """Why a record is of no known form: a missing field if one is enough, else all the forms."""
    names = sorted(record)
    for have, missing in (("target_new", "prompt"), ("prompt", "target_new")):
        if have in record and missing not in record:
            near = difflib.get_close_matches(missing, names, 1, 0.7)
            hint = f" Rename '{near[0]}'?" if near else ""
            return f"{where} has no '{missing}'. Fields found: {some(names, 12)}.{hint}"
    forms = "; ".join(f"{form.name} ({form.marks})" for form in FORMS)
    return f"{where} is of no known form.\nFields found: {some(names, 12) or 'none'}.\nKnown forms: {forms}."


@cache
def _nearest(name: str) -> str | None:
    """The optional field that a name is a misspelling of, if any."""
    return next(iter(difflib.get_close_matches(name, OPTIONAL, 1, 0.85)), None)


def _check_spelling(fields: Fields) -> None:
    """Raise where a field looks like a misspelt optional one: ignoring it would lose it in silence."""
    for name in sorted(fields.record.keys() - OWN):
        near = None if NUMBERED.fullmatch(name) else _nearest(name)
        if near is not None and near not in fields.record:
            raise FactError(f"{fields.where}: unknown field '{name}'. Did you mean '{near}'?")


# Files -------------------------------------------------------------------------------------------


def parse_file(path: Path) -> list[object]:
    """The records of a JSON, JSONL or CSV file, not yet checked.

    Raises:
        FactError: the file is missing, a folder, empty, not UTF-8, of another suffix or damaged.
    """
    parse = {".json": _parse_json, ".jsonl": _parse_jsonl, ".csv": _parse_csv}.get(path.suffix.lower())
    if path.is_dir():
        raise FactError(f"{path} is a folder. Give a file of facts in it.")
    if not path.exists():
        raise FactError(f"{path} does not exist. {_near_files(path)}")
    if not path.is_file():
        raise FactError(f"{path} is a pipe or a device. Write the facts to a file, and give that.")
    if parse is None:
        raise FactError(f"{path}: suffix '{path.suffix}' is unknown. Known are {', '.join(SUFFIXES)}.")
    text = _read_utf8(path)
    if not text.strip():
        raise FactError(f"{path} is empty.")
    return parse(text, str(path))


def _near_files(path: Path) -> str:
    """Where to look for a file that is not there."""
    if not path.parent.is_dir():
        return f"Nor does the folder {path.parent}. Check the path."
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 3)
    return f"In the same folder: {some(near)}." if near else f"Give an existing file ({', '.join(SUFFIXES)})."


def _read_utf8(path: Path) -> str:
    """The text without its byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror}.") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FactError(f"{path} is UTF-16, as its first two bytes say. Save it as UTF-8.")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error


def _loads(text: str, source: str, first_line: int | None = None) -> object:
    """What a JSON text says; errors count lines from `first_line`, where the text is a line of a file."""
    where = f"{source}, line {first_line}" if first_line else source

    def refuse(name: str) -> object:
        raise FactError(f"{where}: {name} is no JSON value. Write null, or a number.")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):  # the last one would count, and the others be lost in silence
            names = [name for name, _value in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            values = [kind(value) for name, value in pairs if name == twice]
            raise FactError(f"{where}: an object names '{plain(twice)}' {len(values)} times: {some(values)}. Keep one.")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        place = f"line {(first_line or 1) + error.lineno - 1}, column {error.colno}"
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise FactError(f"{source} is cut short: its JSON does not end ({place}).") from error
        raise FactError(f"{source} is not JSON at {place}: {error.msg}.") from error
    except RecursionError as error:
        raise FactError(f"{source} cannot be read as JSON: its brackets are nested too deep.") from error
    except ValueError as error:  # a number of thousands of digits
        if isinstance(error, FactError):
            raise
        raise FactError(f"{source} cannot be read as JSON: {error}.") from error


def _parse_json(text: str, source: str) -> list[object]:
    """A list; an object around one list; one record; or JSON lines under the wrong suffix."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.strip()[0] == "{" and line.strip()[-1] == "}" for line in lines):
        return _parse_jsonl(text, source)
    value = _loads(text, source)
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise FactError(f"{source} holds {kind(value)}. A list of records is expected.")
    if form_of(value):
        return [value]
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1:
        return lists[0]
    raise FactError(_no_form(value, source) + "\nAn object around records must hold exactly one list.")


def _parse_jsonl(text: str, source: str) -> list[object]:
    # Not splitlines: U+2028 and its kin may stand inside a JSON text.
    lines = enumerate(text.split("\n"), 1)
    return [_loads(line, source, number) for number, line in lines if line.strip()]


def _parse_csv(text: str, source: str) -> list[object]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[object] = []
    try:
        header = [name.strip() for name in next(rows)]
        if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
            raise FactError(
                f"{source}: its header is one cell, {header[0]!r}. Is the delimiter {other[0]!r}? Save it with commas."
            )
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise FactError(f"{source}: the header names {some(twice)} more than once.")
        for row in filter(None, rows):
            where = f"{source}, record {len(records) + 1}"
            if len(row) != len(header):
                raise FactError(f"{where} has {len(row)} cells, the header {len(header)}.")
            records.append({name: _cell(name, cell, where) for name, cell in zip(header, row, strict=True)})
    except csv.Error as error:
        hint = " Is a quote left open? JSON and JSONL have no limit." if "field limit" in str(error) else ""
        raise FactError(f"{source} is not CSV at line {rows.line_num}: {error}.{hint}") from error
    return records


def _cell(name: str, cell: str, where: str) -> object:
    """The text of a cell, or the JSON list that it holds where the column may hold one."""
    many = name.startswith(("rephrase_prompt", "locality"))
    return _loads(cell, f"{where}: '{name}'") if many and cell.lstrip().startswith("[") else cell


# The model hub -----------------------------------------------------------------------------------

HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>[\w.%:\[\]-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether a source is to be looked for on the hub: `owner/name` or `owner/name:split`, not a path."""
    return bool(HUB.fullmatch(source)) and not source.lower().endswith(SUFFIXES) and not Path(source).exists()


def load_hub(source: str) -> list[object]:
    """The records of a data set on the hub, of the split `train` if no other is named.

    Raises:
        FactError: the data set could not be loaded.
        MissingExtraError: `datasets` is not installed.
    """
    match = HUB.fullmatch(source)
    if match is None:
        raise FactError(f"{source} is no data set id. It is written owner/name or owner/name:split.")
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"{source}, a data set on the hub", "hub", error) from error
    try:
        return list(datasets.load_dataset(match["name"], split=match["split"] or "train"))
    except Exception as error:  # whatever the library raises, over the network and for any data set
        reason = " ".join(str(error).split())[:300]
        raise FactError(
            f"{source} is no path here and could not be loaded from the hub: {type(error).__name__}: {reason}"
        ) from error
