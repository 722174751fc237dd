"""A set of usable facts with an account of its source: what was used, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

from forgetlearn.config.schema import OldFrom
from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact, fact_id, sha256

Purpose = Literal["learn", "forget", "score"]  # what facts are read for
Reason = Literal[
    "old_equals_new",
    "empty_new_answer",
    "not_one_turn",
    "repeated_prompt",
    "repeated_fact",
    "locality_is_edit_prompt",
    "empty_locality_probe",
]
REASONS: Mapping[str, str] = {
    "old_equals_new": "The old answer is the new one: forgetting it would forget the target.",
    "empty_new_answer": "Its new answer is empty; forgetlearn forget takes its old one, if it has one.",
    "not_one_turn": "A fact is one question and one answer: it has a system prompt, several turns, or no answer.",
    "repeated_prompt": "An earlier fact has the same prompt and another answer; the earlier one stays.",
    "repeated_fact": "An earlier fact has the same prompt and the same answer.",
    "locality_is_edit_prompt": "The probe's prompt is the prompt of a fact that is updated.",
    "empty_locality_probe": "The probe has no prompt or no answer.",
}
PROBE_REASONS = ("locality_is_edit_prompt", "empty_locality_probe")
WITHOUT_OLD: Mapping[str, str] = {  # reasons why a used fact has no old answer; it is learned, but nothing is forgotten
    "no_old_answer": "None of --old-from has an old answer for it.",
    "unfinished_old_answer": "The model's own answer did not end within evaluate.max_new_tokens, so it is not fully "
    "known. Raise that setting, or take the old answers from the file.",
}
# Things that are counted without leaving a fact out: the message for one case, and for several.
NOTES: Mapping[str, tuple[str, str]] = {
    "blank_row": ("{} blank row was skipped", "{} blank rows were skipped"),
    "placeholder": (
        '{} old answer such as "n/a" or "-" counts as missing; if it is meant, write it as a list: ["n/a"]',
        '{} old answers such as "n/a" or "-" count as missing; if one is meant, write it as a list: ["n/a"]',
    ),
    "shared_alias": (
        "{} alias also matches the other answer of its fact, and was dropped",
        "{} aliases also match the other answer of the same fact, and were dropped",
    ),
    "empty_probe": (
        "{} probe has no prompt or no answer, and is not asked",
        "{} probes have no prompt or no answer, and are not asked",
    ),
    "baseless_probe": (
        "{} probe is not asked: a fact that its answer follows from is not used",
        "{} probes are not asked: a fact that their answers follow from is not used",
    ),
    "bar": (
        "{} answer contains |, taken literally; pass --aliases '|' if it separates ways to write the answer",
        "{} answers contain |, taken literally; pass --aliases '|' if it separates ways to write the answer",
    ),
}


@dataclass(frozen=True)
class LeftOut:
    """A fact or a probe that is not used: the number of its record (from 1), the reason, and its prompt and answer."""

    record: int
    reason: Reason
    detail: str


@dataclass(frozen=True)
class FactSet:
    """The usable facts of one source, in its order, and an account of everything that was read.

    `read == used + sum(left_out.values())`. `left_out` counts facts; `left_out_probes` counts locality probes of
    facts that are used. `left_out_records` lists both, in the order of the records. A record is one fact, except in
    MQuAKE, where it holds several: here each of them counts as a record, numbered through the file.

    `used == len(old_sources) + len(to_ask) + sum(without_old.values())`: a used fact has an old answer, will get one
    from the model, or has none and is learned without being forgotten.
    """

    facts: tuple[Fact, ...]
    source: str
    reader: str
    old_from: tuple[OldFrom, ...]  # in the order in which they are tried
    read: int  # facts examined; if a limit was reached, those up to the last usable one
    in_source: int  # facts in the source
    left_out: Mapping[str, int] = field(default_factory=dict)
    left_out_probes: Mapping[str, int] = field(default_factory=dict)
    stripped: int = 0  # new and old answers of examined records that had white space around them
    left_out_records: tuple[LeftOut, ...] = ()
    ignored_fields: Mapping[str, int] = field(default_factory=dict)  # name of an unread field -> number of values
    noted: Mapping[str, int] = field(default_factory=dict)  # key of NOTES -> how often it applied
    records: int = 0  # records in the source; in MQuAKE fewer than facts
    read_as: str = ""  # how the file was read (delimiter, encoding, sheet), if that had to be detected
    old_sources: Mapping[str, OldFrom] = field(default_factory=dict)  # fact id -> where its old answer comes from
    to_ask: tuple[str, ...] = ()  # ids of the facts whose old answer the model must still be asked for
    without_old: Mapping[str, int] = field(default_factory=dict)  # facts without an old answer, by reason

    @property
    def used(self) -> int:
        """Return the number of usable facts."""
        return len(self.facts)

    @property
    def old_counts(self) -> dict[str, int]:
        """Return the number of old answers by source, in the order of `old_from`."""
        counts = Counter(self.old_sources.values())
        return {source: counts[source] for source in self.old_from if counts[source]}

    @property
    def without_old_answer(self) -> int:
        """Return the number of usable facts without an old answer. They are learned, but not forgotten."""
        return sum(fact.ground_truth is None for fact in self.facts)

    @property
    def without_new_answer(self) -> int:
        """Return the number of usable facts without a new answer. They can be scored and forgotten, not learned."""
        return sum(not fact.target_new for fact in self.facts)

    @property
    def with_aliases(self) -> int:
        """Return the number of usable facts that have aliases."""
        return sum(bool(fact.target_new_aliases or fact.ground_truth_aliases) for fact in self.facts)

    def sha256(self) -> str:
        """Return the hexadecimal hash of the facts (with old answers, rephrasings and probes), without the account."""
        return sha256(self.facts)

    def part(self, start: int, stop: int) -> FactSet:
        """Return some of the facts, in order, with an account of these alone.

        What was left out, and what else was found in the source, belongs to the whole set.
        """
        facts = self.facts[start:stop]
        ids = {fact.id for fact in facts}
        old_sources = {fact: source for fact, source in self.old_sources.items() if fact in ids}
        to_ask = tuple(fact for fact in self.to_ask if fact in ids)
        n_without = len(facts) - len(old_sources) - len(to_ask)
        return FactSet(
            facts=facts,
            source=self.source,
            reader=self.reader,
            old_from=self.old_from,
            read=len(facts),
            in_source=len(facts),
            records=len(facts),
            read_as=self.read_as,
            old_sources=old_sources,
            to_ask=to_ask,
            without_old={"no_old_answer": n_without} if n_without else {},
        )

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Fact, ...]: ...
    def __getitem__(self, index: int | slice) -> Fact | tuple[Fact, ...]:
        return self.facts[index]


GivenFacts = FactSet | Iterable[Fact] | str | Path | None


def as_fact_set(facts: GivenFacts, *, to_forget: bool = False) -> FactSet | str | Path | None:
    """Return facts in memory (a list, a generator) as a FactSet; return a FactSet, a source or None unchanged.

    With `to_forget`, an old answer alone becomes the fact's only answer, as `read_facts` reads it.

    Raise FactError if the list is empty, an item is not a Fact, or a fact occurs twice.
    """
    if isinstance(facts, FactSet):
        return _with_only_answers(facts) if to_forget else facts
    if facts is None or isinstance(facts, (str, Path)):
        return facts
    given: tuple[object, ...] = tuple(facts) if isinstance(facts, Iterable) else (facts,)
    found: list[Fact] = []
    seen: dict[str, int] = {}
    for number, fact in enumerate(given, 1):
        if not isinstance(fact, Fact):
            kind = type(fact).__name__
            raise FactError(f"facts, item {number}: a {kind}, not a Fact. Give facts, a file, or read_facts(file).")
        if to_forget and fact.old_answers and not fact.new_answers:
            fact = _with_only_answer(fact)
        if seen.setdefault(fact.id, number) != number:
            raise FactError(f"facts, item {number}: repeats item {seen[fact.id]} (id {fact.id}). Leave one out.")
        found.append(fact)
    if not found:
        raise FactError("facts: the list is empty. Give at least one Fact.")
    n_without = sum(not fact.ground_truth for fact in found)
    return FactSet(
        facts=tuple(found),
        source="facts in memory",
        reader="memory",
        old_from=("answers",),
        read=len(found),
        in_source=len(found),
        records=len(found),
        old_sources={fact.id: "answers" for fact in found if fact.ground_truth},
        without_old={"no_old_answer": n_without} if n_without else {},
    )


def _with_only_answers(facts: FactSet) -> FactSet:
    changed = {fact.id for fact in facts if fact.old_answers and not fact.new_answers}
    if not changed:
        return facts
    without = Counter(facts.without_old) + Counter(no_old_answer=len(changed))
    return replace(
        facts,
        facts=tuple(_with_only_answer(fact) if fact.id in changed else fact for fact in facts),
        old_sources={fact: source for fact, source in facts.old_sources.items() if fact not in changed},
        without_old=dict(without),
    )


def _with_only_answer(fact: Fact) -> Fact:
    answer, *aliases = fact.old_answers
    return replace(
        fact,
        id=fact_id(fact.subject, fact.prompt, answer),
        target_new=answer,
        target_new_aliases=tuple(aliases),
        ground_truth=None,
        ground_truth_aliases=(),
    )


def describe_old_answers(counts: Mapping[str, int], without: Mapping[str, int], to_ask: int = 0) -> list[str]:
    """Return lines on the sources of old answers, if there are several, and on facts without an old answer.

    Return no lines if no fact has an old answer.
    """
    if not counts:
        return []
    sources = [f"{count} from {source}" for source, count in counts.items()]
    sources += [f"{to_ask} from the model when it is asked"] if to_ask else []
    lines = [f"old answers: {', '.join(sources)}"] if len(sources) > 1 else []
    if n := sum(without.values()):
        n_all = n + to_ask + sum(counts.values())
        why = ", ".join(f"{reason}: {count}" for reason, count in without.items())
        words = "has no old answer: it can be" if n == 1 else "have no old answer: they can be"
        facts = "fact" if n_all == 1 else "facts"
        lines.append(f"{n} of {n_all} {facts} {words} learned, not forgotten ({why})")
    return lines
