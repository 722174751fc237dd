"""Decide whether a model's reply matches an answer: normalised text, line by line.

`equals` is for published scores, `says` for what the model holds. docs/scores.md defines the rules.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterable

from forgetlearn.facts.sentences import names_in

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ACCENTS = re.compile(r"[\u0300-\u036f]")  # of Latin, Greek and Cyrillic letters; those of Japanese tell words apart
# Of scripts without spaces between words each character is a word (MLQA, Lewis et al. 2020, does so for Chinese).
# Katakana is left out, because its runs are words. Hangul has spaces, but its particles are written onto the word.
WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u309f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"([{WITHOUT_SPACES}\uac00-\ud7af])")
SIGNS = re.compile(r"(?<=[^\W\d_])[+#]+(?!\w)")  # of "C++" and "C#", which are other answers than "C"
BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,](?=\d)")
SENTENCES = re.compile(r".*(?:[.!?](?=\s)|[。！？])", re.DOTALL)
GONE = "\0"  # stands in for an answer that was removed, so that its neighbours do not become one answer


class _Between(dict[int, str]):
    """Maps each punctuation mark and symbol of Unicode to one text, for `str.translate`."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = self.between if unicodedata.category(char)[0] in "PS" else char
        return self[code]


MARKS = (_Between(""), _Between(" "))


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation, English articles and repeated spaces, as in SQuAD."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def equals(reply: str, answers: Iterable[str]) -> float:
    """Return 1 if the reply is one of the answers after normalisation, else 0.

    Only as many lines of the reply are compared as the answer has: for an answer of one line, the first.
    """
    return float(any(same_text(first_lines(reply, lines_of(answer)), answer) for answer in answers))


def same_text(reply: str, answer: str) -> bool:
    """Return True if the two texts are equal after normalisation.

    If normalisation leaves nothing of the answer (it is `"The"`, or only punctuation), compare the stripped texts.
    """
    wanted = normalise(answer)
    return normalise(reply) == wanted if wanted else reply.strip() == answer.strip()


def says(
    reply: str, answers: Iterable[str], others: Iterable[str] = (), *, question: str = "", at_start: bool = False
) -> float:
    """Return 1 if the reply contains one of the answers as whole words, else 0; with `at_start`, if it begins with one.

    `others` are the opposite answers. Where the reply has one that contains the answer, it says only that one: a reply
    of "New York" does not say "York" if "New York" is an opposite answer. The same holds for longer names in the
    question: to repeat "Toyota Cresta" is not to answer "Toyota". Only as many lines of the reply are compared as the
    answer has.
    """
    others = (*others, *names_in(question))
    return float(any(_says_one(first_lines(reply, lines_of(a)), a, others, at_start) for a in answers))


def _says_one(reply: str, answer: str, others: Iterable[str], at_start: bool) -> bool:
    wanted = set(_readings(answer))
    if not wanted:  # only articles or punctuation
        return same_text(reply, answer)
    longer = {
        other
        for own in others
        for other in _readings(own)
        if any(_within(each, other) and each != other for each in wanted)
    }
    for text in _readings(reply):
        for other in sorted(longer, key=len, reverse=True):
            text = re.sub(f"(?<![^ ]){re.escape(other)}(?![^ ])", GONE, text)
        if any(f"{text} ".startswith(f"{each} ") if at_start else _within(each, text) for each in wanted):
            return True
    return False


def _within(words: str, text: str) -> bool:
    return f" {words} " in f" {text} "


@functools.lru_cache(maxsize=1 << 14)
def _readings(text: str) -> tuple[str, ...]:
    """Return a text as normalised words separated by spaces, without accents, in up to two readings.

    Punctuation is deleted in the first reading, as in SQuAD ("U.S." is "us"), and separates words in the second
    ("Oslo-based" says "Oslo"). Readings without any word are left out.
    """
    folded = unicodedata.normalize("NFC", ACCENTS.sub("", unicodedata.normalize("NFKD", text.casefold())))
    folded = SIGNS.sub(lambda found: found[0].replace("+", "\ue000").replace("#", "\ue001"), folded)
    folded = BETWEEN_DIGITS.sub("", folded)
    kept = (UNSPACED.sub(r" \1 ", folded.translate(marks)) for marks in MARKS)
    found = (" ".join(ARTICLES.sub(" ", words).split()) for words in kept)
    return tuple(dict.fromkeys(words for words in found if words))


def added_to(question: str, reply: str) -> str:
    """Return the part of a reply from the first to the last word that the question lacks; "" if it is the whole reply.

    "The capital of France is Paris." adds "Paris" to "What is the capital of France?".
    """
    asked = {word for reading in _readings(question) for word in reading.split()}
    words = reply.split()
    new = [place for place, word in enumerate(words) if not asked.issuperset(" ".join(_readings(word)).split())]
    part = words[new[0] : new[-1] + 1] if new else []
    return "" if len(part) == len(words) else " ".join(part).strip(string.punctuation)


def whole_sentences(text: str) -> str:
    """Return the sentences of a text that was cut off, without the last, unfinished one; "" if none is whole."""
    found = SENTENCES.match(text)
    return found[0] if found else ""


def first_lines(text: str, n: int) -> str:
    """Return the first `n` lines of a text, starting with the first that is not blank."""
    return "\n".join(text.lstrip().split("\n")[:n]).rstrip()


def lines_of(answer: str) -> int:
    """Return the number of lines of an answer."""
    return answer.strip().count("\n") + 1
