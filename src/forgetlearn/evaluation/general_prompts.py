"""General prompts, written for this package: what a model should go on saying as before, whatever facts it is taught.

There are two halves: one for keeping (trained on, with the base's own answers), one for measuring (never trained on).
Each line of the file has one prompt of each half, and both are of the same kind, so that the halves are comparable.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from forgetlearn.models.encoding import Prompt
from forgetlearn.storage import disk

FILE = Path(__file__).with_suffix(".jsonl")


def keeping() -> tuple[Prompt, ...]:
    """Return the prompts to which training keeps the model's answers."""
    return _half("keep")


def measuring() -> tuple[Prompt, ...]:
    """Return the prompts on which damage is measured."""
    return _half("measure")


@cache
def _half(name: Literal["keep", "measure"]) -> tuple[Prompt, ...]:
    given = (row[name] for row in disk.read_rows(FILE))
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in given)
