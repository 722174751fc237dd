"""A comparison's cells to one table: means with intervals, paired differences, curves at equal reliability.

Everything is read from the folder, so the table can be made again without the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forgetlearn import pages, runs, statistics
from forgetlearn.compare import CELLS, Cell, CompareSettings, cells_of
from forgetlearn.config import RunConfig, validate
from forgetlearn.errors import RunError
from forgetlearn.method import METHODS
from forgetlearn.pages import COLUMNS

Scores = np.ndarray[Any, np.dtype[np.float64]]
PLAIN = {"lora": "lora"}  # what a method is compared with, by how it learns; the others with ft


def write_table(path: Path) -> dict[str, Any]:
    """The table of a comparison's folder, also written to `compare.json` and `compare.md`.

    Raises:
        RunError: the folder holds no comparison, or a cell of it is not done.
    """
    manifest = runs.RunFolder.open(path).manifest
    if "compare" not in manifest["config"]:
        raise RunError(f"{path} holds no comparison.")
    settings = validate(CompareSettings, manifest["config"]["compare"])
    config = validate(RunConfig, manifest["config"]["run"])
    groups = _groups(path, cells_of(settings, config))
    data: dict[str, Any] = {
        "seeds": list(settings.seeds),
        "rows": [_row(group, groups.values(), config.forget.epochs) for group in groups.values()],
        "curves": _curves(groups) if len(settings.epochs) > 1 else None,
    }
    runs.write_json(path / "compare.json", data)
    columns = [(q, p) for q, p in COLUMNS if any(f"{q}.{p}" in row["scores"] for row in data["rows"])]
    runs.write_text(path / "compare.md", pages.render("compare.md.j2", {**data, "columns": columns, "path": path.name}))
    return data


class _Group:
    """The cells of one row of the table: one per seed."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.first = cells[0]
        self.scores: dict[tuple[str, str], Scores] = {}  # quantity and protocol -> (S, N), NaN where there is none


def _groups(path: Path, cells: Iterable[Cell]) -> dict[str, _Group]:
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    groups = {label: _Group(sorted(members, key=lambda cell: cell.seed)) for label, members in by_label.items()}
    for group in groups.values():
        tables = [_scores(path / CELLS / cell.name) for cell in group.cells]
        for column in COLUMNS:
            if all(column in table for table in tables):
                group.scores[column] = np.array([table[column] for table in tables], dtype=float)
    order = list(METHODS)

    def key(label: str) -> tuple[int, str, float, str, int]:
        first = groups[label].first
        return order.index(first.method), first.variant, first.coef or 0, first.budget, first.epochs

    return {label: groups[label] for label in sorted(groups, key=key)}


def _scores(cell: Path) -> dict[tuple[str, str], list[float]]:
    """Quantity and protocol to the updated model's score of each fact, in the order of the facts."""
    if not (cell / runs.MANIFEST).is_file():
        raise RunError(f"{cell.parent.parent}: the cell {cell.name} is not done. Go on with --resume.")
    found: dict[tuple[str, str], list[float]] = {}
    for row in runs.read_rows(cell / "facts.jsonl"):
        if row["phase"] == "updated":
            for quantity, protocol in COLUMNS:
                if protocol == row["protocol"] and quantity in row:
                    score = row[quantity]
                    found.setdefault((quantity, protocol), []).append(np.nan if score is None else score)
    return found


def _row(group: _Group, groups: Iterable[_Group], forget_epochs: int) -> dict[str, Any]:
    cell = group.first
    baselines = _baselines(cell, groups, forget_epochs)
    return {
        "label": cell.label,
        "method": cell.method,
        "variant": cell.variant,
        "coef": cell.coef,
        "epochs": cell.epochs,
        "budget": cell.budget,
        "scores": {f"{q}.{p}": _estimate(scores) for (q, p), scores in group.scores.items()},
        "against": {
            baseline.first.budget: {
                "label": baseline.first.label,
                "differences": {
                    f"{q}.{p}": _difference(scores, baseline.scores[q, p])
                    for (q, p), scores in group.scores.items()
                    if (q, p) in baseline.scores
                },
            }
            for baseline in baselines
        },
    }


def _baselines(cell: Cell, groups: Iterable[_Group], forget_epochs: int) -> list[_Group]:
    """Plain fine-tuning that learns in the same way: for as many epochs, and for as many steps in all."""
    method = METHODS[cell.method]
    if cell.method in ("ft", "lora"):
        return []
    wanted = {("equal-epochs", cell.epochs), ("equal-steps", cell.epochs + forget_epochs)}
    plain = [group for group in groups if group.first.method == PLAIN.get(method.learns, "ft")]
    return [group for group in plain if (group.first.budget, group.first.epochs) in wanted]


def _estimate(scores: Scores) -> dict[str, Any] | None:
    """None where nothing was scored."""
    return asdict(statistics.interval(scores)) if np.isfinite(scores).any() else None


def _difference(ours: Scores, baseline: Scores) -> dict[str, Any] | None:
    both = np.isfinite(ours) & np.isfinite(baseline)
    return asdict(statistics.paired_difference(ours, baseline, rng=0)) if both.any() else None


def _curves(groups: Mapping[str, _Group]) -> list[dict[str, Any]]:
    """Per method and coefficient that forgets: what it has at equal reliability against plain fine-tuning."""
    lines: dict[tuple[str, str, float | None], list[_Group]] = {}
    for group in groups.values():
        if group.first.budget == "equal-epochs":
            lines.setdefault((group.first.method, group.first.variant, group.first.coef), []).append(group)
    curves = {key: _curve(members) for key, members in lines.items()}
    found = []
    for (method, variant, coef), curve in curves.items():
        how = METHODS[method]
        against = PLAIN.get(how.learns, "ft")
        plain = curves.get((against, "", None)) if method not in ("ft", "lora") else None
        if curve is None or plain is None:
            continue
        equal = statistics.at_equal_reliability(curve, plain)
        entry: dict[str, Any] = {"method": method, "variant": variant, "coef": coef, "against": against}
        entry |= {"at_equal_reliability": asdict(equal) if equal else None, "area": None}
        if equal is not None and equal.low < equal.high:
            entry["area"] = _area(curve, equal), _area(plain, equal)
        found.append(entry)
    return found


def _curve(groups: Sequence[_Group]) -> statistics.Curve | None:
    """Points (S, P) in percent, by epochs; None where a quantity was not scored."""
    columns = (("reliability", "token"), ("locality", "agreement"), ("generality", "token"))
    ordered = sorted(groups, key=lambda group: group.first.epochs)
    points = []
    for column in columns:
        if any(column not in group.scores or not np.isfinite(group.scores[column]).any() for group in ordered):
            return None
        points.append(np.array([100 * np.nanmean(group.scores[column], axis=1) for group in ordered]).T)
    return statistics.Curve(*points)


def _area(curve: statistics.Curve, shared: statistics.AtEqualReliability) -> dict[str, Any]:
    """Mean locality over the shared range of reliabilities, over seeds."""
    reliability, locality = np.asarray(curve.reliability), np.asarray(curve.locality)
    areas = [
        statistics.area_under_curve(own, place, shared.low, shared.high)
        for own, place in zip(reliability, locality, strict=True)
    ]
    return asdict(statistics.mean_over_seeds([np.nan if area is None else area for area in areas]))
