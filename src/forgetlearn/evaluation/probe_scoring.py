"""Judge a model's answers to probes: a row for each question, and a score for each kind of probe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.probes import COMPLETION, MADE, NO, QUESTION, YES, Asked, wanted
from forgetlearn.evaluation.scorer import Failure, Generated, Reading, Scorer
from forgetlearn.evaluation.scoring import add_room, room_for
from forgetlearn.evaluation.statistics import mean_with_interval
from forgetlearn.facts import Fact, matching
from forgetlearn.facts.sentences import is_unfinished
from forgetlearn.facts.wrong_answers import is_one
from forgetlearn.models.encoding import Encoder, Prompt, turns_of
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.storage.records import Mean, ProbeRow, ProbeScore, Row

FREE, ABSENT, CHOSEN, PREFERRED = "contains", "absent", "choice", "prefer"  # protocols


def score(lm: LanguageModel, asked: Sequence[Asked], settings: EvaluateSettings, phase: str) -> list[ProbeRow]:
    """Return a row for each question, and one for each fact and probe of yes and no, judged by `prefer`."""
    scorer = Scorer(lm, settings.model_copy(update={"protocols": ("prefer",)}), f"{phase}: probes")
    free = [each for each in asked if not each.options]
    replies: dict[Prompt, Generated | Failure] = {}
    for own in by_beginning(free):
        replies |= scorer.say((each.prompt for each in own), rooms(lm.encoder, own, settings))
    chosen = [each for each in asked if each.options]
    read = scorer.read((each.prompt, option) for each in chosen for option in each.options)
    rows = [_judge_reply(each, replies[each.prompt], phase) for each in free]
    for each in chosen:
        rows.append(_judge_choice(each, [read[each.prompt, option] for option in each.options], phase))
    return [*rows, *_preferred(chosen, read, phase)]


def of_rephrasings(facts: Iterable[Fact], rows: Iterable[Row], settings: EvaluateSettings) -> list[ProbeRow]:
    """Return rows of the rephrasings in another form than their fact's prompt: completions, or questions.

    They have been asked already: `rows` are the scores of a phase.
    """
    is_wanted = wanted(settings)
    said = {row.fact: row for row in rows if row.protocol == "generate"}
    found: list[ProbeRow] = []
    for fact in facts:
        probe = QUESTION if is_unfinished(fact.prompt) else COMPLETION
        row = said.get(fact.id)
        if row is None or not is_wanted(probe):
            continue
        for prompt, text in zip(fact.rephrase_prompts, row.said_rephrased, strict=True):
            if is_unfinished(prompt) != is_unfinished(fact.prompt):
                asked = Asked(fact.id, probe, prompt, fact.new_answers, fact.old_answers)
                reply = Failure("not answered") if text is None else Generated(text, False, row.writes_on)
                found.append(_judge_reply(asked, reply, row.phase))
    return found


def by_beginning(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Return the questions of probes that share a beginning apart, so that it is computed once for each batch."""
    groups: dict[str, list[Asked]] = {}
    for each in asked:
        groups.setdefault(each.probe if each.probe in MADE else "", []).append(each)
    return list(groups.values())


def rooms(encoder: Encoder, asked: Sequence[Asked], settings: EvaluateSettings) -> dict[Prompt, Room]:
    """Return a room for each prompt with an answer that may exceed one line or `max_new_tokens`."""
    found: dict[Prompt, Room] = {}
    for each in asked:
        room = room_for(encoder, each.prompt, (*each.answers, *each.old_answers), settings)
        add_room(found, each.prompt, room, settings)
    return found


def _judge_reply(asked: Asked, reply: Generated | Failure, phase: str) -> ProbeRow:
    protocol = ABSENT if asked.is_elsewhere else FREE
    if isinstance(reply, Failure):
        return _row(asked, phase, protocol, error=reply.reason)

    def says(own: tuple[str, ...], others: tuple[str, ...]) -> float:
        question = turns_of(asked.prompt)[-1]
        return matching.says(reply.text, own, others, question=question, at_start=reply.writes_on)

    if protocol == ABSENT:
        return _row(asked, phase, ABSENT, said=reply.text, score=1.0 - says(asked.answers, ()))
    new = says(asked.answers, asked.old_answers) if asked.answers else None
    old = says(asked.old_answers, asked.answers) if asked.old_answers else None
    return _row(asked, phase, FREE, said=reply.text, score=new, old=old)


def _judge_choice(asked: Asked, readings: Sequence[Reading | Failure], phase: str) -> ProbeRow:
    failed = next((each.reason for each in readings if isinstance(each, Failure)), None)
    if failed is not None:
        return _row(asked, phase, CHOSEN, error=failed)
    place = max(range(len(readings)), key=lambda number: _logprob(readings[number]))
    option = asked.options[place]
    said = f"{option}. {asked.shown[place]}" if asked.shown else option
    new, old = (float(is_one(option, own)) if own else None for own in (asked.answers, asked.old_answers))
    return _row(asked, phase, CHOSEN, said=said, score=new, old=old)


def _preferred(
    asked: Iterable[Asked], read: Mapping[tuple[Prompt, str], Reading | Failure], phase: str
) -> Iterator[ProbeRow]:
    """Yield whether a model says yes rather where yes is right than where no is: this ignores a leaning to one of them.

    A fact's score is the share of pairs of such questions.
    """
    pairs: dict[tuple[str, str], list[Asked]] = {}
    for each in asked:
        if each.options == (YES, NO) and each.answers:
            pairs.setdefault((each.fact, each.probe), []).append(each)
    for own in pairs.values():
        leanings: dict[bool, list[float]] = {True: [], False: []}  # to yes; by whether yes is right
        for each in own:
            yes, no = (read[each.prompt, option] for option in (YES, NO))
            if isinstance(yes, Reading) and isinstance(no, Reading):
                leanings[is_one(YES, each.answers)].append(_logprob(yes) - _logprob(no))
        both = list(product(leanings[True], leanings[False]))
        if both:
            share = sum(right > wrong for right, wrong in both) / len(both)
            yield _row(replace(own[0], prompt=""), phase, PREFERRED, score=share)


def _logprob(reading: Reading | Failure) -> float:
    assert isinstance(reading, Reading), "failures are told apart first"
    assert reading.logprob is not None, "read with `prefer`"
    return reading.logprob


def _row(asked: Asked, phase: str, protocol: str, **found: object) -> ProbeRow:
    prompt = asked.prompt if isinstance(asked.prompt, str) else list(asked.prompt)
    right = {"answers": list(asked.answers)}
    named = {"fact": asked.fact, "phase": phase, "probe": asked.probe, "protocol": protocol, "prompt": prompt}
    return ProbeRow.model_validate({**named, **right, **found})


def summarise(rows: Iterable[ProbeRow], n_facts: int) -> list[ProbeScore]:
    """Return a score for each probe and protocol: means over facts, each fact's score being the mean over its rows.

    `n_facts` are all facts that are scored; those that a probe does not ask about are counted.
    """
    groups: dict[tuple[str, str], dict[str, list[ProbeRow]]] = {}
    for row in rows:
        groups.setdefault((row.probe, row.protocol), {}).setdefault(row.fact, []).append(row)
    return [
        ProbeScore(probe=probe, protocol=protocol, new=_mean(facts, n_facts, "score"), old=_mean(facts, n_facts, "old"))
        for (probe, protocol), facts in groups.items()
    ]


def _mean(facts: Mapping[str, Sequence[ProbeRow]], n_facts: int, name: str) -> Mean:
    scores, errored = [], 0
    for own in facts.values():
        values = [value for row in own if (value := getattr(row, name)) is not None]
        if any(row.error for row in own):
            errored += 1
        elif values:
            scores.append(sum(values) / len(values))
    return mean_with_interval(scores, errored=errored, not_asked=n_facts - errored - len(scores))
