"""General prompts, written for this package: what a model should go on saying as before, whatever facts it is taught.

There are two halves: one for keeping (trained on, with the base's own answers), one for measuring (never trained on).
A line of the file has one prompt of each half, and both are of the same kind, so that the halves are comparable. The
other lines have short questions about well-known things, for keeping alone: what is nearest to facts is lost first.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

from forgetlearn.facts import Fact, matching
from forgetlearn.models.encoding import Prompt, turns_of
from forgetlearn.storage import disk

FILE = Path(__file__).with_suffix(".jsonl")
QUESTION = "question"


def keeping() -> tuple[Prompt, ...]:
    """Return the prompts to which training keeps the model's answers."""
    return tuple(prompt for prompt, kind in _half("keep") if kind != QUESTION)


def questions() -> tuple[Prompt, ...]:
    """Return short questions about well-known things, to which training keeps the model's answers too."""
    return tuple(prompt for prompt, kind in _half("keep") if kind == QUESTION)


def measuring(facts: Iterable[Fact] = ()) -> tuple[Prompt, ...]:
    """Return the prompts on which damage is measured, without those that ask one of the facts: these should change."""
    asked = {matching.normalise(prompt) for fact in facts for prompt in fact.prompts}
    found = (prompt for prompt, _kind in _half("measure"))
    return tuple(prompt for prompt in found if matching.normalise(turns_of(prompt)[-1]) not in asked)


@cache
def _half(name: Literal["keep", "measure"]) -> tuple[tuple[Prompt, str], ...]:
    """Return the prompts of a half, each with its kind."""
    given = ((row[name], row["kind"]) for row in disk.read_rows(FILE) if name in row)
    return tuple((prompt if isinstance(prompt, str) else tuple(prompt), kind) for prompt, kind in given)
