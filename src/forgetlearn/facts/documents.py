"""Cut texts into windows that can be forgotten and asked for like facts.

The prompt of such a fact is the first half of its window, and its answer the second. Windows overlap by a half, so that
each half but the first of a text is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from forgetlearn.errors import FactError
from forgetlearn.facts.fact import Fact, make_fact
from forgetlearn.facts.fact_set import FactSet

HALF_WORDS = 40  # of a window: about 50 tokens, as in studies of what models know by heart
FEWEST_WORDS = 8  # of the answer, if a text ends there
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
    for place, text in _texts(path):
        n_texts += 1
        for prompt, answer in _windows(text.split()):
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
    texts = [json.dumps({"text": f"{fact.prompt} {fact.target_new}"}, ensure_ascii=False) for fact in facts]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", newline="\n")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each document in a file."""
    if not path.is_file():  # a pipe or a device might never end
        raise FactError(f"{path}: is not a file. Give a text file (UTF-8), or JSONL with the field text.")
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactError(f"{path}: {error.strerror or error}. Give a text file (UTF-8).") from None
    except UnicodeDecodeError as error:
        raise FactError(f"{path}: is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    if path.suffix.lower() != ".jsonl":
        yield str(path), whole
        return
    for number, line in enumerate(whole.split("\n"), 1):  # splitlines would split at U+2028 inside a text
        if line.strip():
            yield f"{path}, line {number}", _text_of(line, f"{path}, line {number}")


def _text_of(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise FactError(f"{place}: is not an object with the field text. Give one document a line.")
    return text


def _windows(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the two halves of each window; the last second half is shorter, or has the few words that are left too."""
    for middle in range(HALF_WORDS, len(words), HALF_WORDS):
        end = middle + HALF_WORDS
        second = words[middle : end if len(words) - end >= FEWEST_WORDS else len(words)]
        if len(second) >= FEWEST_WORDS:
            yield " ".join(words[middle - HALF_WORDS : middle]), " ".join(second)
