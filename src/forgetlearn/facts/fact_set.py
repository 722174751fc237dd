"""Facts: what one is, which answer is old and which is new, and what of a file can be used.

Everything that is read is used, or left out and counted by its reason, or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from forgetlearn.config.base import validate
from forgetlearn.config.schema import FactsSettings, OldFrom
from forgetlearn.errors import ConfigError, FactError, some
from forgetlearn.facts.files import Source, is_hub_id, load_hub, parse_file
from forgetlearn.facts.forms import is_placeholder, read_records
from forgetlearn.facts.readers import NOT_ONE_TURN, Draft, fact_id

OLD_EQUALS_NEW = "old_equals_new"
NO_OLD_ANSWER = "no_old_answer"
UNFINISHED_OLD_ANSWER = "unfinished_old_answer"
EMPTY_NEW_ANSWER = "empty_new_answer"
REPEATED_PROMPT = "repeated_prompt"
REPEATED_FACT = "repeated_fact"
LOCALITY_IS_EDIT_PROMPT = "locality_is_edit_prompt"
EMPTY_LOCALITY_PROBE = "empty_locality_probe"

REASONS: Mapping[str, str] = {
    OLD_EQUALS_NEW: "The old answer is the new one: forgetting it would forget the target.",
    EMPTY_NEW_ANSWER: "Its new answer is empty.",
    NOT_ONE_TURN: "A fact is one question and one answer: it has a system prompt, several turns, or no answer.",
    REPEATED_PROMPT: "An earlier fact has the same prompt and another new answer; the earlier one stays.",
    REPEATED_FACT: "An earlier fact has the same prompt and the same new answer.",
    LOCALITY_IS_EDIT_PROMPT: "The probe's prompt is the prompt of a fact that is updated.",
    EMPTY_LOCALITY_PROBE: "The probe has no prompt or no answer.",
}
PROBE_REASONS = (LOCALITY_IS_EDIT_PROMPT, EMPTY_LOCALITY_PROBE)
WITHOUT_OLD: Mapping[str, str] = {  # why a fact that is used has no old answer: it is learned without being forgotten
    NO_OLD_ANSWER: "None of --old-from has an old answer for it.",
    UNFINISHED_OLD_ANSWER: "The model's own answer did not end within evaluate.max_new_tokens, so it is not fully "
    "known. Raise that setting, or take the old answers from the file.",
}

BLANK_ROW = "blank_row"
PLACEHOLDER = "placeholder"
SHARED_ALIAS = "shared_alias"
BAR = "bar"
STRIPPED = "stripped"  # counted with the notes, and given as a field of its own

# What was done with facts that stay, or with what is no fact: how to say it of one, and of several.
NOTES: Mapping[str, tuple[str, str]] = {
    BLANK_ROW: ("{} blank row was skipped", "{} blank rows were skipped"),
    PLACEHOLDER: (
        '{} old answer such as "n/a" or "-" counts as missing; if it is meant, write it as a list: ["n/a"]',
        '{} old answers such as "n/a" or "-" count as missing; if one is meant, write it as a list: ["n/a"]',
    ),
    SHARED_ALIAS: (
        "{} alias also matches the other answer of its fact, and was dropped",
        "{} aliases also match the other answer of the same fact, and were dropped",
    ),
    BAR: (
        "{} answer contains |, taken literally; pass --aliases '|' if it separates ways to write the answer",
        "{} answers contain |, taken literally; pass --aliases '|' if it separates ways to write the answer",
    ),
}


@dataclass(frozen=True)
class Probe:
    """A locality probe: a question that the update should leave alone, and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """A prompt with its old and its new answer; all texts are stripped. `make_fact` gives the id."""

    id: str
    subject: str  # "" where unknown
    prompt: str
    ground_truth: str | None  # the OLD answer, None where unknown
    target_new: str  # the NEW answer
    rephrase_prompts: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    target_new_aliases: tuple[str, ...] = ()  # other ways to write the new answer: never trained on, counted as right
    ground_truth_aliases: tuple[str, ...] = ()

    @property
    def new_answers(self) -> tuple[str, ...]:
        """Return every text that counts as the new answer; the first is the one that is taught."""
        return (self.target_new, *self.target_new_aliases)

    @property
    def old_answers(self) -> tuple[str, ...]:
        """Return every text that counts as the old answer, the one to forget first; () if unknown."""
        return (self.ground_truth, *self.ground_truth_aliases) if self.ground_truth else ()


@dataclass(frozen=True)
class LeftOut:
    """A fact or a probe that is not used: number of its record from 1, reason, and which it was."""

    record: int
    reason: str
    detail: str


@dataclass(frozen=True)
class FactSet:
    """The usable facts of one source, in its order, and the account of all that was read.

    `read == used + sum(left_out.values())`. `left_out` counts facts, `left_out_probes` counts locality
    probes of facts that stay; `left_out_records` lists both, in the order of the records. A record is one
    fact, but in MQuAKE, where it has several: each counts as a record here, numbered through the file.

    `used == len(old_sources) + len(to_ask) + sum(without_old.values())`: a used fact has an old answer, waits for
    the model to be asked, or has none and is learned without being forgotten.
    """

    facts: tuple[Fact, ...]
    source: str
    reader: str
    old_from: tuple[OldFrom, ...]  # in the order in which they are looked at
    read: int  # facts examined: up to the last usable one where a limit was reached
    in_source: int  # facts that are there
    left_out: Mapping[str, int]
    left_out_probes: Mapping[str, int]
    stripped: int  # new and old answers of examined records that had outer white space
    left_out_records: tuple[LeftOut, ...]
    ignored_fields: Mapping[str, int] = field(default_factory=dict)  # fields that nothing reads: how many values
    noted: Mapping[str, int] = field(default_factory=dict)  # how often each of NOTES
    records: int = 0  # records that are there; in MQuAKE fewer than facts
    read_as: str = ""  # how the file was read (delimiter, encoding, sheet), where that had to be found out
    old_sources: Mapping[str, OldFrom] = field(default_factory=dict)  # fact id -> where its old answer comes from
    to_ask: tuple[str, ...] = ()  # ids of the facts whose old answer the model has still to be asked for
    without_old: Mapping[str, int] = field(default_factory=dict)  # facts without an old answer, by reason

    @property
    def used(self) -> int:
        """The number of usable facts."""
        return len(self.facts)

    @property
    def old_counts(self) -> dict[str, int]:
        """Return the number of old answers by source, in the order of `old_from`."""
        counts = Counter(self.old_sources.values())
        return {source: counts[source] for source in self.old_from if counts[source]}

    @property
    def without_old_answer(self) -> int:
        """Return the number of usable facts without an old answer: they are learned, but not forgotten."""
        return sum(fact.ground_truth is None for fact in self.facts)

    @property
    def with_aliases(self) -> int:
        """Return the number of usable facts that have aliases."""
        return sum(bool(fact.target_new_aliases or fact.ground_truth_aliases) for fact in self.facts)

    def sha256(self) -> str:
        """The hash of the facts alone (with old answers, rephrases, probes), in hexadecimal."""
        return sha256(self.facts)

    def __len__(self) -> int:
        """The number of usable facts."""
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        """The usable facts in the order of the source."""
        return iter(self.facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Fact, ...]: ...
    def __getitem__(self, index: int | slice) -> Fact | tuple[Fact, ...]:
        """One fact, or a tuple of them for a slice."""
        return self.facts[index]


GivenFacts = FactSet | Iterable[Fact] | str | Path | None


def sha256(facts: Iterable[Fact]) -> str:
    """Return the hash of facts, with old answers, rephrases and probes, in hexadecimal.

    Empty aliases are left out, so that facts without aliases keep the hash that earlier versions recorded.
    """
    return _sha256([_without_empty_aliases(asdict(fact)) for fact in facts])


def _without_empty_aliases(fact: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fact.items() if value or not name.endswith("_aliases")}


def make_fact(
    prompt: str,
    target_new: str,
    *,
    ground_truth: str | None = None,
    subject: str = "",
    rephrase_prompts: Iterable[str] = (),
    locality: Iterable[Probe] = (),
    target_new_aliases: Iterable[str] = (),
    ground_truth_aliases: Iterable[str] = (),
) -> Fact:
    """A fact with its id, from texts that are stripped already."""
    return Fact(
        id=fact_id(subject, prompt, target_new),
        subject=subject,
        prompt=prompt,
        ground_truth=ground_truth,
        target_new=target_new,
        rephrase_prompts=tuple(rephrase_prompts),
        locality=tuple(locality),
        target_new_aliases=tuple(target_new_aliases),
        ground_truth_aliases=tuple(ground_truth_aliases),
    )


def read_facts(
    source: str | Path,
    *,
    old_from: str | Sequence[str] = "answers",
    limit: int | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    aliases: str | None = None,
) -> FactSet:
    """Return the usable facts of a file (.json, .jsonl, .csv, .tsv, .xlsx) or of a data set on the hub.

    The hub's are named `owner/name:split`. `old_from` names where the old answer comes from, or several places in
    order ("answers,model"): each fact takes the first that has an answer for it. `limit` keeps the first so many
    usable facts. `strict` makes anything that is left out an error. `columns` says which field holds which of the own
    form (`{"prompt": "Question"}`), and `aliases` is what divides the ways to write an answer ("|").

    Raises:
        FactError: the source cannot be read or is of no known form, a record is wrong, the policy does
            not fit the form, or no fact is left.
    """
    name = str(source)
    try:
        found = load_hub(name) if is_hub_id(name) else parse_file(Path(source), columns)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise FactError(f"{name[:200]}: {error.strerror or error}. Give a file of facts that is there.") from None
    return _facts_of(found, name, old_from, limit, strict, columns, aliases)


def as_fact_set(facts: GivenFacts) -> FactSet | str | Path | None:
    """Return facts in memory (a list, a generator) as a FactSet; a FactSet, a source or None as it is.

    Raises:
        FactError: there are no facts, an item is not a Fact, or a fact occurs twice.
    """
    if facts is None or isinstance(facts, (FactSet, str, Path)):
        return facts
    given: tuple[Any, ...] = tuple(facts) if isinstance(facts, Iterable) else (facts,)
    seen: dict[str, int] = {}
    for number, fact in enumerate(given, 1):
        if not isinstance(fact, Fact):
            kind = type(fact).__name__
            raise FactError(f"facts, item {number}: a {kind}, not a Fact. Give facts, a file, or read_facts(file).")
        if seen.setdefault(fact.id, number) != number:
            raise FactError(f"facts, item {number}: repeats item {seen[fact.id]} (id {fact.id}). Leave one out.")
    if not given:
        raise FactError("facts: the list is empty. Give at least one Fact.")
    n_without = sum(not fact.ground_truth for fact in given)
    return FactSet(
        facts=given,
        source="facts in memory",
        reader="memory",
        old_from=("answers",),
        read=len(given),
        in_source=len(given),
        left_out={},
        left_out_probes={},
        stripped=0,
        left_out_records=(),
        records=len(given),
        old_sources={fact.id: "answers" for fact in given if fact.ground_truth},
        without_old={NO_OLD_ANSWER: n_without} if n_without else {},
    )


def from_records(
    records: Sequence[object],
    *,
    source: str = "records",
    old_from: str | Sequence[str] = "answers",
    limit: int | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    aliases: str | None = None,
) -> FactSet:
    """Return what `read_facts` does, for records that are in memory; `source` is their name in messages.

    Raises:
        FactError: as `read_facts`.
    """
    return _facts_of(Source(records), source, old_from, limit, strict, columns, aliases)


def _facts_of(
    found: Source,
    source: str,
    old_from: str | Sequence[str],
    limit: int | None,
    strict: bool,
    columns: Mapping[str, str] | None,
    aliases: str | None,
) -> FactSet:
    if limit is not None and limit < 1:
        raise FactError(f"limit = {limit}: must be at least 1, or left away for all facts.")
    policies = _policies(old_from)
    reading = read_records(found.records, source, columns, aliases)
    form = reading.form
    if policies == ("pred",) and form.name != "zsre":
        raise FactError(
            f"{source} is of the form {form.name}, which has no 'pred'. Only the form zsre has: "
            "take the old answers from 'answers' or from 'model'."
        )
    facts, numbers, left, noted = _sift(reading.drafts, policies, limit)
    facts, left_probes = _without_edit_prompts(facts, numbers, left)
    stripped = noted.pop(STRIPPED, 0)
    noted[BLANK_ROW] += found.blank_rows
    to_ask = tuple(fact.id for fact in facts if not fact.ground_truth) if "model" in policies else ()
    n_without = 0 if to_ask else sum(not fact.ground_truth for fact in facts)
    result = FactSet(
        facts=tuple(facts),
        source=source,
        reader=form.name,
        old_from=policies,
        read=len(facts) + _count_facts(left).total(),
        in_source=len(reading.drafts),
        left_out=dict(_count_facts(left)),  # asdict cannot copy a Counter
        left_out_probes=dict(_count_probes(left_probes)),
        stripped=stripped,
        left_out_records=_in_order(left_probes),
        ignored_fields=reading.ignored,
        noted={note: noted[note] for note in NOTES if noted[note]},
        records=reading.records,
        read_as=found.read_as,
        old_sources=_sources(facts, [reading.drafts[number - 1] for number in numbers], policies),
        to_ask=to_ask,
        without_old={NO_OLD_ANSWER: n_without} if n_without else {},
    )
    return _accepted(result, strict)


def with_old_answers(
    facts: FactSet, answers: Mapping[str, str], *, unfinished: Collection[str] = (), strict: bool = False
) -> FactSet:
    """Return the facts with the model's answers (fact id -> answer) as old answers of `facts.to_ask`: policy `model`.

    An answer that is empty or cut off at the token limit (its id is in `unfinished`) does not count: the fact stays
    without an old answer, counted in `without_old`. A fact is left out if the model already gives its new answer,
    compared as `generate` compares: "Paris." equals "Paris".

    Raises:
        FactError: a fact to ask has no entry in `answers`, or no fact is left, or one is left out under `strict`.
    """
    missing = [key for key in facts.to_ask if key not in answers]
    if missing:
        raise FactError(f"{facts.source}: no answer was given for {len(missing)} facts: {some(missing)}.")
    kept: list[Fact] = []
    gone: dict[int, LeftOut] = {}
    sources, without = dict(facts.old_sources), Counter(facts.without_old)
    asked = {key: answers[key].strip() for key in facts.to_ask}
    for number, fact in zip(_record_numbers(facts), facts, strict=True):
        said = asked.get(fact.id, "")
        reason = _why_not_said(fact, said, fact.id in unfinished) if fact.id in asked else ""
        if reason == OLD_EQUALS_NEW:
            gone[number] = LeftOut(number, reason, _detail(fact.prompt, said))
            continue
        if reason:
            without[reason] += 1
        elif fact.id in asked:
            sources[fact.id] = "model"
        kept.append(replace(fact, ground_truth=said) if sources.get(fact.id) == "model" else fact)
    # A probe is only counted for a fact that stays.
    left = [item for item in facts.left_out_records if item.record not in gone] + list(gone.values())
    result = replace(
        facts,
        facts=tuple(kept),
        left_out=dict(_count_facts(left)),  # asdict cannot copy a Counter
        left_out_probes=dict(_count_probes(left)),
        stripped=facts.stripped + sum(answers[key] != said for key, said in asked.items()),
        left_out_records=_in_order(left),
        old_sources=sources,
        to_ask=(),
        without_old=dict(without),
    )
    return _accepted(result, strict)


def tell_old(counts: Mapping[str, int], without: Mapping[str, int], to_ask: int = 0) -> list[str]:
    """Describe, in lines, the sources of old answers if there are several, and the facts without one.

    Return no lines if no fact has an old answer.
    """
    if not counts:
        return []
    told = [f"{count} from {source}" for source, count in counts.items()]
    told += [f"{to_ask} from the model when it is asked"] if to_ask else []
    lines = [f"old answers: {', '.join(told)}"] if len(told) > 1 else []
    if n := sum(without.values()):
        n_all = n + to_ask + sum(counts.values())
        why = ", ".join(f"{reason}: {count}" for reason, count in without.items())
        words = "has no old answer: it is" if n == 1 else "have no old answer: they are"
        facts = "fact" if n_all == 1 else "facts"
        lines.append(f"{n} of {n_all} {facts} {words} learned without being forgotten ({why})")
    return lines


def write_facts(facts: Iterable[Fact], path: Path) -> None:
    """Write the own form, one JSON object per line; `read_facts` gives equal facts back.

    That holds for facts as `read_facts` gives them: stripped and of distinct prompts.
    """
    lines = []
    for fact in facts:
        record = {name: value for name, value in asdict(fact).items() if value or name == "target_new"}
        for name in ("target_new", "ground_truth"):  # an answer with its aliases is a list
            aliases = record.pop(f"{name}_aliases", ())
            # A list is also how an old answer that looks like a placeholder is said to be meant.
            if aliases or (name == "ground_truth" and is_placeholder(record.get(name, ""))):
                record[name] = [record[name], *aliases]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def as_written(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of `write_facts` with each answer as its first text (or None) and a list of aliases."""
    answers: dict[str, Any] = {}
    for name in ("target_new", "ground_truth"):
        value = record.get(name)
        first, *others = value if isinstance(value, list) and value else [value]
        answers |= {name: first, f"{name}_aliases": others}
    return {**record, **answers}


# Which records can be used -----------------------------------------------------------------------


def _sift(
    drafts: Sequence[Draft], policies: Sequence[OldFrom], limit: int | None
) -> tuple[list[Fact], list[int], list[LeftOut], Counter[str]]:
    """Return the usable facts, the numbers of their records, what is left out, and the count of each of NOTES."""
    facts: list[Fact] = []
    numbers: list[int] = []
    left: list[LeftOut] = []
    earlier: dict[str, tuple[int, str]] = {}
    noted: Counter[str] = Counter()
    for number, draft in enumerate(drafts, 1):
        old, old_aliases, _policy = _old_answer(draft, policies)
        fact, n_shared = _fact(draft, old, old_aliases)
        noted[STRIPPED] += (draft.new != draft.new.strip()) + (old != old.strip())
        noted[PLACEHOLDER] += draft.placeholders
        noted[SHARED_ALIAS] += n_shared
        noted[BAR] += ("|" in draft.new) + ("|" in old)
        reason, detail = _why_not(fact, draft.why_not, earlier)
        if reason:
            left.append(LeftOut(number, reason, detail))
            continue
        earlier[fact.prompt] = (number, fact.target_new)
        facts.append(fact)
        numbers.append(number)
        left += _empty_probes(draft, number)
        if len(facts) == limit:
            break
    return facts, numbers, left, noted


def _policies(old_from: str | Sequence[str]) -> tuple[OldFrom, ...]:
    """Return the policies in order, validated like the setting `facts.old_from`."""
    try:
        return validate(FactsSettings, {"old_from": old_from}).old_from
    except ConfigError as error:
        raise FactError(str(error)) from None


def _old_answer(draft: Draft, policies: Sequence[OldFrom]) -> tuple[str, tuple[str, ...], OldFrom | None]:
    """Return the old answer by the first policy that has one, its aliases, and that policy; else ("", (), None).

    The policy `model` has none yet: the model is asked later.
    """
    given: Mapping[OldFrom, tuple[str, tuple[str, ...]]] = {
        "answers": (draft.old, draft.old_aliases),
        "pred": (draft.pred, ()),
    }
    for policy in policies:
        old, aliases = given.get(policy, ("", ()))
        if old.strip():
            return old, aliases, policy
    return "", (), None


def _sources(facts: Iterable[Fact], drafts: Iterable[Draft], policies: Sequence[OldFrom]) -> dict[str, OldFrom]:
    """Map fact ids to the policy that gave the old answer, for the facts that have one."""
    found = ((fact.id, _old_answer(draft, policies)[2]) for fact, draft in zip(facts, drafts, strict=True))
    return {key: policy for key, policy in found if policy}


def _fact(draft: Draft, old: str, aliases: Sequence[str]) -> tuple[Fact, int]:
    """Return the fact of a draft, and the number of aliases dropped because they also match the other answer."""
    prompt, new, old = draft.prompt.strip(), draft.new.strip(), old.strip()
    if not prompt and not draft.why_not:
        raise FactError(f"{draft.where} has no prompt. Give it one, or remove the record.")
    probes = (Probe(question.strip(), answer.strip()) for question, answer in draft.probes)
    new_aliases = _aliases(draft.new_aliases, new)
    old_aliases = _aliases(aliases, old) if old else []
    own_new = _unshared(new_aliases, [old] if old else [])
    own_old = _unshared(old_aliases, [new, *own_new])
    fact = make_fact(
        prompt,
        new,
        ground_truth=old or None,
        subject=draft.subject.strip(),
        rephrase_prompts=[text.strip() for text in draft.rephrases if text.strip()],
        locality=[probe for probe in probes if probe.prompt and probe.answer],
        target_new_aliases=own_new,
        ground_truth_aliases=own_old,
    )
    return fact, len(new_aliases) + len(old_aliases) - len(own_new) - len(own_old)


def _aliases(texts: Iterable[str], first: str) -> list[str]:
    """Return the other ways to write an answer, stripped, each once."""
    stripped = dict.fromkeys(text.strip() for text in texts)
    return [text for text in stripped if text and text != first]


def _unshared(aliases: list[str], others: list[str]) -> list[str]:
    """Return the aliases that match none of the other answers, compared as in scoring."""
    if not aliases or not others:
        return aliases
    from forgetlearn.facts.matching import same_text

    return [alias for alias in aliases if not any(same_text(alias, other) for other in others)]


def _why_not(fact: Fact, said: str, earlier: Mapping[str, tuple[int, str]]) -> tuple[str, str]:
    """Return why a fact is left out (its form may already say so), and a detail; "" and "" if it is usable."""
    if said:
        return said, _detail(fact.prompt, "")
    if not fact.target_new:
        return EMPTY_NEW_ANSWER, _detail(fact.prompt, "")
    if fact.ground_truth == fact.target_new:
        return OLD_EQUALS_NEW, _detail(fact.prompt, fact.target_new)
    if fact.prompt in earlier:
        number, new = earlier[fact.prompt]
        reason = REPEATED_FACT if new == fact.target_new else REPEATED_PROMPT
        return reason, f"{_detail(fact.prompt, fact.target_new)} (record {number}: {new})"
    return "", ""


def _why_not_said(fact: Fact, said: str, is_unfinished: bool) -> str:
    """Return why the model's reply is not used as a fact's old answer; "" if it is used."""
    from forgetlearn.facts.matching import matches

    if not said:
        return NO_OLD_ANSWER
    if is_unfinished:
        return UNFINISHED_OLD_ANSWER
    return OLD_EQUALS_NEW if matches(said, fact.new_answers) else ""


def _empty_probes(draft: Draft, number: int) -> Iterator[LeftOut]:
    """The probes with only one of prompt and answer; one with neither is an empty cell, not a probe."""
    for question, answer in draft.probes:
        if bool(question.strip()) != bool(answer.strip()):
            yield LeftOut(number, EMPTY_LOCALITY_PROBE, _detail(question.strip(), answer.strip()))


def _without_edit_prompts(
    facts: Sequence[Fact], numbers: Sequence[int], left: Sequence[LeftOut]
) -> tuple[list[Fact], list[LeftOut]]:
    """The facts without probes that ask an edit prompt, and `left` with those probes added."""
    prompts = {fact.prompt for fact in facts}
    kept, added = [], list(left)
    for number, fact in zip(numbers, facts, strict=True):
        asked = [probe for probe in fact.locality if probe.prompt in prompts]
        added += [LeftOut(number, LOCALITY_IS_EDIT_PROMPT, _detail(p.prompt, p.answer)) for p in asked]
        kept.append(replace(fact, locality=tuple(p for p in fact.locality if p.prompt not in prompts)))
    return kept, added


def _accepted(result: FactSet, strict: bool) -> FactSet:
    """The result, where it may stand.

    Raises:
        FactError: something is left out under `strict`, or everything is.
    """
    if strict and result.left_out_records:
        raise FactError(f"{result.source}: strict, and not everything can be used.\n{_account(result)}")
    if not result.facts:
        raise FactError(f"{result.source}: no fact is left of {result.read} records.\n{_account(result)}")
    return result


def _account(result: FactSet) -> str:
    """Counts by reason, each with the first records."""
    numbers: dict[str, list[int]] = {}
    for item in result.left_out_records:
        numbers.setdefault(item.reason, []).append(item.record)
    return "; ".join(f"{len(found)} {reason} (record {some(found)})" for reason, found in numbers.items())


# Small parts -------------------------------------------------------------------------------------


def _count_facts(left: Iterable[LeftOut]) -> Counter[str]:
    return Counter(item.reason for item in left if item.reason not in PROBE_REASONS)


def _count_probes(left: Iterable[LeftOut]) -> Counter[str]:
    return Counter(item.reason for item in left if item.reason in PROBE_REASONS)


def _in_order(left: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    return tuple(sorted(left, key=lambda item: item.record))


def _record_numbers(facts: FactSet) -> list[int]:
    """The numbers of the records of the usable facts: those examined and not left out."""
    gone = {item.record for item in facts.left_out_records if item.reason not in PROBE_REASONS}
    return [number for number in range(1, facts.read + 1) if number not in gone]


def _detail(prompt: str, answer: str) -> str:
    shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
    return f"{shown} -> {answer}" if answer else shown


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
