"""Tables and the plot of a study. Rows of one base, from any number of comparisons, are compared over the same seeds.

A row consists of its finished cells. Two rows are compared over the seeds that both of them have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from forgetlearn.comparison.cells import Cell, CompareSettings, cells_of
from forgetlearn.comparison.grid import CELLS
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.evaluation import statistics
from forgetlearn.report.render import Interval, show_difference
from forgetlearn.storage import disk, run_folder

PROTOCOLS = ("token", "exact", "generate")
QUANTITIES = ("reliability", "generality", "locality", "residue")
Scores = Mapping[tuple[str, str], list[float]]  # quantity and protocol to a number per fact
Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Row:
    """A method with its variant and coefficient: cells by epochs and seed."""

    first: Cell
    suffix: str = ""
    cells: dict[tuple[int, int], Path] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The row's label in the tables."""
        parts = (self.first.method, self.first.variant, self.first.coef, self.suffix)
        return " ".join(f"{part:g}" if isinstance(part, float) else part for part in parts if part)

    @property
    def plain(self) -> str:
        """The label of the row that this one is compared with."""
        return METHODS[self.first.method].plain

    @cached_property
    def scores(self) -> dict[tuple[int, int], Scores]:
        """Scores of the updated model, by epochs and seed."""
        return {place: _scores(path) for place, path in self.cells.items()}

    def seeds(self, epochs: Iterable[int]) -> set[int]:
        """Return the seeds that are finished for all of these numbers of epochs."""
        return set.intersection(*({seed for own, seed in self.cells if own == wanted} for wanted in epochs))

    def matrix(self, quantity: str, protocol: str, epochs: int, seeds: Iterable[int]) -> Matrix | None:
        """Return the scores (S, N); None if they were not asked for."""
        column = (quantity, "agreement" if quantity == "locality" else protocol)
        found = [self.scores[epochs, seed].get(column) for seed in sorted(seeds)]
        return None if not found or any(own is None for own in found) else np.array(found, dtype=float)


def read_rows(folders: Mapping[Path, str]) -> dict[str, Row]:
    """Return rows by label, from all finished cells of these comparisons. Each folder's text is added to its labels."""
    rows: dict[str, Row] = {}
    for folder, suffix in folders.items():
        config = run_folder.RunFolder.open(folder).manifest.config
        settings, run = validate(CompareSettings, config["compare"]), validate(RunConfig, config["run"])
        for cell in cells_of(settings, run):
            path = folder / CELLS / cell.name
            if run_folder.is_run(path):
                new = Row(cell, suffix)
                rows.setdefault(new.label, new).cells.setdefault((cell.epochs, cell.seed), path)
    order = list(METHODS)
    return dict(sorted(rows.items(), key=lambda item: order.index(item[1].first.method)))


def _scores(path: Path) -> Scores:
    found: dict[tuple[str, str], list[float]] = {}
    for row in disk.read_rows(path / "facts.jsonl"):
        for quantity in QUANTITIES:
            if row["phase"] == "updated" and quantity in row:
                score = np.nan if row[quantity] is None else row[quantity]
                found.setdefault((quantity, row["protocol"]), []).append(score)
    return found


def tables(rows: Mapping[str, Row], chosen: Sequence[str], names: Mapping[str, str]) -> str:
    """Return Markdown tables per protocol: each row minus plain fine-tuning, and the chosen rows minus every other row.

    `names` replace labels.
    """
    parts = []
    shown = {label: names.get(label, label) for label in rows}
    for protocol in PROTOCOLS:
        lines = [_line(shown[label], row, rows.get(row.plain), protocol) for label, row in rows.items()]
        if any(lines):
            parts.append("\n".join([f"`{protocol}`", "", *_head("minus plain"), *filter(None, lines)]))
    for label in chosen:
        ours = rows.get(label)
        lines = [_line(shown[other], ours, row, "token") for other, row in rows.items()] if ours else []
        if any(lines):
            parts.append("\n".join([f"{shown[label]} (`token`)", "", *_head("minus"), *filter(None, lines)]))
    return "\n\n".join(parts)


def _head(what: str) -> list[str]:
    columns = (what, "seeds", "epochs", *QUANTITIES, "equal reliability: generality", "locality")
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]


def _line(label: str, ours: Row, other: Row | None, protocol: str) -> str:
    """Return the differences after the most epochs, and averaged over the reliabilities that both reach; "" if none."""
    if other is None:
        return ""
    shared = sorted({epochs for epochs, _seed in ours.cells} & {epochs for epochs, _seed in other.cells})
    seeds = ours.seeds(shared) & other.seeds(shared) if shared else set()
    if not seeds:
        return ""
    if ours is other:
        means = [ours.matrix(quantity, protocol, shared[-1], seeds) for quantity in QUANTITIES]
        cells = ["–" if found is None else f"{100 * np.nanmean(found):.1f}" for found in means] + ["", ""]
        return "" if means[0] is None else f"| {label} | {len(seeds)} | {shared[-1]} | {' | '.join(cells)} |"
    cells = []
    for quantity in QUANTITIES:
        pair = [row.matrix(quantity, protocol, shared[-1], seeds) for row in (ours, other)]
        there = pair[0] is not None and pair[1] is not None
        cells.append(bold(statistics.paired_difference(*pair, rng=0)) if there else "–")
    if cells[0] == "–":
        return ""
    equal = (
        statistics.at_equal_reliability(*curves) if (curves := _curves(ours, other, protocol, shared, seeds)) else None
    )
    cells += [bold(equal.generality), bold(equal.locality)] if equal else ["–", "–"]
    return f"| {label} | {len(seeds)} | {shared[-1]} | {' | '.join(cells)} |"


def _curves(
    ours: Row, other: Row, protocol: str, epochs: Sequence[int], seeds: Iterable[int]
) -> list[statistics.Curve] | None:
    if len(epochs) < 2:
        return None
    curves = []
    for row in (ours, other):
        points = []
        for quantity in ("reliability", "locality", "generality"):
            found = [row.matrix(quantity, protocol, each, seeds) for each in epochs]
            if any(matrix is None for matrix in found):
                return None
            points.append(np.array([100 * np.nanmean(matrix, axis=1) for matrix in found]).T)
        curves.append(statistics.Curve(*points))
    return curves


def bold(difference: Interval) -> str:
    """Return a difference with its interval, in bold if the interval excludes zero."""
    text = show_difference(difference)
    low, high = difference.low, difference.high
    return f"**{text}**" if low is not None and (low > 0 or high < 0) else text


def plot(bases: Mapping[str, Mapping[str, Row]], file: Path, plotted: Sequence[str], names: Mapping[str, str]) -> None:
    """Plot locality against generality: a panel per base, with a line over epochs for each plotted row."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot

    columns = 2
    height = -(-len(bases) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(9, 3.6 * height), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes.flat, bases.items(), strict=False):
        for index, row in [(plotted.index(label), row) for label, row in rows.items() if label in plotted]:
            all_epochs = sorted({epochs for epochs, _seed in row.cells})
            points = [
                [100 * np.nanmean(row.matrix(quantity, "token", epochs, row.seeds([epochs]))) for epochs in all_epochs]
                for quantity in ("generality", "locality")
            ]
            width, colour = (2.2, "black") if row.label == "ft" else (1.2, f"C{index % 10}")
            axis.plot(
                *points, marker="o", markersize=3, linewidth=width, color=colour, label=names.get(row.label, row.label)
            )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("generality (token), %", fontsize=8)
        axis.set_ylabel("locality (agreement), %", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, frameon=False)
    for axis in axes.flat[len(bases) :]:
        axis.set_visible(False)
    figure.savefig(file, metadata={"Date": None})
