"""Score what a model knows of facts: a row per fact and protocol, and a summary of rows whose counts add up.

The model reads each distinct (prompt, answer) once, in rows of texts that share their beginnings, and answers each
distinct prompt once, in batches sorted by length. Rows are computed from these readings and answers alone. A protocol
is an entry of PROTOCOLS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.scorer import Failure, Generated, Pair, Reading, Scorer
from forgetlearn.evaluation.statistics import mean_with_interval
from forgetlearn.facts import Fact, matching
from forgetlearn.models.encoding import Encoded, Encoder, P, Prompt
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.storage.records import Phase, Row

QUANTITIES = ("reliability", "generality", "residue")
MARGIN_TOKENS = 8  # beyond an answer's own tokens: for its end token, and in case a model splits it into more tokens


def score(
    lm: LanguageModel,
    facts: Iterable[Fact],
    *,
    phase: str,
    settings: EvaluateSettings | None = None,
    reference: Mapping[str, list[list[int]]] | None = None,
) -> list[Row]:
    """Return one row per fact and protocol, with the model's scores in this phase.

    `reference` holds, per fact, the ids that the base predicts at the answer of each locality probe
    (`locality_predictions` of its rows). Without it, the model is its own reference.
    """
    settings = settings or EvaluateSettings()
    facts = list(facts)
    scorer = Scorer(lm, settings, phase)
    read = scorer.read(pair for fact in facts for pair in pairs_to_read(fact))
    replies: dict[str, Generated | Failure] = {}
    if "generate" in settings.protocols:
        rooms = answer_rooms(lm.encoder, facts, settings)
        replies = scorer.say((prompt for fact in facts for prompt in fact.prompts), rooms)
    protocols = {*settings.protocols, *(["contains"] if "generate" in settings.protocols else [])}
    rows: list[Row] = []
    for fact in facts:
        questions = _questions(fact)
        for protocol in (name for name in PROTOCOLS if name in protocols):
            scores = {
                name: [_judge(protocol, asked, read, replies) for asked in own] for name, own in questions.items()
            }
            texts = _texts([replies[prompt] for prompt in fact.prompts]) if protocol == "generate" else {}
            rows.append(_row(fact, phase, protocol, scores, **texts))
        rows += _locality_rows(fact, phase, read, (reference or {}).get(fact.id))
    return rows


def ask(lm: LanguageModel, facts: Iterable[Fact], settings: EvaluateSettings) -> list[Row]:
    """Return the model's free answer to each fact's prompt, as rows for `known_facts`."""
    facts = list(facts)
    rooms = answer_rooms(lm.encoder, facts, settings)
    replies = Scorer(lm, settings, "probe").say((fact.prompt for fact in facts), rooms)
    rows = []
    for fact in facts:
        reply = replies[fact.prompt]
        answer = _texts([reply])
        rows.append(
            Row.model_validate({"fact": fact.id, "phase": "probe", "protocol": "generate", "errors": {}, **answer})
        )
    return rows


def answer_rooms(encoder: Encoder, facts: Iterable[Fact], settings: EvaluateSettings) -> dict[str, Room]:
    """Return a room for each prompt with an answer that may exceed one line or `max_new_tokens`."""
    rooms: dict[str, Room] = {}
    for fact in facts:
        room = room_for(encoder, fact.prompt, (*fact.new_answers, *fact.old_answers), settings)
        for prompt in fact.prompts:
            add_room(rooms, prompt, room, settings)
    return rooms


def room_for(encoder: Encoder, prompt: Prompt, answers: Sequence[str], settings: EvaluateSettings) -> Room:
    """Return a room for any of the answers to a prompt, and at least for `max_new_tokens`."""
    lines = max(map(matching.lines_of, answers), default=1)
    # An answer has at most as many tokens as bytes, so most answers need not be tokenised here.
    long = [answer for answer in answers if len(answer.encode()) + MARGIN_TOKENS > settings.max_new_tokens]
    found = encoder.encode_all((prompt, answer) for answer in long) if long else {}
    lengths = [len(text.answer_ids) + MARGIN_TOKENS for text in found.values() if isinstance(text, Encoded)]
    return Room(max([settings.max_new_tokens, *lengths]), lines)


def add_room(rooms: dict[P, Room], prompt: P, room: Room, settings: EvaluateSettings) -> None:
    """Widen a prompt's room, unless it is the usual one anyway."""
    if room != Room(settings.max_new_tokens):
        other = rooms.get(prompt, room)
        rooms[prompt] = Room(max(room.tokens, other.tokens), max(room.lines, other.lines))


def locality_predictions(rows: Iterable[Row]) -> dict[str, list[list[int]]]:
    """Return, per fact, the ids predicted at its locality probes, which are the reference for later phases."""
    return {row.fact: row.predicted for row in rows if row.protocol == "agreement" and row.has("predicted")}


def summarise(rows: Sequence[Row]) -> Phase:
    """Return quantity -> protocol -> mean in percent, with its interval and counts, over the rows of one phase."""
    table: Phase = {}
    for quantity in (*QUANTITIES, "locality"):
        for protocol in dict.fromkeys(row.protocol for row in rows if row.has(quantity)):
            own = [row for row in rows if row.protocol == protocol]
            errored = sum(quantity in row.errors for row in own)
            scores = [score for row in own if (score := row.score(quantity)) is not None]
            not_asked = len(own) - errored - len(scores)
            mean = mean_with_interval(scores, errored=errored, not_asked=not_asked)
            table.setdefault(quantity, {})[protocol] = mean
    return table


def known_facts(facts: Iterable[Fact], rows: Iterable[Row]) -> list[Fact]:
    """Return the facts whose old answer the model says when asked, according to rows of the protocol `generate`."""
    return [fact for fact, row in _replied(facts, rows) if _says(row, fact.prompt, fact.old_answers, fact.new_answers)]


def held_facts(facts: Iterable[Fact], rows: Iterable[Row]) -> list[Fact]:
    """Return the facts whose new answer the model says when asked, according to rows of the protocol `generate`."""
    return [fact for fact, row in _replied(facts, rows) if _says(row, fact.prompt, fact.new_answers, fact.old_answers)]


def _replied(facts: Iterable[Fact], rows: Iterable[Row]) -> Iterator[tuple[Fact, Row]]:
    """Yield each fact that was asked, with the row that has the model's free answer."""
    replies = {row.fact: row for row in rows if row.protocol == "generate"}
    return ((fact, row) for fact in facts if (row := replies.get(fact.id)))


def _says(row: Row, prompt: str, answers: Sequence[str], others: Sequence[str]) -> float:
    return matching.says(row.said or "", answers, others, question=prompt, at_start=row.writes_on)


def free_answers(base_rows: Sequence[Row], ask: Callable[[], list[Row]]) -> list[Row]:
    """Return the base's free answers: its rows of the protocol `generate` if that was scored, else those of `ask`."""
    return [row for row in base_rows if row.protocol == "generate"] or ask()


@dataclass(frozen=True)
class _Question:
    """A prompt, the answers that count as right (first the one taught or forgotten), and the opposite answers."""

    prompt: str
    answers: tuple[str, ...]
    others: tuple[str, ...]


def _questions(fact: Fact) -> dict[str, list[_Question]]:
    new, old = fact.new_answers, fact.old_answers
    learned = {
        "reliability": [_Question(fact.prompt, new, old)],
        "generality": [_Question(prompt, new, old) for prompt in fact.rephrase_prompts],
    }
    forgotten = {"residue": [_Question(prompt, old, new) for prompt in fact.prompts] if old else []}
    return {**(learned if new else {}), **forgotten}


def pairs_to_read(fact: Fact) -> Iterator[Pair]:
    """Yield each (prompt, answer) to read, including locality probes; aliases of answers are not read."""
    for questions in _questions(fact).values():
        yield from ((asked.prompt, asked.answers[0]) for asked in questions)
    yield from ((probe.prompt, probe.answer) for probe in fact.locality)


# Judging one question --------------------------------------------------------------------------------------

Readings = Mapping[Pair, Reading | Failure]
Replies = Mapping[str, Generated | Failure]
Score = float | Failure | None  # None: the protocol does not ask this question


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the share of positions where the predicted id is the wanted one. Source: EasyEdit, Ni et al. 2023."""
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


READING_RULES: Mapping[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "token": token_accuracy,
    "exact": lambda predicted, wanted: float(predicted == wanted),  # Source: MEMIT's `acc` on COUNTERFACT
}
TEXT_RULES: Mapping[str, Callable[[Generated, _Question], float]] = {
    "generate": lambda reply, asked: matching.equals(reply.text, asked.answers),
    "contains": lambda reply, asked: matching.says(
        reply.text, asked.answers, asked.others, question=asked.prompt, at_start=reply.writes_on
    ),
}
PROTOCOLS = ("token", "exact", "prefer", "generate", "contains")  # in the order of rows


def _judge(protocol: str, asked: _Question, read: Readings, replies: Replies) -> Score:
    """Return a score from 0 to 1. `prefer` gives 1 if the answer is likelier than its opposite (ROME's ES and PS)."""
    if protocol in TEXT_RULES:
        reply = replies[asked.prompt]
        if isinstance(reply, Failure):
            return reply
        return TEXT_RULES[protocol](reply, asked)
    if protocol == "prefer" and not asked.others:
        return None
    one = read[asked.prompt, asked.answers[0]]
    if isinstance(one, Failure):
        return one
    if protocol in READING_RULES:
        return READING_RULES[protocol](one.predicted, one.wanted)
    two = read[asked.prompt, asked.others[0]]
    if isinstance(two, Failure):
        return two
    assert one.logprob is not None, "read without `prefer`"
    assert two.logprob is not None, "read without `prefer`"
    return float(one.logprob > two.logprob)


# Rows ------------------------------------------------------------------------------------------------------


def _row(fact: Fact, phase: str, protocol: str, scores: Mapping[str, Sequence[Score]], **answers: object) -> Row:
    """Return a row with the mean of each quantity, None if nothing was asked or a question failed (see `errors`)."""
    errors: dict[str, str] = {}
    means: dict[str, float | None] = {}
    for quantity, values in scores.items():
        failures = [value.reason for value in values if isinstance(value, Failure)]
        numbers = [value for value in values if isinstance(value, float)]
        means[quantity] = sum(numbers) / len(numbers) if numbers and not failures else None
        if failures:
            errors[quantity] = failures[0]
    return Row.model_validate(
        {"fact": fact.id, "phase": phase, "protocol": protocol, "errors": errors, **means, **answers}
    )


def _texts(own: Sequence[Generated | Failure]) -> dict[str, object]:
    """Return the fields of a row for a fact's free answers, first the one to its prompt."""
    texts = [reply.text if isinstance(reply, Generated) else None for reply in own]
    answered = [reply for reply in own if isinstance(reply, Generated)]
    truncated = sum(reply.truncated for reply in answered)
    writes_on = {"writes_on": True} if any(reply.writes_on for reply in answered) else {}
    return {"said": texts[0], "said_rephrased": texts[1:], "truncated": truncated, **writes_on}


def _locality_rows(fact: Fact, phase: str, read: Readings, reference: list[list[int]] | None) -> Iterator[Row]:
    readings = [read[probe.prompt, probe.answer] for probe in fact.locality]
    predicted = [list(reading.predicted) if isinstance(reading, Reading) else [] for reading in readings]
    before = predicted if reference is None else reference
    agreement = [_accuracy(reading, was) for reading, was in zip(readings, before, strict=True)]
    accuracy = [_accuracy(reading, reading.wanted if isinstance(reading, Reading) else ()) for reading in readings]
    yield _row(fact, phase, "agreement", {"locality": agreement}, predicted=predicted)
    yield _row(fact, phase, "accuracy", {"locality": accuracy})


def _accuracy(reading: Reading | Failure, wanted: Sequence[int]) -> Score:
    if isinstance(reading, Failure):
        return reading
    if len(wanted) != len(reading.predicted):
        return Failure("the base could not be read at this probe")
    return token_accuracy(reading.predicted, wanted)
