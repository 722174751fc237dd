"""Recognise the form of a source's records, and read them by it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from forgetlearn.errors import FactError, some
from forgetlearn.facts.fields import Fields, Record, has_half_a_pair, is_missing, kind, loads
from forgetlearn.facts.names import NUMBERED, OWN, Columns
from forgetlearn.facts.readers import (
    RIPPLE_PROBES,
    Draft,
    read_alpaca,
    read_completion,
    read_halluedit,
    read_knowedit,
    read_messages,
    read_mquake,
    read_nested,
    read_own,
    read_qaedit,
    read_question_answer,
    read_rippleedits,
    read_wikibigedit,
    read_zsre,
)


class TableRow(dict[str, object]):
    """A record of a table: its cells are text, and the text of a cell may be a JSON list."""


@dataclass(frozen=True)
class Form:
    """A file format of facts: how to recognise it, which fields are used, and its reader."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields], Draft | list[Draft]]
    also: tuple[str, ...] = ()
    fits_too: Callable[[Record], bool] = lambda _record: True
    marks: str = ""  # what it is recognised by, where that is more than `needs`
    pattern: re.Pattern[str] = re.compile(r"(?!)")  # names that are used too

    def fits(self, record: Record) -> bool:
        """Return True if a record has the fields of this form."""
        return all(name in record for name in self.needs) and self.fits_too(record)

    def reads(self, name: str) -> bool:
        """Return True if a field of this name is used."""
        return name in self.needs or name in self.also or self.pattern.fullmatch(name) is not None

    @property
    def shown(self) -> str:
        """Return the name and the fields that identify the form, for a message."""
        return f"{self.name} ({self.marks or ', '.join(self.needs)})"


def _fits_knowedit(record: Record) -> bool:
    if not (("prompt" in record or "text" in record) and ("target_new" in record or "labels" in record)):
        return False
    groups = isinstance(record.get("locality"), Mapping) or isinstance(record.get("portability"), Mapping)
    return groups or not ("prompt" in record and "target_new" in record)  # without groups the own names say the same


KNOWEDIT_USES = (
    "prompt", "text", "target_new", "labels", "subject", "concept", "ground_truth",
    "rephrase_prompt", "rephrase", "locality",
)  # fmt: skip

# In this order: the first that fits. Flat COUNTERFACT and KnowEdit also have the names of the own form.
FORMS = (
    Form("zsre", ("src", "alt"), read_zsre, ("subject", "answers", "pred", "rephrase", "loc", "loc_ans")),
    Form(
        "mquake",
        ("requested_rewrite",),
        read_mquake,
        ("case_id", "single_hops", "new_single_hops"),
        fits_too=lambda record: isinstance(record["requested_rewrite"], list | tuple),
        marks="requested_rewrite as a list",
    ),
    Form(
        "counterfact-nested",
        ("requested_rewrite",),
        read_nested,
        ("case_id", "paraphrase_prompts", "neighborhood_prompts"),
    ),
    Form(
        "counterfact",
        ("case_id", "prompt", "target_new", "locality_prompt"),
        read_own,
        tuple(OWN),
        pattern=NUMBERED,
    ),
    Form(
        "knowedit",
        (),
        read_knowedit,
        KNOWEDIT_USES,
        fits_too=_fits_knowedit,
        marks="prompt or text, target_new or labels, and locality or portability by groups",
    ),
    Form("own", ("prompt", "target_new"), read_own, tuple(OWN), pattern=NUMBERED),
)
# Of records without the names above. One that fits two of these is an error.
OTHERS = (
    Form(
        "rippleedits",
        ("edit",),
        read_rippleedits,
        ("Subject_Aliasing", *RIPPLE_PROBES),
        fits_too=lambda record: isinstance(edit := record["edit"], Mapping) and "prompt" in edit,
        marks="edit with a prompt",
    ),
    Form("wikibigedit", ("update", "ans"), read_wikibigedit, ("subject", "rephrase", "loc", "loc_ans")),
    Form(
        "qaedit",
        ("prompt", "target"),
        read_qaedit,
        ("subject", "rephrase", "locality"),
        fits_too=lambda record: "ground_truth" not in record and ("locality" in record or "rephrase" in record),
        marks="prompt, target, and rephrase or locality",
    ),
    Form(
        "halluedit",
        ("question", "object"),
        read_halluedit,
        ("subject", "paraphrased_question"),
        fits_too=lambda record: any(name.startswith("output_") for name in record),
        marks="question, object, output_...",
        pattern=re.compile(r"output_.*", re.DOTALL),
    ),
    Form("question-answer", ("question", "answer"), read_question_answer, ("paraphrased_question",)),
    Form("messages", ("messages",), read_messages),
    Form("conversations", ("conversations",), read_messages),
    Form("alpaca", ("instruction", "output"), read_alpaca, ("input",)),
    Form("prompt-completion", ("prompt", "completion"), read_completion),
)
KNOWN = frozenset(name for form in (*FORMS, *OTHERS) for name in (*form.needs, *form.also))
LISTS = ("rephrase_prompt", "locality")  # columns of tables in which a cell that begins with [ is a list
PLACEHOLDER = re.compile(r"#?n/a|none|null|nan|[-–—]+|\?+", re.IGNORECASE)


def form_of(record: Record) -> Form | None:
    """Return the form of a record, by its fields; None if no form fits.

    Raises:
        FactError: several fit, and none of them has the own names.
    """
    for form in FORMS:
        if form.fits(record):
            return form
    fitting = [form for form in OTHERS if form.fits(record)]
    if len(fitting) > 1:
        raise FactError(
            f"its fields are those of {' and of '.join(form.shown for form in fitting)}. Take the fields of one out, "
            "or say what is what: --columns prompt=...,target_new=..."
        )
    return fitting[0] if fitting else None


def is_record(value: Record, columns: Mapping[str, str]) -> bool:
    """Return True if an object is a record of a known form, not an object around records."""
    try:
        renamed = Columns(columns).renamed(tuple(value), KNOWN, "")
        return form_of({name: value[found] for name, found in renamed.items()}) is not None
    except FactError:  # an object of fields that contradict each other; reading it says so
        return True


@dataclass(frozen=True)
class Reading:
    """The content of a source: its form, a draft for each fact, and the fields that were not read."""

    form: Form
    drafts: list[Draft]
    records: int
    ignored: Mapping[str, int]  # name of a field -> how many values it holds; a list counts its items


def read_records(
    records: Sequence[object], source: str, columns: Mapping[str, str] | None = None, aliases: str | None = None
) -> Reading:
    """Return the form that all records share, and what each one says.

    `columns` gives names of the own form to fields of other names; `aliases` divides an answer's text.

    Raises:
        FactError: no record; one that is no object, of no known form or of another form than the
            first; a field of the wrong type, or named in `columns` and in no record.
    """
    asked = Columns(columns or {})
    form: Form | None = None
    drafts: list[Draft] = []
    ignored: Counter[str] = Counter()
    names: set[str] = set()
    for number, record in enumerate(records, 1):
        where = f"{source}, record {number}"
        if not isinstance(record, Mapping):
            raise FactError(f"{where} is {kind(record)}. Each record must be an object with named fields.")
        if bad := [name for name in record if not isinstance(name, str) or has_half_a_pair(name)]:
            raise FactError(f"{where}: a field is named {bad[0]!r}. A name is text, of whole characters.")
        if number == 1 or asked.named:
            names.update(record)
        renamed = asked.renamed(tuple(record), KNOWN, where)
        read = {name: record[found] for name, found in renamed.items()}
        found = _form_in(read, record, where, asked, source)
        form = form or found
        if found is not form:
            raise FactError(
                f"{where} is of the form {found.shown}, record 1 of the form {form.shown}. Put them into two files."
            )
        if isinstance(record, TableRow):
            read = {name: _cell(name, value, where) for name, value in read.items()}
        said = form.read(Fields(read, where))
        drafts += [_finished(one, where, aliases) for one in (said if isinstance(said, list) else [said])]
        for name, original in renamed.items():
            if not form.reads(name):
                ignored[original] += _size(read[name])
    if form is None:
        raise FactError(f"{source} holds no record.")
    asked.check(source, names)
    return Reading(form, drafts, len(records), {name: n for name, n in sorted(ignored.items()) if n})


def _form_in(read: Record, record: Record, where: str, asked: Columns, source: str) -> Form:
    try:
        found = form_of(read)
    except FactError as error:
        raise FactError(f"{where}: {error}") from None
    if found is None:
        asked.check(source, set(record))
        raise FactError(no_form(read, where))
    return found


def _finished(draft: Draft, where: str, separator: str | None) -> Draft:
    """Return the draft with its place, its answers split at `separator`, and placeholders removed."""
    n_placeholders = 0
    texts = {"new": draft.new, "old": draft.old, "pred": draft.pred}
    aliases = {"new": draft.new_aliases, "old": draft.old_aliases, "pred": ()}
    for name, text in texts.items():
        if separator and separator in text:
            parts = [part.strip() for part in text.split(separator) if part.strip()]
            texts[name] = parts[0] if parts else ""
            aliases[name] = (*parts[1:], *aliases[name])
        if name != "new" and not (name == "old" and draft.old_is_list) and is_placeholder(texts[name]):
            texts[name] = ""
            n_placeholders += 1
    return replace(
        draft,
        new=texts["new"],
        new_aliases=aliases["new"],
        old=texts["old"],
        old_aliases=aliases["old"],
        pred=texts["pred"],
        where=draft.where or where,
        placeholders=n_placeholders,
    )


def is_placeholder(text: str) -> bool:
    """Return True for text that stands for no answer: n/a, none, null, NaN, only dashes, only ?."""
    return PLACEHOLDER.fullmatch(text.strip()) is not None


def _cell(name: str, value: object, where: str) -> object:
    """Return the text of a cell, or the JSON list in it.

    In columns of rephrases and probes a cell that begins with `[` is a list. In others it is one only if
    it can be read as a list of texts: an answer may be `[redacted]`.
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


# What people also pass around and what is no file of facts, or not without a word about it.
LOOKS_LIKE = (
    (
        frozenset({"chosen", "rejected"}),
        "pairs of preference",
        "If the chosen text is the new answer and the rejected one the old: "
        "--columns prompt=prompt,target_new=chosen,ground_truth=rejected.",
    ),
    (
        frozenset({"subject", "relation", "object"}),
        "triples",
        "A fact needs a prompt: add the field prompt, with the question or the beginning of the sentence.",
    ),
    (
        frozenset({"question", "context", "answers"}),
        "questions on a text, as in SQuAD",
        "A fact is known without a text: give prompt and target_new.",
    ),
)


def no_form(record: Record, where: str) -> str:
    """Explain why a record has no known form: what the nearest form lacks, else a list of all forms."""
    names = sorted(record)
    shown = f"Fields found: {some(names, 12) or 'none'}."
    for likeness, what, do in LOOKS_LIKE:
        if likeness <= record.keys():
            return f"{where} looks like {what}. {shown}\n{do}"
    for have, missing in (("target_new", "prompt"), ("prompt", "target_new")):
        if have in record and missing not in record:
            near = difflib.get_close_matches(missing, names, 1, 0.7)
            hint = f" Rename '{near[0]}'?" if near else f" Say which field it is: --columns {missing}=NAME."
            return f"{where} has no '{missing}'. {shown}{hint}"
    example = f'--columns prompt="{names[0][:40] if names else "NAME"}",target_new=...'
    lacks = {form: [name for name in form.needs if name not in record] for form in (*FORMS, *OTHERS)}
    alike = [form for form, absent in lacks.items() if form.needs and 2 * len(absent) <= len(form.needs)]
    alike.sort(key=lambda form: len(lacks[form]) / len(form.needs))
    if alike:
        like = " or ".join(f"{form.shown}, without {some(lacks[form]) or 'the rest'}" for form in alike[:2])
        return f"{where} looks like {like}. {shown}\nComplete it, or say what is what: {example}"
    forms = "; ".join(form.shown for form in (*FORMS, *OTHERS))
    return f"{where} is of no known form. {shown}\nSay what is what: {example}\nKnown forms: {forms}."
