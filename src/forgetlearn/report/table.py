"""The table of a comparison, as compare.json holds it: a row per method, coefficient and epochs, over all seeds.

Columns are named quantity.protocol. Numbers are percent, differences percentage points.
"""

from __future__ import annotations

from pydantic import ConfigDict

from forgetlearn.evaluation.statistics import AtEqualReliability, Difference, Estimate, OverSeeds
from forgetlearn.storage.records import Record

FILE = "compare.json"


class Part(Record):
    """Base of the table's parts; they hold plain dataclasses, which strict mode would not read from JSON."""

    model_config = ConfigDict(strict=False)


class Against(Part):
    """A row's paired differences to one plain row."""

    label: str
    name: str
    overall: Difference | None
    differences: dict[str, Difference | None]


class Forgotten(Part):
    """What forgetting alone does: how much of the old answers is lost, and the locality that is left."""

    protocol: str
    lost: Difference | None
    locality: Estimate | None


class TableRow(Part):
    """A row: the cells of one method, coefficient and number of epochs, one per seed."""

    label: str
    method: str
    variant: str
    coef: float | None
    epochs: int
    budget: str
    overall: Estimate | None  # the mean over the table's `overall` columns
    scores: dict[str, Estimate | None]
    forgotten: Forgotten | None
    against: dict[str, Against]  # by budget

    @property
    def line(self) -> str:
        """The method, and the variant if it is one: what has one colour, and one column among the facts."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def average(self) -> float:
        """The mean over the table's `overall` columns; 0 without scores."""
        return self.overall.mean if self.overall else 0.0


class EqualReliability(Part):
    """A method and coefficient against plain fine-tuning, at equal reliability."""

    method: str
    variant: str
    coef: float | None
    against: str
    at_equal_reliability: AtEqualReliability | None
    area: list[OverSeeds] | None  # its own, and that of plain fine-tuning


class Unpaired(Part):
    """A method that cannot be paired: the plain method that it belongs to is not compared."""

    method: str
    plain: str


class Table(Part):
    """The whole table."""

    seeds: list[int]
    overall: list[str]
    rows: list[TableRow]
    unpaired: list[Unpaired]
    curves: list[EqualReliability] | None  # None without several numbers of epochs

    def name_of(self, row: TableRow) -> str:
        """Name a row in words; epochs are named if rows differ in them."""
        parts = [row.line]
        if row.coef is not None:
            parts.append(f"coef {row.coef:g}")
        if len({other.epochs for other in self.rows}) > 1:
            parts.append(f"{row.epochs} epoch{'s' if row.epochs > 1 else ''}")
        return ", ".join(parts)

    @property
    def at_equal_epochs(self) -> list[TableRow]:
        """The rows that learn for the epochs that were asked for."""
        return [row for row in self.rows if row.budget == "equal-epochs"]
