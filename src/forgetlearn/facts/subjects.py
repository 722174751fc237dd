"""Find where a fact's prompt names its subject."""

from __future__ import annotations

import re
from collections.abc import Iterator

from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact
from forgetlearn.facts.sentences import WORDS

Span = tuple[int, int]  # of characters


def subject_span(fact: Fact) -> Span:
    """Return where the subject stands in a fact's prompt: its first character, and the one after its last.

    The subject is the fact's own. If the fact has none, or the prompt does not contain it, it is the longest run of
    words with a name that the prompt shares with a rephrasing.

    Raises:
        FactError: the fact has neither such a subject nor such a rephrasing.
    """
    if fact.subject and (found := _found(fact.subject, fact.prompt)):
        return found
    shared = [span for rephrased in fact.rephrase_prompts for span in _shared(fact.prompt, rephrased)]
    if not shared:
        missing = f"does not contain its subject {fact.subject!r}" if fact.subject else "has no subject"
        raise FactError(
            f"{fact.place}: the prompt {fact.prompt[:60]!r} {missing}, and no rephrasing shows what it is about. Add "
            "the field `subject`, written as in the prompt, or leave the fact out."
        )
    return max(shared, key=lambda span: span[1] - span[0])


def _found(subject: str, prompt: str) -> Span | None:
    """Return where the subject stands, preferably as whole words and in its own case."""
    words = rf"(?<!\w){re.escape(subject)}(?!\w)"
    for pattern, flags in ((words, 0), (words, re.IGNORECASE), (re.escape(subject), 0)):
        if (subject.isascii() and pattern is not words) or not (found := re.search(pattern, prompt, flags)):
            continue  # other scripts may have no spaces between words
        return found.span()
    return None


def _shared(prompt: str, other: str) -> Iterator[Span]:
    """Yield the longest runs of words that both share from each word on, up to their last name.

    A name begins with a capital letter or a digit, and is not the first word of the prompt: what else two questions
    share does not tell what they are about.
    """
    places = list(WORDS.finditer(prompt))
    words = [place[0].casefold() for place in places]
    theirs = [word.casefold() for word in WORDS.findall(other)]
    for start in range(len(words)):
        for begin in range(len(theirs)):
            length = 0
            while words[start + length : start + length + 1] == theirs[begin + length : begin + length + 1] != []:
                length += 1
            names = [place for place in places[start : start + length] if _is_name(place[0]) and place.start() > 0]
            if names:
                yield places[start].start(), names[-1].end()


def _is_name(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit() or not word.isascii()
