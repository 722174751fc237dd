"""Select the usable facts of a source, and find their old answers.

Every record is used, is left out and counted by reason, or raises an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from forgetlearn.config.base import validate
from forgetlearn.config.schema import FactsSettings, OldFrom
from forgetlearn.errors import ConfigError, FactError, some
from forgetlearn.facts.fact import Fact, LocalityProbe, Probe, fact_id, make_fact
from forgetlearn.facts.fact_set import NOTES, PROBE_REASONS, FactSet, LeftOut, Purpose, Reason
from forgetlearn.facts.fields import NO_ANSWER, Answer, is_placeholder
from forgetlearn.facts.files import read_source
from forgetlearn.facts.forms import read_records
from forgetlearn.facts.matching import added_to, same_text, says, whole_sentences
from forgetlearn.facts.readers import Draft
from forgetlearn.facts.tables import Source


def read_facts(
    source: str | Path,
    *,
    old_from: str | Sequence[str] = "answers",
    limit: int | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    aliases: str | None = None,
    purpose: Purpose = "learn",
) -> FactSet:
    """Return the usable facts of a file (.json, .jsonl, .csv, .tsv, .xlsx) or of a data set on the hub.

    A data set on the hub is named `owner/name:split`. `old_from` names the source of old answers, or several in order
    ("answers,model"): each fact takes its old answer from the first source that has one. `limit` is the largest
    number of usable facts to return. With `strict`, it is an error if anything is left out. `columns` maps field
    names of the own form to names in the file (`{"prompt": "Question"}`), and `aliases` separates the ways to write
    an answer ("|"). Unless the `purpose` is to learn them, records may have an old answer alone; to forget them, it is
    read as a fact's only answer.

    Raises:
        FactError: the source cannot be read or is of no known form, a record is malformed, `old_from` does not fit the
            form, or no fact is left.
    """
    found = read_source(source, columns or {})
    return from_records(
        found,
        source=str(source),
        old_from=old_from,
        limit=limit,
        strict=strict,
        columns=columns,
        aliases=aliases,
        purpose=purpose,
    )


def from_records(
    records: Sequence[object] | Source,
    *,
    source: str = "records",
    old_from: str | Sequence[str] = "answers",
    limit: int | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    aliases: str | None = None,
    purpose: Purpose = "learn",
) -> FactSet:
    """Return the usable facts of records in memory, as `read_facts` does. `source` is their name in messages."""
    found = records if isinstance(records, Source) else Source(records)
    try:
        policies = validate(FactsSettings, {"old_from": old_from, "limit": limit}).old_from
    except ConfigError as error:
        raise FactError(str(error)) from None
    reading = read_records(found.records, source, columns or {}, found.lines, old_alone=purpose != "learn")
    if policies == ("pred",) and reading.form.name != "zsre":
        raise FactError(
            f"{source} is of the form {reading.form.name}, which has no 'pred'. Only the form zsre has: "
            "take the old answers from 'answers' or from 'model'."
        )
    drafts = reading.drafts
    if purpose == "forget":
        drafts = [_with_an_answer(draft, aliases) for draft in drafts]
    chosen = _choose(drafts, policies, limit, aliases)
    facts = tuple(chosen.facts.values())
    without = tuple(fact.id for fact in facts if not fact.ground_truth)
    waits = "model" in policies
    noted = chosen.noted + Counter({"blank_row": found.blank_rows})
    result = FactSet(
        facts=facts,
        source=source,
        reader=reading.form.name,
        old_from=policies,
        read=chosen.read,
        in_source=len(reading.drafts),
        stripped=chosen.stripped,
        ignored_fields=reading.ignored,
        noted={note: noted[note] for note in NOTES if noted[note]},
        records=len(found.records),
        read_as=found.read_as,
        old_sources=chosen.old_sources,
        to_ask=without if waits else (),
        without_old={"no_old_answer": len(without)} if without and not waits else {},
    )
    return _with_account(result, chosen.left, strict)


def with_old_answers(
    facts: FactSet,
    answers: Mapping[str, str],
    *,
    unfinished: Collection[str] = (),
    writes_on: bool = False,
    strict: bool = False,
    to_forget: bool = False,
) -> FactSet:
    """Return the facts; those in `facts.to_ask` get the model's answers (fact id -> answer) as old answers.

    Of an answer that was cut off at the token limit (its id is in `unfinished`) the whole sentences count, if it is a
    reply and has any. An answer of which nothing is left does not count: the fact stays without an old answer, and
    `without_old` counts it. A fact is left out if the model already says its new answer, judged as in the protocol
    `contains`; with `to_forget` it stays as it is, since its answer is then what is forgotten. `writes_on` is true if
    the model continues prompts as texts. What a sentence adds to the prompt ("Paris" of "The capital of France is
    Paris.") becomes an alias of the old answer, so that it is found in other words too.

    Raise FactError if `answers` lacks a fact to ask, if no fact is left, or if one is left out under `strict`.
    """
    missing = [key for key in facts.to_ask if key not in answers]
    if missing:
        raise FactError(f"{facts.source}: no answer was given for {len(missing)} facts: {some(missing)}.")
    kept: list[Fact] = []
    gone: dict[int, LeftOut] = {}
    sources, without = dict(facts.old_sources), Counter(facts.without_old)
    asked = {key: answers[key].strip() for key in facts.to_ask}
    unusable = {item.record for item in facts.left_out_records if item.reason not in PROBE_REASONS}
    numbers = (number for number in range(1, facts.read + 1) if number not in unusable)
    for number, fact in zip(numbers, facts, strict=True):
        reply = asked.get(fact.id)
        if reply is None:
            kept.append(fact)
            continue
        cut_off = fact.id in unfinished
        old = ("" if writes_on else whole_sentences(reply)) if cut_off else reply
        is_said = bool(old and says(reply, fact.new_answers, question=fact.prompt, at_start=writes_on))
        if is_said and not to_forget:
            gone[number] = LeftOut(number, "old_equals_new", _detail(fact.prompt, reply))
        elif not old and not fact.new_answers:
            gone[number] = LeftOut(number, "empty_new_answer", _detail(fact.prompt, reply))
        elif old and not is_said:
            sources[fact.id] = "model"
            short = added_to(fact.prompt, old)
            kept.append(replace(fact, ground_truth=old, ground_truth_aliases=(short,) if short else ()))
        else:
            without["unfinished_old_answer" if reply and not is_said else "no_old_answer"] += 1
            kept.append(fact)
    result = replace(
        facts,
        facts=tuple(kept),
        stripped=facts.stripped + sum(answers[key] != reply for key, reply in asked.items()),
        old_sources=sources,
        to_ask=(),
        without_old=dict(without),
    )
    # A probe is counted only if its fact stays.
    left = [item for item in facts.left_out_records if item.record not in gone]
    return _with_account(result, [*left, *gone.values()], strict)


# Drafts to facts ---------------------------------------------------------------------------------


@dataclass
class _Chosen:
    """The facts of the drafts read so far, by record number, and an account of the rest."""

    facts: dict[int, Fact] = field(default_factory=dict)
    read: int = 0
    old_sources: dict[str, OldFrom] = field(default_factory=dict)
    left: list[LeftOut] = field(default_factory=list)
    stripped: int = 0
    noted: Counter[str] = field(default_factory=Counter)


def _with_an_answer(draft: Draft, separator: str | None) -> Draft:
    """Return a draft that has an old answer and no other with the old as its only answer.

    A new answer that is the old one is no reason to leave the fact out: that answer is forgotten.
    """
    old, new = (_split(answer, separator).text.strip() for answer in (draft.old, draft.new))
    if not old or new not in ("", old) or (is_placeholder(old) and not draft.old.is_list):
        return draft
    aliases = (*draft.old.aliases, *draft.new.aliases)
    return replace(draft, new=replace(draft.old, aliases=aliases), old=NO_ANSWER, is_old_alone=False)


def _choose(drafts: Iterable[Draft], policies: Sequence[OldFrom], limit: int | None, separator: str | None) -> _Chosen:
    """Return the facts of all usable drafts.

    Leave out locality probes whose prompt is also the prompt of a fact, and probes that follow from facts left out.
    """
    chosen = _Chosen()
    earlier: dict[str, int] = {}
    cases: list[Draft] = []  # with probes that follow from several facts
    for number, draft in enumerate(drafts, 1):
        chosen.read = number
        cases += [draft] if draft.probes_need else []
        fact, policy = _fact(draft, policies, separator, chosen)
        first = earlier.get(fact.prompt, 0)
        if reason := _why_not(fact, draft, chosen.facts.get(first), waits="model" in policies):
            detail = _detail(fact.prompt, fact.target_new)
            if reason in ("repeated_fact", "repeated_prompt"):
                detail = f"{_detail(fact.prompt, _answer(fact))} (record {first}: {_answer(chosen.facts[first])})"
            chosen.left.append(LeftOut(number, reason, detail))
            continue
        earlier[fact.prompt] = number
        chosen.facts[number] = fact
        if policy:
            chosen.old_sources[fact.id] = policy
        for question, answer in draft.locality:
            if bool(question.strip()) != bool(answer.strip()):  # if both are empty, it is an empty cell, not a probe
                detail = _detail(question.strip(), answer.strip())
                chosen.left.append(LeftOut(number, "empty_locality_probe", detail))
        if len(chosen.facts) == limit:
            break
    for number, fact in chosen.facts.items():
        kept = tuple(probe for probe in fact.locality if probe.prompt not in earlier)
        edits = [probe for probe in fact.locality if probe.prompt in earlier]
        chosen.left += [LeftOut(number, "locality_is_edit_prompt", _detail(p.prompt, p.answer)) for p in edits]
        chosen.facts[number] = replace(fact, locality=kept) if edits else fact
    for case in cases:
        numbers = [earlier.get(prompt, 0) for prompt, _new in case.probes_need]
        facts = [chosen.facts.get(number) for number in numbers]
        probes = _usable(case.probes, chosen)
        if [(fact.prompt, fact.target_new) for fact in facts if fact] != list(case.probes_need):
            chosen.noted["baseless_probe"] += len(probes)
        elif last := facts[-1]:
            chosen.facts[numbers[-1]] = replace(last, probes=tuple(dict.fromkeys((*last.probes, *probes))))
    return chosen


def _why_not(fact: Fact, draft: Draft, earlier: Fact | None, *, waits: bool) -> Reason | None:
    """Return the reason to leave a fact out, None if it is usable.

    `earlier` is a usable fact with the same prompt; `waits` is true if the model is asked for missing old answers.
    """
    if not draft.is_one_turn:
        return "not_one_turn"
    if not fact.target_new and not (draft.is_old_alone and (fact.ground_truth or waits)):
        return "empty_new_answer"
    if fact.ground_truth == fact.target_new:
        return "old_equals_new"
    if earlier:
        return "repeated_fact" if _answer(earlier) == _answer(fact) else "repeated_prompt"
    return None


def _fact(
    draft: Draft, policies: Sequence[OldFrom], separator: str | None, chosen: _Chosen
) -> tuple[Fact, OldFrom | None]:
    """Return the fact of a draft, and the policy that gave its old answer; count in `chosen` what was changed."""
    prompt = draft.prompt.strip()
    if not prompt and draft.is_one_turn:
        raise FactError(f"{draft.where} has no prompt. Give it one, or remove the record.")
    new_answer = _split(draft.new, separator)
    given: dict[OldFrom, Answer] = {  # the model is asked later
        "answers": _split(draft.old, separator),
        "pred": replace(_split(Answer(draft.pred), separator), aliases=()),
    }
    for name, answer in given.items():
        if not answer.is_list and is_placeholder(answer.text):
            chosen.noted["placeholder"] += 1
            given[name] = Answer()
    policy = next((name for name in policies if name in given and given[name].text.strip()), None)
    old_answer = given[policy] if policy else Answer()
    new, old = new_answer.text.strip(), old_answer.text.strip()
    all_new, all_old = (_aliases(answer) for answer in (new_answer, old_answer))
    new_aliases = [alias for alias in all_new if not (old and same_text(alias, old))]
    old_aliases = [alias for alias in all_old if not any(same_text(alias, other) for other in (new, *new_aliases))]
    chosen.stripped += (new_answer.text != new) + (old_answer.text != old)
    chosen.noted["shared_alias"] += len(all_new) + len(all_old) - len(new_aliases) - len(old_aliases)
    chosen.noted["bar"] += ("|" in new) + ("|" in old)
    locality = (LocalityProbe(question.strip(), answer.strip()) for question, answer in draft.locality)
    fact = make_fact(
        prompt,
        new,
        ground_truth=old or None,
        subject=draft.subject.strip(),
        rephrase_prompts=[text.strip() for text in draft.rephrases if text.strip()],
        locality=[probe for probe in locality if probe.prompt and probe.answer],
        target_new_aliases=new_aliases,
        ground_truth_aliases=old_aliases,
    )
    probes = () if draft.probes_need else _usable(draft.probes, chosen)
    fact = replace(fact, where=draft.where, probes=probes)
    return (_of_old_alone(fact, given["answers"].text.strip()) if draft.is_old_alone else fact), policy


def _of_old_alone(fact: Fact, answer: str) -> Fact:
    """Return the fact of a record with an old answer alone, with the id that it has if it is read to be forgotten."""
    probes = tuple(probe.of_old_alone() for probe in fact.probes)
    return replace(fact, id=fact_id(fact.subject, fact.prompt, answer), probes=probes)


def _answer(fact: Fact) -> str:
    """Return the answer that tells a fact from others with the same prompt."""
    return fact.target_new or fact.ground_truth or ""


def _usable(probes: Iterable[Probe], chosen: _Chosen) -> tuple[Probe, ...]:
    """Return the probes that have a prompt and an answer, stripped; count in `chosen` those that have only one."""
    stripped = [_stripped(probe) for probe in probes]
    usable = tuple(probe for probe in stripped if probe.prompt and probe.answers)
    chosen.noted["empty_probe"] += sum(bool(probe.prompt or probe.answers) for probe in stripped) - len(usable)
    return usable


def _stripped(probe: Probe) -> Probe:
    """Return a probe with all texts stripped, and without empty and repeated ones."""

    def texts(given: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text.strip() for text in given if text.strip()))

    return replace(
        probe,
        prompt=probe.prompt.strip(),
        answers=texts(probe.answers),
        old_answers=texts(probe.old_answers),
        options=texts(probe.options),
    )


def _split(answer: Answer, separator: str | None) -> Answer:
    """Return an answer whose text is split at `separator` into text and aliases."""
    if not separator or separator not in answer.text:
        return answer
    parts = [part.strip() for part in answer.text.split(separator) if part.strip()]
    return replace(answer, text=parts[0] if parts else "", aliases=(*parts[1:], *answer.aliases))


def _aliases(answer: Answer) -> list[str]:
    """Return the aliases of an answer, stripped and without repetitions."""
    stripped = dict.fromkeys(text.strip() for text in answer.aliases)
    return [text for text in stripped if text and text != answer.text.strip()]


# The account -------------------------------------------------------------------------------------


def _with_account(result: FactSet, left: Sequence[LeftOut], strict: bool) -> FactSet:
    """Return the result with the account; raise FactError if no fact is left, or if any was left out under `strict`."""
    in_order = sorted(left, key=lambda item: item.record)
    numbers: dict[Reason, list[int]] = {}
    for item in in_order:
        numbers.setdefault(item.reason, []).append(item.record)
    account = "; ".join(f"{len(found)} {reason} (record {some(found)})" for reason, found in numbers.items())
    if strict and left:
        raise FactError(f"{result.source}: --strict was given, but some records cannot be used.\n{account}")
    if not result.facts:
        raise FactError(f"{result.source}: none of the {result.read} records can be used.\n{account}")
    return replace(
        result,
        left_out=dict(Counter(item.reason for item in left if item.reason not in PROBE_REASONS)),
        left_out_probes=dict(Counter(item.reason for item in left if item.reason in PROBE_REASONS)),
        left_out_records=tuple(in_order),
    )


def _detail(prompt: str, answer: str) -> str:
    shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
    return f"{shown} -> {answer}" if answer else shown
