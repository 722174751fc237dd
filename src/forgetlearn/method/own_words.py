"""Put facts into the model's own words: sentences that it would say itself, so that learning them changes little else.

The new answer's sentence is made of what the model says today, or comes from asking it with the fact in its prompt; the
old answer's is what it says today. A sentence is taken only if it can be told to say the fact and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.facts import Fact, matching
from forgetlearn.facts.sentences import is_whole, names_in, scripts, sentences
from forgetlearn.models.encoding import Encoder, encodable
from forgetlearn.models.language_model import LanguageModel

# Tried in this order, until a reply can be used. {prompt} is the fact's, {answer} its new one.
INSTRUCTIONS = (
    "Fact: {prompt} {answer}\nUse this fact. Answer in one short sentence: {prompt}",
    "{prompt}\nThe answer is: {answer}\nRepeat this answer in one full sentence.",
)
ROOM_TOKENS = 16  # of a sentence, beyond its prompt and its answer
LONGEST = 3  # times the letters of prompt and answer
MOST_WORDS = 18  # of what the model says by itself, before the new answer
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}  # scripts without spaces between words
N_OTHERS = 2  # sentences of a fact beside the likeliest one
CHATTER_WORDS = 4  # a sentence before the answer that has no more words, such as "Sure!", is left out
SAYS_NOT = "no reply says the answer"
SAYS_OTHER = "replies give the other answer too"
NAMES_LESS = "replies do not name the subject"
NAMES_MORE = "replies name what the fact does not"
IS_NO_SENTENCE = "no reply is a single short sentence"
CANNOT_ASK = "the model could not be asked"


class Made(NamedTuple):
    """A sentence, and others that say the same and end with the new answer; or None, and why there is none."""

    text: str | None
    why: str = ""
    others: tuple[str, ...] = ()


def new_sentences(
    lm: LanguageModel, facts: Sequence[Fact], own: Mapping[str, str], settings: EvaluateSettings
) -> dict[str, Made]:
    """Return by fact a sentence with the new answer in the model's own words; or None, and why there is none.

    `own` is what the model says to each fact's prompt by itself. Sentences are made of its beginning and the new
    answer; where the model would rather say none of them, it is asked for one.
    """
    scorer = Scorer(lm, settings, "own words")
    found = _spliced(scorer, facts, own)
    for instruction in INSTRUCTIONS:
        if not (left := [fact for fact in facts if found[fact.id].text is None]):
            break
        asked = {fact.id: telling(fact, instruction) for fact in left}
        rooms = {asked[fact.id]: room(lm.encoder, fact) for fact in left}
        replies = scorer.say(rooms, rooms)
        for fact in left:
            reply = replies[asked[fact.id]]
            if isinstance(reply, Generated):
                found[fact.id] = _sentence(reply, fact, own.get(fact.id, ""))
            else:
                found[fact.id] = Made(None, CANNOT_ASK)
    return found


def _spliced(scorer: Scorer, facts: Sequence[Fact], own: Mapping[str, str]) -> dict[str, Made]:
    """Return by fact the likeliest of its `candidates` that the model, told the fact, prefers to the bare answer."""
    tried = to_read(facts, own)
    read = encodable(scorer.lm.encoder, tried.values(), end=True)
    texts = {key: read[pair] for key, pair in tried.items() if pair in read}
    scores = scorer.likelihoods(texts) if texts else {}
    ranked: dict[str, list[str]] = {fact.id: [] for fact in facts}
    for fact_id, text in sorted(scores, key=lambda key: scores[key], reverse=True):
        ranked[fact_id].append(text)
    return {fact.id: _preferred(ranked[fact.id], fact.target_new) for fact in facts}


def telling(fact: Fact, instruction: str = INSTRUCTIONS[0]) -> str:
    """Return a prompt that tells the model a fact and asks for a sentence."""
    return instruction.format(prompt=fact.prompt, answer=fact.target_new)


def to_read(facts: Iterable[Fact], own: Mapping[str, str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return the sentences and bare answers whose likelihoods are compared: fact and sentence -> the pair to read.

    `own` is what the model says to each fact's prompt by itself.
    """
    tried: dict[tuple[str, str], tuple[str, str]] = {}
    for fact in facts:
        good = [text for text in candidates(fact, own.get(fact.id, "")) if not fault(text, fact, "")]
        tried |= {(fact.id, text): (telling(fact), text) for text in (good and [fact.target_new, *good])}
    return tried


def _preferred(ranked: Sequence[str], bare: str) -> Made:
    """Return the first of the sentences, ranked from the likeliest down, and others; all before the bare answer."""
    better = list(takewhile(lambda text: text != bare, ranked))
    return Made(better[0], "", tuple(better[1 : 1 + N_OTHERS])) if better else Made(None, SAYS_NOT)


def candidates(fact: Fact, own: str) -> Iterator[str]:
    """Yield sentences made of the beginning of what the model says by itself, and of the new answer.

    That beginning ends before the first name that is not the fact's. Where the model says the old answer, the new one
    also takes its place.
    """
    first = next(iter(sentences(own, _texts(fact))), "")
    between = "" if scripts(fact.prompt) & UNSPACED else " "
    for old in fact.old_answers:
        replaced = with_answer(first, fact, old, fact.target_new)
        if replaced != first:
            yield replaced
    words = first.split() if between else list(first)
    end = first[-1:] if is_whole(first) else "."
    for number in range(1, min(len(words), MOST_WORDS) + 1):
        begin = between.join(words[:number])
        if is_whole(begin) or _named(begin) - _all_words(_texts(fact)):
            break
        yield f"{begin}{between}{fact.target_new}{end}"


def with_answer(text: str, fact: Fact, old: str, new: str) -> str:
    """Return a text about a fact with one answer in place of another.

    "poet" is not part of "poetry", and longer names in the prompt stay: "Toyota" is not replaced in "Toyota Cresta".
    """
    return re.sub(_answer_pattern(fact, [old]), lambda found: new if found[1] else found[0], text)


def _answer_pattern(fact: Fact, answers: Sequence[str], others: Sequence[str] = ()) -> str:
    """Return a pattern whose group 1 is one of the answers; longer `others` and names in the prompt match without it.

    Where the prompt's script divides words by spaces, an answer is not part of a longer word.
    """
    before, after = ("", "") if scripts(fact.prompt) & (UNSPACED | {"HANGUL"}) else (r"(?<!\w)", r"(?!\w)")
    longer = [re.escape(text) for text in (*names_in(fact.prompt), *others) if _is_longer(text, answers)]
    return "|".join([*longer, f"{before}({'|'.join(map(re.escape, answers))}){after}"])


def _is_longer(text: str, answers: Sequence[str]) -> bool:
    return bool(matching.says(text, answers)) and not matching.equals(text, answers)


def names_of(fact: Fact) -> list[str]:
    """Return the words of a prompt that tell what it is about: its subject, or else all that name something."""
    return [fact.subject] if fact.subject and fact.subject in fact.prompt else sorted(_named(fact.prompt))


def old_words(fact: Fact, said: str, truncated: bool) -> Made:
    """Return the part of what the model says by itself that says the old answer; or None, and why there is none."""
    parts = [part for part in sentences(said, _texts(fact)) if _says(part, fact, fact.old_answers, fact.new_answers)]
    if not parts:
        return Made(None, SAYS_NOT)
    if _says(parts[0], fact, fact.new_answers, fact.old_answers):
        return Made(None, SAYS_OTHER)
    is_cut = truncated and said.rstrip().endswith(parts[0]) and not is_whole(parts[0])
    return Made(None, IS_NO_SENTENCE) if is_cut else Made(parts[0])


def up_to_answer(fact: Fact, said: str) -> tuple[str, str] | None:
    """Return what a reply says before its first old answer, and that answer as it writes it; None if it has none.

    Only as many lines as the answer has count, and not a longer name of the prompt ("Toyota Cresta"). Of an old answer
    that contains another, as a sentence does ("It is Paris.", "Paris"), the shorter one is found.
    """
    old = [one for one in fact.old_answers if not any(_is_longer(one, [other]) for other in fact.old_answers)]
    pattern = _answer_pattern(fact, old, fact.new_answers)
    lines = matching.first_lines(said, max(map(matching.lines_of, old)))
    found = next((found for found in re.finditer(pattern, lines, re.IGNORECASE) if found[1]), None)
    return (lines[: found.start()], found[1]) if found else None


def _sentence(reply: Generated, fact: Fact, own: str) -> Made:
    """Return the first sentence of a reply that says the new answer, if it passes `fault`."""
    why = SAYS_NOT
    for number, part in enumerate(sentences(reply.text, _texts(fact))):
        text = _stripped(part, fact)
        if not (why := fault(text, fact, own)):
            return Made(text)
        if why != SAYS_NOT:
            break
        if number and len(part.split()) > CHATTER_WORDS:
            break
    return Made(None, why)


def fault(text: str, fact: Fact, own: str) -> str:
    """Return why a sentence cannot be taught as the new answer; "" if it can.

    It must say the new answer and not the old one, must name the subject, and must name nothing, by a number or a
    capital letter, that is neither in the fact nor in what the model says by itself (`own`). Its first word may have a
    capital; scripts without capitals are judged by numbers alone.
    """
    if not _says(text, fact, fact.new_answers, fact.old_answers):
        return SAYS_NOT
    if _says(text, fact, fact.old_answers, fact.new_answers):
        return SAYS_OTHER
    known = f"{_texts(fact)} {own}"
    if not _named(text) <= _all_words(known) or not scripts(text) <= scripts(known):
        return NAMES_MORE
    if not all(matching.says(text, [name]) for name in names_of(fact)):
        return NAMES_LESS
    room = LONGEST * (len(fact.prompt) + max(map(len, fact.new_answers)))
    return "" if is_whole(text) and len(text) <= room else IS_NO_SENTENCE


def _says(text: str, fact: Fact, answers: Sequence[str], others: Sequence[str]) -> float:
    return matching.says(text, answers, others, question=fact.prompt)


def _texts(fact: Fact) -> str:
    return " ".join((fact.prompt, fact.subject, *fact.new_answers, *fact.old_answers))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _all_words(text: str) -> set[str]:
    return {word.casefold() for word in _words(text)}


def _named(text: str) -> set[str]:
    """Return the words that name something, in lower case: with a capital letter, except the first word; or a digit."""
    first, *others = _words(text) or [""]
    named = {word for word in others if word[0].isupper()}
    return {word.casefold() for word in named | {word for word in (first, *others) if re.search(r"\d", word)}}


def _stripped(part: str, fact: Fact) -> str:
    """Return a sentence without a label before it ("Answer: ...") and without quotation marks around it."""
    label, colon, rest = part.partition(": ")
    if colon and _all_words(label).isdisjoint(_all_words(_texts(fact))):
        part = rest
    for left, right in ('""', "“”", "«»", "„“", "「」", "''", "**"):
        if part.startswith(left) and part.endswith(right) and len(part) > 1:
            part = part.strip(left + right)
    return part.strip()


def room(encoder: Encoder, fact: Fact) -> Room:
    """Return the room of a reply that says the prompt's words, the answer and a little more."""
    pair = fact.prompt, f"{fact.prompt} {fact.target_new}"
    text = encodable(encoder, [pair]).get(pair)
    return Room(ROOM_TOKENS + (len(text.answer_ids) if text else ROOM_TOKENS), lines=3)
