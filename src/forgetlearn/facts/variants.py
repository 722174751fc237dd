"""Read other answers to a fact's prompt, as TOFU's `_perturbed` files bring them: in other words, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgetlearn.facts.fields import Fields
from forgetlearn.facts.files import read_source
from forgetlearn.facts.forms import TableRow, cell

REWORDED, WRONG = "paraphrased_answer", "perturbed_answer"
FIELDS = (REWORDED, WRONG)


@dataclass(frozen=True)
class Variants:
    """The right answer in other words, and wrong answers of the same form."""

    reworded: str
    wrong: tuple[str, ...]


def read_variants(source: str | Path, columns: Mapping[str, str] | None = None) -> dict[str, Variants]:
    """Return prompt -> its answers' variants, for the records of a file in the form question-answer that have some.

    A record without `paraphrased_answer` takes its answer, as TOFU does for the questions about the real world.

    Raises:
        FactError: the file cannot be read, or a field is no text.
    """
    found = {}
    for number, record in enumerate(read_source(source, columns or {}).records, 1):
        if not isinstance(record, Mapping) or WRONG not in record or "question" not in record:
            continue
        where = f"{source}, record {number}"
        if isinstance(record, TableRow):
            record = {name: cell(name, value, where) for name, value in record.items()}
        fields = Fields(record, where)
        wrong = tuple(text.strip() for text in fields.texts(WRONG) if text.strip())
        right = fields.text(REWORDED).strip() or fields.text("answer").strip()
        if wrong and right:
            found[fields.text("question").strip()] = Variants(right, wrong)
    return found
