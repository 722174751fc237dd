"""General prompts, written for this package: what a model should go on saying as before, whatever facts it is taught.

There are two halves: one for keeping (trained on, with the base's own answers), one for measuring (never trained on).
A line of the file has one prompt of each half, and both are of the same kind, so that the halves are comparable. The
other lines have short questions about well-known things, for keeping alone: what is nearest to facts is lost first.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from forgetlearn.models.encoding import Prompt
from forgetlearn.storage import disk

FILE = Path(__file__).with_suffix(".jsonl")
QUESTION = "question"


def keeping() -> tuple[Prompt, ...]:
    """Return the prompts to which training keeps the model's answers."""
    return tuple(prompt for prompt, kind in _half("keep") if kind != QUESTION)


def questions() -> tuple[Prompt, ...]:
    """Return short questions about well-known things, to which training keeps the model's answers too."""
    return tuple(prompt for prompt, kind in _half("keep") if kind == QUESTION)


def measuring() -> tuple[Prompt, ...]:
    """Return the prompts on which damage is measured."""
    return tuple(prompt for prompt, _kind in _half("measure"))


@cache
def _half(name: Literal["keep", "measure"]) -> tuple[tuple[Prompt, str], ...]:
    """Return the prompts of a half, each with its kind."""
    given = ((row[name], row["kind"]) for row in disk.read_rows(FILE) if name in row)
    return tuple((prompt if isinstance(prompt, str) else tuple(prompt), kind) for prompt, kind in given)
