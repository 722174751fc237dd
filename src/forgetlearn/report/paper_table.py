"""The records of a reproduction of the paper: what its parts measure, and `paper.json`, its figures beside ours.

Scores are in percent, differences in percentage points, times in seconds.
"""

from __future__ import annotations

from typing import Literal

from forgetlearn.evaluation.statistics import Estimate
from forgetlearn.report.table import Part
from forgetlearn.storage.records import Count, Number, Record, Share, TaskScore, Text

FILE = "paper.json"
Verdict = Literal["confirmed", "contradicted", "open"]
QUANTITIES = ("reliability", "generality", "locality")


# What is measured -----------------------------------------------------------------------------------------


class Seconds(Record):
    """How long a method took for a number of edits."""

    method: Text
    edits: Count
    seconds: Number


class DistanceRow(Record):
    """The Euclidean distance of a matrix from the base after forgetting with coefficient 1."""

    layer: Count
    matrix: Text
    part: Text  # attention or mlp
    distance: Number


class CurveRow(Record):
    """A forgotten model's scores on the OLD answer to a fact; coefficient 0 is the original model."""

    coef: Number
    fact: Text
    reliability: Share | None
    locality: Share | None


# The report -----------------------------------------------------------------------------------------------


class Measured(Part):
    """A mean with its 95 % interval, which is None if nothing shows how the mean varies."""

    mean: float
    low: float | None
    high: float | None


class ScoreRow(Part):
    """A row of table 1 or 2: the paper's figure and ours for each quantity; ours is None if it was not scored."""

    method: str
    coef: float | None
    paper: dict[str, float | None]
    ours: dict[str, Estimate | None]


class ScoreTable(Part):
    """The part of table 1 or 2 that is of one data set."""

    part: str
    data: str
    facts: int
    paper_facts: int
    held: Estimate | None  # how much of the old answers the original model gives
    rows: list[ScoreRow]


class Sign(Part):
    """A difference that the paper reports, ours, and whether ours has the same sign."""

    part: str
    data: str
    what: str  # such as "f-ft over ft: reliability"
    unit: str
    paper: float
    ours: Measured
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """The comparison in one sentence."""
        why = "" if self.verdict != "open" or self.ours.low is not None else ", without an interval"
        interval = "" if self.ours.low is None else f" [{self.ours.low:+.3g}, {self.ours.high:+.3g}]"
        paper = " ".join(filter(None, (f"{self.paper:+.3g}", self.unit)))
        ours = f"{self.ours.mean:+.3g}{interval} here{why}"
        return f"{self.verdict.capitalize()} ({self.part}, {self.data}): {self.what}, {paper} in the paper, {ours}."


class TimeRow(Part):
    """A row of table 3: seconds for each number of edits, and as a multiple of full fine-tuning's."""

    method: str
    seconds: dict[int, float]
    ratios: dict[int, float]
    paper_seconds: dict[int, float]
    paper_ratios: dict[int, float]


class TextRow(Part):
    """A row of table 4: what the model says to a prompt in each phase."""

    prompt: str
    old: str
    new: str
    said: dict[str, str]


class TaskRow(Part):
    """A row of table 5: a task's score in each phase, and the paper's in percent."""

    task: str
    metric: str
    paper: dict[str, float]
    ours: dict[str, TaskScore]


class CurvePoint(Part):
    """A coefficient of figure 6 or 7."""

    coef: float
    paper: dict[str, float]
    ours: dict[str, Estimate | None]


class Curve(Part):
    """Figure 6 or 7: scores of the forgotten model on the OLD answers, by coefficient."""

    part: str
    kind: str
    points: list[CurvePoint]


class Distance(Part):
    """The distance of one matrix."""

    layer: int
    matrix: str
    part: str
    ours: Measured


class Distances(Part):
    """Figure 4 or 5: how far matrices move; the paper's smallest and largest distance by part of a layer."""

    part: str
    kind: str
    paper: dict[str, tuple[float, float]]
    matrices: list[Distance]


class PaperReport(Part):
    """`paper.json`: each figure of the paper beside ours."""

    model: str
    like: str
    seeds: list[int]
    differs: list[str]  # what is not as in the paper
    not_measured: list[str]  # parts of the paper that were not reproduced
    signs: list[Sign]
    scores: list[ScoreTable]
    times: list[TimeRow]
    texts: list[TextRow]
    tasks: list[TaskRow]
    distances: list[Distances]
    curves: list[Curve]

    def count(self, verdict: Verdict) -> int:
        """Return how many signs have this verdict."""
        return sum(sign.verdict == verdict for sign in self.signs)
