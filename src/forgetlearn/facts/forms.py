"""Recognise the form of a source's records, and read them accordingly."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from forgetlearn.errors import FactError, some
from forgetlearn.facts.fields import Fields, Record, has_half_a_pair, is_missing, kind, loads
from forgetlearn.facts.names import NUMBERED, OWN, check_columns, check_columns_found, renamed
from forgetlearn.facts.readers import (
    HOPS,
    RIPPLE_LOCALITY,
    RIPPLE_PROBES,
    Draft,
    Flat,
    read_alpaca,
    read_completion,
    read_halluedit,
    read_knowedit,
    read_messages,
    read_mquake,
    read_nested,
    read_own,
    read_rippleedits,
)


class TableRow(dict[str, object]):
    """A record of a table. Its cells are text, and a text may be a JSON list."""


@dataclass(frozen=True)
class Form:
    """A file format of facts: how its records are recognised, which of their fields are used, and how they are read."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields], Draft | list[Draft]]
    also: tuple[str, ...] = ()
    fits_too: Callable[[Record], bool] = lambda _record: True
    marks: str = ""  # the fields that identify the form, if they are more than `needs`
    pattern: re.Pattern[str] = re.compile(r"(?!)")  # matches further names of fields that are used

    def fits(self, record: Record) -> bool:
        """Return True if a record has the fields of this form."""
        return all(name in record for name in self.needs) and self.fits_too(record)

    def reads(self, name: str) -> bool:
        """Return True if the form uses a field of this name."""
        return name in self.needs or name in self.also or self.pattern.fullmatch(name) is not None

    @property
    def shown(self) -> str:
        """Return the name and the fields that identify the form, for a message."""
        return f"{self.name} ({self.marks or ', '.join(self.needs)})"


def _flat(
    name: str,
    prompt: str,
    new: str,
    fits_too: Callable[[Record], bool] = lambda _record: True,
    marks: str = "",
    **names: str,
) -> Form:
    """Return a flat form, recognised by its prompt and new answer. `names` are further arguments of `Flat`."""
    return Form(name, (prompt, new), Flat(prompt, new, **names), tuple(names.values()), fits_too, marks)


def _fits_knowedit(record: Record) -> bool:
    if not (("prompt" in record or "text" in record) and ("target_new" in record or "labels" in record)):
        return False
    groups = isinstance(record.get("locality"), Mapping) or isinstance(record.get("portability"), Mapping)
    return groups or not ("prompt" in record and "target_new" in record)  # without groups, it is read as the own form


# The first form that fits is taken. Flat COUNTERFACT and KnowEdit come before the own form, whose names they share.
FORMS = (
    _flat(
        "zsre", "src", "alt",  # the new answer is `alt`, the old one `answers[0]`: EasyEdit's convention, not ROME's
        old="answers", pred="pred", subject="subject", rephrases="rephrase", probe="loc", probe_answer="loc_ans",
    ),
    Form(
        "mquake", ("requested_rewrite",), read_mquake,
        ("case_id", "single_hops", "new_single_hops", "questions", "answer", "answer_alias", "new_answer",
         "new_answer_alias"),
        fits_too=lambda record: isinstance(record["requested_rewrite"], list | tuple),
        marks="requested_rewrite as a list",
    ),
    Form(
        "counterfact-nested", ("requested_rewrite",), read_nested,
        ("case_id", "paraphrase_prompts", "neighborhood_prompts"),
    ),
    Form(
        "counterfact", ("case_id", "prompt", "target_new", "locality_prompt"), read_own, tuple(OWN), pattern=NUMBERED,
    ),
    Form(
        "knowedit", (), read_knowedit,
        ("prompt", "text", "target_new", "labels", "subject", "concept", "ground_truth", "rephrase_prompt", "rephrase",
         "locality", "portability"),
        fits_too=_fits_knowedit,
        marks="prompt or text, target_new or labels, and locality or portability by groups",
    ),
    Form("own", ("prompt", "target_new"), read_own, tuple(OWN), pattern=NUMBERED),
)  # fmt: skip
# Forms of records that fit none of the above. A record that fits two of these is an error.
OTHERS = (
    Form(
        "rippleedits", ("edit",), read_rippleedits, ("Subject_Aliasing", *RIPPLE_LOCALITY, *RIPPLE_PROBES),
        fits_too=lambda record: isinstance(record["edit"], Mapping) and "prompt" in record["edit"],
        marks="edit with a prompt",
    ),
    _flat(  # the data set has no old answers; its own pipeline writes ZsRE's names instead
        "wikibigedit", "update", "ans",
        subject="subject", rephrases="rephrase", probe="loc", probe_answer="loc_ans",
    ),
    _flat(
        "qaedit", "prompt", "target",
        fits_too=lambda record: "ground_truth" not in record and ("locality" in record or "rephrase" in record),
        marks="prompt, target, and rephrase or locality",
        subject="subject", rephrases="rephrase", probes="locality",
    ),
    Form(
        "halluedit", ("question", "object"), read_halluedit,
        ("subject", "paraphrased_question", "multiple_choice_with_letters", "yes_question", "no_question",
         "reversed_relation_question", *(f"{part}_{n}hop" for n in HOPS for part in ("question", "answer"))),
        fits_too=lambda record: any(name.startswith("output_") for name in record),
        marks="question, object, output_...",
        pattern=re.compile(r"output_.*", re.DOTALL),
    ),
    _flat("question-answer", "question", "answer", rephrases="paraphrased_question"),  # TOFU and others
    Form("messages", ("messages",), read_messages),
    Form("conversations", ("conversations",), read_messages),
    Form("alpaca", ("instruction", "output"), read_alpaca, ("input",)),
    Form("prompt-completion", ("prompt", "completion"), read_completion),
)  # fmt: skip
# What is only forgotten may have an old answer alone. An update refuses it: it would learn the old answer.
OLD_ALONE = Form("old-answer", ("prompt", "ground_truth"), read_own, tuple(OWN), pattern=NUMBERED)
KNOWN = frozenset(name for form in (*FORMS, *OTHERS) for name in (*form.needs, *form.also))
LISTS = ("rephrase_prompt", "locality", "probes")  # columns of tables where a cell that begins with [ is a list


def _names(record: Record, columns: Mapping[str, str], *, old_alone: bool = False) -> dict[str, str]:
    """Return the result of `renamed` for a record."""
    in_table = isinstance(record, TableRow)
    return renamed(tuple(record), KNOWN, tuple(columns.items()), in_table=in_table, old_alone=old_alone)


def _form_and_names(record: Record, columns: Mapping[str, str], old_alone: bool) -> tuple[Form | None, dict[str, str]]:
    """Return a record's form (None if none fits), and the names of its fields as mapped by `renamed`."""
    originals = _names(record, columns)
    read = {name: record[original] for name, original in originals.items()}
    for form in FORMS:
        if form.fits(read):
            return form, originals
    fitting = [form for form in OTHERS if form.fits(read)]
    if len(fitting) > 1:
        raise FactError(
            f"its fields are those of {' and of '.join(form.shown for form in fitting)}. Remove the fields of one "
            "form, or map the fields: --columns prompt=...,target_new=..."
        )
    if not fitting and old_alone:
        as_old = _names(record, columns, old_alone=True)
        if OLD_ALONE.fits(as_old):
            return OLD_ALONE, as_old
    return (fitting[0] if fitting else None), originals


def is_record(value: Record, columns: Mapping[str, str]) -> bool:
    """Return True if an object is a record of a known form, rather than an object around records."""
    try:
        return _form_and_names(value, columns, old_alone=True)[0] is not None
    except FactError:  # its fields contradict each other; reading the record reports that
        return True


def place(source: str, number: int, line: int | None) -> str:
    """Return a record's place for a message: its number (from 1), and its line in the file if that differs."""
    return f"{source}, record {number}" + (f" (line {line})" if line not in (None, number) else "")


@dataclass(frozen=True)
class Reading:
    """The content of a source: its form, a draft for each fact, and the fields that were not read."""

    form: Form
    drafts: list[Draft]
    ignored: Mapping[str, int]  # name of a field -> how many values it holds; each item of a list counts


def read_records(
    records: Sequence[object],
    source: str,
    columns: Mapping[str, str],
    lines: Sequence[int] = (),
    *,
    old_alone: bool = False,
) -> Reading:
    """Return the form that all records share, and the drafts of their facts.

    `columns` maps names of the own form to names in the file; `lines` are the records' lines in the file. With
    `old_alone`, records may have an old answer alone. Raise FactError if there are no records, or if a record is
    malformed, of no known form, or of another form than the first.
    """
    check_columns(columns)
    form: Form | None = None
    drafts: list[Draft] = []
    ignored: Counter[str] = Counter()
    names: set[str] = set()
    for number, record in enumerate(records, 1):
        where = place(source, number, lines[number - 1] if lines else None)
        if not isinstance(record, Mapping):
            raise FactError(f"{where} is {kind(record)}. Each record must be an object with named fields.")
        if bad := [name for name in record if not isinstance(name, str) or has_half_a_pair(name)]:
            raise FactError(f"{where}: a field is named {bad[0]!r}. A name is text, of whole characters.")
        if columns:
            names.update(record)
        found, originals = _recognised(record, source, where, columns, old_alone)
        form = form or found
        if found is not form and not (OLD_ALONE in (found, form) and found.read is form.read):
            raise FactError(
                f"{where} is of the form {found.shown}, record 1 of the form {form.shown}. Put them into two files."
            )
        read = {name: record[original] for name, original in originals.items()}
        if isinstance(record, TableRow):
            read = {name: cell(name, value, where) for name, value in read.items()}
        drafted = form.read(Fields(read, where))
        for draft in drafted if isinstance(drafted, list) else [drafted]:
            drafts.append(replace(draft, where=draft.where or where, is_old_alone=found is OLD_ALONE))
        for name, original in originals.items():
            if not form.reads(name):
                ignored[original] += _size(read[name])
    if form is None:
        raise FactError(f"{source} contains no records.")
    check_columns_found(columns, source, names)
    return Reading(form, drafts, {name: n for name, n in sorted(ignored.items()) if n})


def _recognised(
    record: Record, source: str, where: str, columns: Mapping[str, str], old_alone: bool
) -> tuple[Form, dict[str, str]]:
    """Return the result of `_form_and_names`. Raise FactError, with the record's place, unless one form fits."""
    try:
        form, originals = _form_and_names(record, columns, old_alone)
    except FactError as error:
        raise FactError(f"{where}: {error}") from None
    if form is None:
        check_columns_found(columns, source, record)
        raise FactError(no_form(originals, record, where))
    return form, originals


def cell(name: str, value: object, where: str) -> object:
    """Return the text of a cell, or the JSON list in it.

    In columns of rephrasings and probes, a cell that begins with `[` is a list. In other columns it is a list only if
    it can be read as a list of texts, because an answer may be `[redacted]`.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if name.startswith(LISTS):
        return loads(value, f"{where}: '{name}'")
    if name in OWN - {"target_new", "ground_truth"} or not value.rstrip().endswith("]"):
        return value
    try:
        found = loads(value, name)
    except FactError:
        return value
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) and found else value


def _size(value: object) -> int:
    """Return the number of values in an unread field: 0 if empty, the length of a list, else 1."""
    if is_missing(value) or value == "" or value == {}:
        return 0
    return len(value) if isinstance(value, list | tuple) else 1


# Common data sets that are not files of facts, or that need --columns.
LOOKS_LIKE = {
    ("chosen", "rejected"): "pairs of preference. {}\nIf the chosen text is the new answer and the rejected one "
    "the old: --columns prompt=prompt,target_new=chosen,ground_truth=rejected.",
    ("subject", "relation", "object"): "triples. {}\nA fact needs a prompt: add the field prompt, with the question or "
    "the beginning of the sentence.",
    ("question", "context", "answers"): "questions on a text, as in SQuAD. {}\nA fact is known without a text: "
    "give prompt and target_new.",
}


def _has_old_answer_alone(record: Record) -> bool:
    try:
        return OLD_ALONE.fits(_names(record, {}, old_alone=True))
    except FactError:  # two of its fields could be the same one
        return False


def no_form(read: Record, record: Record, where: str) -> str:
    """Return a message for a record of no known form: what it lacks for the nearest form, else a list of all forms.

    `read` holds the record's fields by the names under which they are read.
    """
    names = list(record)
    shown = f"{'Columns' if isinstance(record, TableRow) else 'Fields'} found: {some(names, 12) or 'none'}."
    to_forget = " To forget the old answer: forgetlearn forget." if _has_old_answer_alone(record) else ""
    for likeness, what in LOOKS_LIKE.items():
        if all(name in read for name in likeness):
            return f"{where} looks like {what.format(shown)}"
    for have, missing in (("target_new", "prompt"), ("prompt", "target_new")):
        if have in read and missing not in read:
            near = difflib.get_close_matches(missing, names, 1, 0.7)
            hint = f" Rename '{near[0]}'?" if near else f" Say which field it is: --columns {missing}=NAME."
            return f"{where} has no '{missing}'. {shown}{hint}{to_forget}"
    is_pair = len(names) == 2 and isinstance(record, TableRow) and not to_forget
    other = f'"{names[1][:40]}"' if is_pair else "..."
    example = f'--columns prompt="{names[0][:40] if names else "NAME"}",target_new={other}'
    if isinstance(record, TableRow):
        return (
            f"{where}: no column is named as the new answer. {shown}{to_forget}\n"
            "The first line names the columns: question, new answer and, if there are any, old answer and rephrasing. "
            f"For other names: {example}"
        )
    lacks = {form: [name for name in form.needs if name not in read] for form in (*FORMS, *OTHERS)}
    # The first field must be present: with only the second (`alt`, which is also German for old) the form is a guess.
    alike = [form for form in lacks if form.needs and form.needs[0] in read and 2 * len(lacks[form]) <= len(form.needs)]
    alike.sort(key=lambda form: len(lacks[form]) / len(form.needs))
    if alike:
        like = " or ".join(f"{form.shown}, without {some(lacks[form]) or 'the rest'}" for form in alike[:2])
        return f"{where} looks like {like}. {shown}\nComplete it, or say which field is which: {example}"
    forms = "; ".join(form.shown for form in (*FORMS, *OTHERS))
    return f"{where} is of no known form. {shown}\nSay which field is which: {example}\nKnown forms: {forms}."
