"""Cut texts into windows that can be forgotten and asked for like facts.

The prompt of such a fact is the first half of its window, and its answer the second. Windows overlap by a half, so that
each half but the first of a text is forgotten. Where words are written without spaces, each character counts as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact, make_fact
from forgetlearn.facts.fact_set import FactSet
from forgetlearn.facts.matching import WITHOUT_SPACES

HALF_WORDS = 40  # of a window: about 50 tokens, as in studies of what models know by heart
FEWEST_WORDS = 8  # of the answer, if a text ends there
MOST_CHARACTERS = 4  # of a word, on average, where spaces divide words of a script that is written without them
# A character with its marks and the punctuation behind it, or what stands between two such characters.
CHARACTER = re.compile(rf"[{WITHOUT_SPACES}][^\w\s]*")
WORD = re.compile(rf" ?(?:{CHARACTER.pattern}|[^{WITHOUT_SPACES}\s]+)")
ENDS_IN_CHARACTER = re.compile(f"{CHARACTER.pattern}$")
WORD_CHARACTER = re.compile(rf"[\w{WITHOUT_SPACES}]")
ANSWER_AT = "answer_at"  # field of a line that is one window: the place in its text where the second half begins
READER = "documents"


def read_documents(source: str | Path, limit: int | None = None, *, strict: bool = False) -> FactSet:
    """Return the windows of the texts in a file as facts; `limit` is the largest number of windows.

    A `.jsonl` file has a text per line, in the field `text`; any other file is one text.

    Raises:
        FactError: the file cannot be read, is not UTF-8, or has no text that is long enough; with `strict`, a window
            repeats the first half of another, and would be left out.
    """
    path = Path(source)
    found: dict[str, Fact] = {}
    n_texts = n_windows = n_repeated = 0
    for place, text, answer_at in _texts(path):
        n_texts += 1
        windows = _windows(text) if answer_at is None else [(text[:answer_at].strip(), text[answer_at:].strip())]
        for prompt, answer in windows:
            n_windows += 1
            if prompt in found:
                n_repeated += 1
            elif limit is None or len(found) < limit:
                fact = make_fact(prompt, answer)
                found[prompt] = Fact(**{**vars(fact), "where": place})
    if not found:
        raise FactError(
            f"{path}: no text has {HALF_WORDS + FEWEST_WORDS} words, so there is nothing to cut in two. Give a longer "
            "text, or facts (--facts)."
        )
    if strict and n_repeated:
        raise FactError(
            f"{path}: --strict was given, but {n_repeated} of {n_windows} windows begin as an earlier one does."
        )
    return FactSet(
        facts=tuple(found.values()),
        source=str(source),
        reader=READER,
        old_from=("answers",),
        read=n_windows if limit is None else len(found) + n_repeated,
        in_source=n_windows,
        left_out={"repeated_prompt": n_repeated} if n_repeated else {},
        records=n_texts,
    )


def write_documents(facts: Iterable[Fact], path: Path) -> None:
    """Write windows as JSONL with the field `text`; `read_documents` reads equal facts back."""
    lines = []
    for fact in facts:
        half = fact.prompt + joint(fact.prompt, fact.target_new)
        line: dict[str, object] = {"text": half + fact.target_new}
        if list(_windows(half + fact.target_new)) != [(fact.prompt, fact.target_new)]:  # of several scripts
            line[ANSWER_AT] = len(half)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def joint(prompt: str, answer: str) -> str:
    """Return what stands between the halves of a window: a space, or nothing beside a character that is a word."""
    if len(prompt.split()) >= HALF_WORDS:  # its words are divided by spaces
        return " "
    beside = ENDS_IN_CHARACTER.search(prompt) or CHARACTER.match(answer)
    return "" if beside and WORD_CHARACTER.match(answer) else " "


def _texts(path: Path) -> Iterator[tuple[str, str, int | None]]:
    """Yield the place and the text of each document in a file, and its ANSWER_AT if it has one."""
    if not path.is_file():  # a pipe or a device might never end
        raise FactError(f"{path}: is not a file. Give a text file (UTF-8), or JSONL with the field text.")
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactError(f"{path}: {error.strerror or error}. Give a text file (UTF-8).") from None
    except UnicodeDecodeError as error:
        raise FactError(f"{path}: is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    if path.suffix.lower() != ".jsonl":
        yield str(path), whole, None
        return
    for number, line in enumerate(whole.split("\n"), 1):  # splitlines would split at U+2028 inside a text
        if line.strip():
            yield f"{path}, line {number}", *_read(line, f"{path}, line {number}")


def _read(line: str, place: str) -> tuple[str, int | None]:
    try:
        document = json.loads(line)
        text = document["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise FactError(f"{place}: is not an object with the field text. Give one document a line.")
    at = document.get(ANSWER_AT)
    return text, at if type(at) is int and text[:at].strip() and text[at:].strip() else None


def _windows(text: str) -> Iterator[tuple[str, str]]:
    """Yield the two halves of each window; the last second half is shorter, or has the few words that are left too."""
    words = _words(text.split())
    for middle in range(HALF_WORDS, len(words), HALF_WORDS):
        end = middle + HALF_WORDS
        second = words[middle : end if len(words) - end >= FEWEST_WORDS else len(words)]
        if len(second) >= FEWEST_WORDS:
            yield "".join(words[middle - HALF_WORDS : middle]).strip(), "".join(second).strip()


def _words(pieces: Sequence[str]) -> list[str]:
    """Return the words of a text that is divided at white space, each with a space if there was any before it.

    These are the pieces themselves, unless most are characters of a script without spaces.
    """
    characters = [len(CHARACTER.findall(piece)) for piece in pieces]
    without_spaces = sum(map(bool, characters))
    if sum(characters) <= max(len(pieces) - without_spaces, MOST_CHARACTERS * without_spaces):
        return [f" {piece}" for piece in pieces]
    return [word for piece in pieces for word in WORD.findall(f" {piece}")]
