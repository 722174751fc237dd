"""The table of a comparison, stored in compare.json: a row per method, coefficient and epochs, over all seeds.

Columns are named quantity.protocol. Scores are in percent, differences in percentage points.
"""

from __future__ import annotations

from pydantic import ConfigDict

from forgetlearn.config.methods import METHODS
from forgetlearn.evaluation.statistics import AtEqualReliability, Difference, Estimate, OverSeeds
from forgetlearn.storage.records import NothingForgotten, Record

FILE = "compare.json"


class Part(Record):
    """Base class of the table's parts. They hold dataclasses, which pydantic's strict mode would not read from JSON."""

    model_config = ConfigDict(strict=False)


class Against(Part):
    """The paired differences between a row and a row of plain fine-tuning."""

    label: str
    name: str
    overall: Difference | None
    differences: dict[str, Difference | None]


class Forgotten(Part):
    """The effect of forgetting alone: how much of the old answers is lost, and how much locality is left."""

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
    nothing_forgotten: NothingForgotten | None = None
    unlearned: int = 0  # facts that some seed had not learned when its learning ended
    added_tokens: float | None = None  # mean number of tokens that the method adds to what the model is asked
    against: dict[str, Against]  # by budget

    @property
    def line(self) -> str:
        """The method, and the variant if there is one. Rows of one line share a colour and a column of the facts."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def average(self) -> float:
        """The mean over the table's `overall` columns; 0 if they were not scored."""
        return self.overall.mean if self.overall else 0.0


class EqualReliability(Part):
    """A method and coefficient, compared with plain fine-tuning at equal reliability."""

    method: str
    variant: str
    coef: float | None
    against: str
    at_equal_reliability: AtEqualReliability | None
    area: list[OverSeeds] | None  # mean locality: of the method, of plain fine-tuning


class Unpaired(Part):
    """A method without paired differences, because its plain method is not part of the comparison."""

    method: str
    plain: str


class Table(Part):
    """The table of a comparison."""

    seeds: list[int]
    overall: list[str]
    rows: list[TableRow]
    unpaired: list[Unpaired]
    curves: list[EqualReliability] | None  # None unless several numbers of epochs were compared

    def name_of(self, row: TableRow) -> str:
        """Return a row's name for people; it includes the epochs if rows differ in them."""
        parts = [row.line]
        if row.coef is not None:
            parts.append(f"coef {row.coef:g}")
        if row.nothing_forgotten:
            parts.append("nothing forgotten")
        if len({other.epochs for other in self.rows}) > 1 and METHODS[row.method].fine_tunes:
            parts.append(f"{row.epochs} epoch{'s' if row.epochs > 1 else ''}")
        return ", ".join(parts)

    @property
    def protocols(self) -> set[str]:
        """The protocols that some row was scored under."""
        return {column.partition(".")[2] for row in self.rows for column in row.scores}

    @property
    def at_equal_epochs(self) -> list[TableRow]:
        """The rows that learn for the requested epochs, without those for equal steps."""
        return [row for row in self.rows if row.budget == "equal-epochs"]
