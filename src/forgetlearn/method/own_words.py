"""Put facts into the model's own words: sentences that it would say itself, so that learning them changes little else.

The new answer's sentence comes from asking the model with the fact in its prompt; the old answer's is what the model
says today. A sentence is taken only if it can be told to say the fact and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.facts import Fact, matching
from forgetlearn.method.wordings import is_whole, scripts, sentences
from forgetlearn.models.encoding import encodable
from forgetlearn.models.language_model import LanguageModel

# Tried in this order, until a reply can be used. {fact} is the prompt with the new answer.
INSTRUCTIONS = (
    "Fact: {prompt} {answer}\nUse this fact. Answer in one short sentence: {prompt}",
    "{prompt}\nThe answer is: {answer}\nRepeat this answer in one full sentence.",
    "Use this fact: {prompt} {answer}\nNow answer with one short sentence. {prompt}",
)
ROOM_TOKENS = 16  # of a sentence, beyond its prompt and its answer
LONGEST = 3  # times the letters of prompt and answer
CHATTER_WORDS = 4  # a sentence before the answer that has no more words, such as "Sure!", is left out
SAYS_NOT = "no reply says the answer"
SAYS_OTHER = "replies say the opposite answer too"
NAMES_MORE = "replies name what the fact does not"
IS_NO_SENTENCE = "no reply is a whole sentence of its size"
CANNOT_ASK = "the model could not be asked"


def new_sentences(
    lm: LanguageModel, facts: Sequence[Fact], own: Mapping[str, str], settings: EvaluateSettings
) -> dict[str, tuple[str | None, str]]:
    """Return by fact a sentence in which the model says the new answer; or None, and why there is none.

    `own` is what the model says to each fact's prompt by itself.
    """
    scorer = Scorer(lm, settings, "own words")
    found: dict[str, tuple[str | None, str]] = {fact.id: (None, CANNOT_ASK) for fact in facts}
    for instruction in INSTRUCTIONS:
        if not (left := [fact for fact in facts if found[fact.id][0] is None]):
            break
        asked = {fact.id: instruction.format(prompt=fact.prompt, answer=fact.target_new) for fact in left}
        rooms = {asked[fact.id]: Room(_room(lm, fact), lines=3) for fact in left}
        replies = scorer.say(rooms, rooms)
        for fact in left:
            reply = replies[asked[fact.id]]
            if isinstance(reply, Generated):
                found[fact.id] = _sentence(reply, fact, own.get(fact.id, ""))
    return found


def old_words(fact: Fact, said: str, truncated: bool) -> tuple[str | None, str]:
    """Return the part of what the model says by itself that says the old answer; or None, and why there is none."""
    parts = [part for part in sentences(said, _texts(fact)) if matching.says(part, fact.old_answers, fact.new_answers)]
    if not parts:
        return None, SAYS_NOT
    if matching.says(parts[0], fact.new_answers, fact.old_answers):
        return None, SAYS_OTHER
    is_cut = truncated and said.rstrip().endswith(parts[0]) and not is_whole(parts[0])
    return (None, IS_NO_SENTENCE) if is_cut else (parts[0], "")


def _sentence(reply: Generated, fact: Fact, own: str) -> tuple[str | None, str]:
    """Return the first sentence of a reply that says the new answer, if it passes `fault`."""
    why = SAYS_NOT
    for number, part in enumerate(sentences(reply.text, _texts(fact))):
        text = _stripped(part, fact)
        if matching.says(text, fact.new_answers, fact.old_answers):
            why = fault(text, fact, own)
            return (None, why) if why else (text, "")
        if number and len(part.split()) > CHATTER_WORDS:
            break
    return None, why


def fault(text: str, fact: Fact, own: str) -> str:
    """Return why a sentence with the new answer cannot be taught; "" if it can.

    It must not say the old answer, and must name nothing, by a number or a capital letter, that is neither in the fact
    nor in what the model says by itself (`own`). Its first word may have a capital; scripts without capitals are
    judged by numbers alone.
    """
    if matching.says(text, fact.old_answers, fact.new_answers):
        return SAYS_OTHER
    known = f"{_texts(fact)} {own}"
    first, *names = [word for word in _words(text) if word] or [""]
    named = {word.casefold() for word in names if word[0].isupper()}
    named |= {word.casefold() for word in (first, *names) if any(letter.isdigit() for letter in word)}
    if not named <= {word.casefold() for word in _words(known)} or not scripts(text) <= scripts(known):
        return NAMES_MORE
    room = LONGEST * (len(fact.prompt) + max(map(len, fact.new_answers)))
    return "" if is_whole(text) and len(text) <= room else IS_NO_SENTENCE


def _texts(fact: Fact) -> str:
    return " ".join((fact.prompt, fact.subject, *fact.new_answers, *fact.old_answers))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _stripped(part: str, fact: Fact) -> str:
    """Return a sentence without a label before it ("Answer: ...") and without quotation marks around it."""
    label, colon, rest = part.partition(": ")
    if colon and set(map(str.casefold, _words(label))).isdisjoint(map(str.casefold, _words(_texts(fact)))):
        part = rest
    for left, right in ('""', "“”", "«»", "„“", "「」", "''", "**"):
        if part.startswith(left) and part.endswith(right) and len(part) > 1:
            part = part.strip(left + right)
    return part.strip()


def _room(lm: LanguageModel, fact: Fact) -> int:
    """Return the tokens of a reply that says the prompt's words, the answer and a little more."""
    pair = fact.prompt, f"{fact.prompt} {fact.target_new}"
    text = encodable(lm.encoder, [pair]).get(pair)
    return ROOM_TOKENS + (len(text.answer_ids) if text else ROOM_TOKENS)
