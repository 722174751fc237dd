"""Tell questions from unfinished sentences, divide texts into sentences, and find names, by marks alone."""

from __future__ import annotations

import functools
import re
import unicodedata

FINAL = frozenset(".!?;。！？．؟।॥۔։՞።፧‽")  # of the scripts that mark the end of a sentence; ";" is the Greek "?"
WORDS = re.compile(r"\w+(?:[-'’.]\w+)*")
CLOSING = "\"'”’»›)]}」』）】*_ \n\t\u00a0"


def is_unfinished(prompt: str) -> bool:
    """Return True if a prompt is the beginning of a sentence, such as "The capital of France is"; else it asks."""
    text = prompt.rstrip(CLOSING)
    return not text or text[-1] not in FINAL or text.endswith("..")


def scripts(*texts: str) -> set[str]:
    """Return the scripts that the letters of texts are in, by the first word of their Unicode names."""
    return {unicodedata.name(letter, "").partition(" ")[0] for letter in set("".join(texts)) if letter.isalpha()}


def sentences(text: str, known: str = "") -> list[str]:
    """Divide a text into sentences.

    A full stop ends a sentence unless it follows an initial, or a word that also has one in the text `known`.
    """
    abbreviations = {word for word in known.split() if word.endswith(".")}
    found: list[str] = []
    for part in re.split(r"\n+|(?<=[.!?։።፧؟۔।])\s+|(?<=[。！？．])\s*", text.strip()):
        before = found[-1].rsplit(None, 1)[-1] if found and found[-1] else ""
        if before in abbreviations or re.fullmatch(r"([^\W\d_]\.)+", before):
            found[-1] += f" {part}"
        else:
            found.append(part)
    return [part.strip() for part in found if part.strip()]


def is_whole(sentence: str) -> bool:
    """Return True if a sentence ends with a mark that ends sentences."""
    return not is_unfinished(sentence)


@functools.lru_cache(maxsize=1 << 14)
def names_in(prompt: str) -> tuple[str, ...]:
    """Return the names of several words in a prompt: "Toyota Cresta" in "Who makes the Toyota Cresta?".

    Such a name is a run of words that begin with a capital letter or a digit. The first word of a whole sentence is not
    part of it: "Is Paris a city?" has none. Scripts without capital letters have no such names.
    """
    names: list[str] = []
    for sentence in sentences(prompt):
        end = None  # of the name before a word
        for number, word in enumerate(WORDS.finditer(sentence)):
            if not (word[0][0].isupper() or word[0][0].isdigit()) or (number == 0 and is_whole(sentence)):
                continue
            if end is not None and sentence[end : word.start()].isspace():
                names[-1] = f"{names[-1]} {word[0]}"
            else:
                names.append(word[0])
            end = word.end()
    return tuple(name for name in names if " " in name)
