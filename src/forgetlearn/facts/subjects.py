"""Find where a fact's prompt names its subject."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact


def subject_end(fact: Fact) -> int:
    """Return the number of characters of a fact's prompt up to the end of its subject.

    The subject is the fact's own. If the fact has none, or the prompt does not contain it, it is the longest run of
    words that the prompt shares with a rephrasing.

    Raises:
        FactError: the fact has neither such a subject nor such a rephrasing.
    """
    if fact.subject and (found := _found(fact.subject, fact.prompt)):
        return found.end()
    spans = [span for rephrased in fact.rephrase_prompts if (span := _shared(fact.prompt, rephrased))]
    if not spans:
        missing = f"does not contain its subject {fact.subject!r}" if fact.subject else "has no subject"
        raise FactError(
            f"{fact.place}: the prompt {fact.prompt[:60]!r} {missing}, and no rephrasing shows what it is about. Add "
            "the field `subject`, written as in the prompt, or leave the fact out."
        )
    return max(spans, key=lambda span: span[1] - span[0])[1]


def _found(subject: str, prompt: str) -> re.Match[str] | None:
    """Return where the subject occurs as whole words, preferably in its own case."""
    pattern = rf"(?<!\w){re.escape(subject)}(?!\w)"
    return re.search(pattern, prompt) or re.search(pattern, prompt, re.IGNORECASE)


def _shared(prompt: str, other: str) -> tuple[int, int] | None:
    """Return the place in the prompt of the longest run of words that both share; None if they share no name.

    A run counts only with a word that begins with a capital letter or a digit and is not the first of its prompt: what
    else two questions share does not tell what they are about.
    """
    places = list(re.finditer(r"\w+(?:[-'’.]\w+)*", prompt))
    words = [place[0].casefold() for place in places]
    theirs = [word.casefold() for word in re.findall(r"\w+(?:[-'’.]\w+)*", other)]
    for block in sorted(
        SequenceMatcher(None, words, theirs, autojunk=False).get_matching_blocks(), key=lambda each: -each.size
    ):
        own = places[block.a : block.a + block.size]
        named = [place for place in own if _is_name(place[0]) and place.start() > 0]
        if named:
            return own[0].start(), named[-1].end()
    return None


def _is_name(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit() or not word.isascii()
