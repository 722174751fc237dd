"""Facts: what one is, which answer is old and which is new, and what of a file can be used.

Everything that is read is used, or left out and counted by its reason, or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

from forgetlearn.errors import FactError, some
from forgetlearn.readers import Draft, is_hub_id, load_hub, parse_file, read_records

OldFrom = Literal["answers", "pred", "model"]

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
    NO_OLD_ANSWER: "It has no old answer under the policy, and other records have one.",
    UNFINISHED_OLD_ANSWER: "The model's own answer did not end within evaluate.max_new_tokens, so what it holds is not "
    "known. Raise that, or take the old answers from the file.",
    EMPTY_NEW_ANSWER: "Its new answer is empty.",
    REPEATED_PROMPT: "An earlier fact has the same prompt and another new answer; the earlier one stays.",
    REPEATED_FACT: "An earlier fact has the same prompt and the same new answer.",
    LOCALITY_IS_EDIT_PROMPT: "The probe's prompt is the prompt of a fact that is updated.",
    EMPTY_LOCALITY_PROBE: "The probe has no prompt or no answer.",
}
PROBE_REASONS = (LOCALITY_IS_EDIT_PROMPT, EMPTY_LOCALITY_PROBE)


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
        """Every text that counts as the new answer, the one that is taught first."""
        return (self.target_new, *self.target_new_aliases)

    @property
    def old_answers(self) -> tuple[str, ...]:
        """Every text that counts as the old answer, the one that is forgotten first; none where it is unknown."""
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
    probes of facts that stay; `left_out_records` lists both, in the order of the records.
    """

    facts: tuple[Fact, ...]
    source: str
    reader: str
    old_from: OldFrom
    read: int  # records examined: up to the one that gave the last usable fact where a limit was reached
    in_source: int  # records that are there
    left_out: Mapping[str, int]
    left_out_probes: Mapping[str, int]
    stripped: int  # new and old answers of examined records that had outer white space
    left_out_records: tuple[LeftOut, ...]
    ignored_fields: tuple[str, ...] = ()  # fields of the records that nothing reads

    @property
    def used(self) -> int:
        """The number of usable facts."""
        return len(self.facts)

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
    """The hash of facts, with old answers, rephrases and probes, in hexadecimal."""
    return _sha256([asdict(fact) for fact in facts])


def fact_id(subject: str, prompt: str, target_new: str) -> str:
    """16 hexadecimal digits from the content; without the old answer, which the policy may change."""
    return _sha256({"subject": subject, "prompt": prompt, "target_new": target_new})[:16]


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
    source: str | Path, *, old_from: OldFrom = "answers", limit: int | None = None, strict: bool = False
) -> FactSet:
    """The usable facts of a file (.json, .jsonl, .csv) or of a data set on the hub (`owner/name:split`).

    `limit` keeps the first so many usable facts. `strict` makes anything that is left out an error.

    Raises:
        FactError: the source cannot be read or is of no known form, a record is wrong, the policy does
            not fit the form, or no fact is left.
    """
    name = str(source)
    try:
        records = load_hub(name) if is_hub_id(name) else parse_file(Path(source))
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise FactError(f"{name[:200]}: {error.strerror or error}. Give a file of facts that is there.") from None
    return from_records(records, source=name, old_from=old_from, limit=limit, strict=strict)


def as_fact_set(facts: GivenFacts) -> FactSet | str | Path | None:
    """Facts in memory, of a list or a generator say, as a set; a set, a source or None as it is.

    Raises:
        FactError: there is none, an item is no Fact, or one is there twice.
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
            raise FactError(f"facts, item {number}: is item {seen[fact.id]} again (id {fact.id}). Leave one out.")
    if not given:
        raise FactError("facts: none is there. Give at least one Fact.")
    return FactSet(given, "facts in memory", "memory", "answers", len(given), len(given), {}, {}, 0, ())


def from_records(
    records: Sequence[object],
    *,
    source: str = "records",
    old_from: OldFrom = "answers",
    limit: int | None = None,
    strict: bool = False,
) -> FactSet:
    """What `read_facts` gives, for records that are in memory; `source` is their name in messages.

    Raises:
        FactError: as `read_facts`.
    """
    if limit is not None and limit < 1:
        raise FactError(f"limit = {limit}: must be at least 1, or left away for all facts.")
    if old_from not in get_args(OldFrom):
        raise FactError(f"old_from = {old_from!r}: must be one of {', '.join(get_args(OldFrom))}.")
    form, checked, drafts = read_records(records, source)
    if old_from == "pred" and form.name != "zsre":
        raise FactError(
            f"{source} is of the form {form.name}, which has no 'pred'. Only the form zsre has: "
            "take the old answers from 'answers' or from 'model'."
        )
    facts, numbers, left, stripped = _sift(drafts, source, old_from, limit)
    facts, left_probes = _without_edit_prompts(facts, numbers, left)
    result = FactSet(
        facts=tuple(facts),
        source=source,
        reader=form.name,
        old_from=old_from,
        read=len(facts) + _count_facts(left).total(),
        in_source=len(records),
        left_out=dict(_count_facts(left)),  # asdict cannot copy a Counter
        left_out_probes=dict(_count_probes(left_probes)),
        stripped=stripped,
        left_out_records=_in_order(left_probes),
        ignored_fields=form.ignored(checked),
    )
    return _accepted(result, strict)


def with_old_answers(
    facts: FactSet, answers: Mapping[str, str], *, unfinished: Collection[str] = (), strict: bool = False
) -> FactSet:
    """The facts with the model's own answers (fact id -> answer) as old ones: the policy `model`.

    A fact is left out and counted where the answer is empty, was cut off at the token limit (`unfinished`
    has its id), or is the new answer already, compared as `generate` compares: "Paris." is "Paris".

    Raises:
        FactError: a fact has no entry in `answers`, or no fact is left, or one is left out under `strict`.
    """
    missing = [fact.id for fact in facts if fact.id not in answers]
    if missing:
        raise FactError(f"{facts.source}: no answer was given for {len(missing)} facts: {some(missing)}.")
    kept: list[Fact] = []
    gone: dict[int, LeftOut] = {}
    for number, fact in zip(_record_numbers(facts), facts, strict=True):
        old = answers[fact.id].strip()
        reason = _why_not_said(fact, old, fact.id in unfinished)
        if reason:
            gone[number] = LeftOut(number, reason, _detail(fact.prompt, old))
        else:
            kept.append(replace(fact, ground_truth=old))
    # A probe is only counted for a fact that stays.
    left = [item for item in facts.left_out_records if item.record not in gone] + list(gone.values())
    result = replace(
        facts,
        facts=tuple(kept),
        old_from="model",
        left_out=dict(_count_facts(left)),  # asdict cannot copy a Counter
        left_out_probes=dict(_count_probes(left)),
        stripped=facts.stripped + sum(answers[fact.id] != answers[fact.id].strip() for fact in facts),
        left_out_records=_in_order(left),
    )
    return _accepted(result, strict)


def write_facts(facts: Iterable[Fact], path: Path) -> None:
    """Write the own form, one JSON object per line; `read_facts` gives equal facts back.

    That holds for facts as `read_facts` gives them: stripped, of distinct prompts, with all old answers
    or with none.
    """
    lines = []
    for fact in facts:
        record = {name: value for name, value in asdict(fact).items() if value or name == "target_new"}
        for name in ("target_new", "ground_truth"):  # an answer with its aliases is a list
            if aliases := record.pop(f"{name}_aliases", None):
                record[name] = [record[name], *aliases]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


# Which records can be used -----------------------------------------------------------------------


def _sift(
    drafts: Sequence[Draft], source: str, old_from: OldFrom, limit: int | None
) -> tuple[list[Fact], list[int], list[LeftOut], int]:
    """Usable facts, the numbers of their records, what is left out, and how many answers were stripped."""
    olds = [_old_answer(draft, old_from) for draft in drafts]
    # A file without any old answer is one of new answers only; in another a missing one is a gap.
    # Asked of all records, so that `limit` does not change the answer.
    needs_old = old_from == "pred" or any(old.strip() for old in olds)
    facts: list[Fact] = []
    numbers: list[int] = []
    left: list[LeftOut] = []
    earlier: dict[str, tuple[int, str]] = {}
    stripped = 0
    for number, (draft, old) in enumerate(zip(drafts, olds, strict=True), 1):
        fact = _fact(draft, old, f"{source}, record {number}")
        stripped += (draft.new != draft.new.strip()) + (old != old.strip())
        reason, detail = _why_not(fact, needs_old, earlier)
        if reason:
            left.append(LeftOut(number, reason, detail))
            continue
        earlier[fact.prompt] = (number, fact.target_new)
        facts.append(fact)
        numbers.append(number)
        left += _empty_probes(draft, number)
        if len(facts) == limit:
            break
    return facts, numbers, left, stripped


def _old_answer(draft: Draft, old_from: OldFrom) -> str:
    return {"answers": draft.old, "pred": draft.pred, "model": ""}[old_from]


def _fact(draft: Draft, old: str, where: str) -> Fact:
    prompt = draft.prompt.strip()
    if not prompt:
        raise FactError(f"{where} has no prompt. Give it one, or remove the record.")
    probes = (Probe(question.strip(), answer.strip()) for question, answer in draft.probes)
    return make_fact(
        prompt,
        draft.new.strip(),
        ground_truth=old.strip() or None,
        subject=draft.subject.strip(),
        rephrase_prompts=[text.strip() for text in draft.rephrases if text.strip()],
        locality=[probe for probe in probes if probe.prompt and probe.answer],
        target_new_aliases=_aliases(draft.new_aliases, draft.new),
        ground_truth_aliases=_aliases(draft.old_aliases, old),
    )


def _aliases(texts: Iterable[str], first: str) -> list[str]:
    """Each other way to write an answer, stripped and once."""
    stripped = dict.fromkeys(text.strip() for text in texts)
    return [text for text in stripped if text and text != first.strip()]


def _why_not(fact: Fact, needs_old: bool, earlier: Mapping[str, tuple[int, str]]) -> tuple[str, str]:
    """The reason to leave a fact out and which it is; "" and "" for a fact that can be used."""
    if not fact.target_new:
        return EMPTY_NEW_ANSWER, _detail(fact.prompt, "")
    if fact.ground_truth is None and needs_old:
        return NO_OLD_ANSWER, _detail(fact.prompt, fact.target_new)
    if fact.ground_truth == fact.target_new:
        return OLD_EQUALS_NEW, _detail(fact.prompt, fact.target_new)
    if fact.prompt in earlier:
        number, new = earlier[fact.prompt]
        reason = REPEATED_FACT if new == fact.target_new else REPEATED_PROMPT
        return reason, f"{_detail(fact.prompt, fact.target_new)} (record {number}: {new})"
    return "", ""


def _why_not_said(fact: Fact, said: str, is_unfinished: bool) -> str:
    """The reason to leave a fact out for what the model said itself; "" where that is its old answer."""
    from forgetlearn.metrics import same_text  # here, because it brings numpy and scipy

    if not said:
        return NO_OLD_ANSWER
    if is_unfinished:
        return UNFINISHED_OLD_ANSWER
    return OLD_EQUALS_NEW if same_text(said, fact.target_new) else ""


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
        hint = f"\n{REASONS[UNFINISHED_OLD_ANSWER]}" if UNFINISHED_OLD_ANSWER in result.left_out else ""
        raise FactError(f"{result.source}: no fact is left of {result.read} records.\n{_account(result)}{hint}")
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
