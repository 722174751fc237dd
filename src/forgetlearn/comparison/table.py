"""A comparison's cells to one table: means with intervals, paired differences, curves at equal reliability.

Everything is read from the folder, so the table and its page can be made again without the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forgetlearn.comparison.cells import Budget, Cell, CompareSettings, VariantSettings, cells_of
from forgetlearn.comparison.grid import CELLS, SHARED
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS, PLAIN_METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.errors import RunError, plain, some
from forgetlearn.evaluation import statistics
from forgetlearn.report import comparison_page
from forgetlearn.report.render import COLUMNS
from forgetlearn.storage import disk, records, run_folder

Column = tuple[str, str]  # quantity and protocol
Scores = np.ndarray[Any, np.dtype[np.float64]]
RESIDUES: tuple[Column, ...] = (("residue", "generate"), ("residue", "token"))


def write_table(path: Path) -> dict[str, Any]:
    """The table of a comparison's folder, also written to `compare.json`, and to `compare.md` and `report.html`.

    Raises:
        RunError: the folder holds no comparison, or a cell of it is not done.
    """
    manifest = run_folder.RunFolder.open(path).manifest
    if "compare" not in manifest["config"]:
        raise RunError(f"{path} holds no comparison.")
    records.check(records.ComparisonManifest, manifest, path / run_folder.MANIFEST)
    settings = validate(CompareSettings, manifest["config"]["compare"])
    config = validate(RunConfig, manifest["config"]["run"])
    groups = _groups(path, cells_of(settings, config))
    overall = _overall_columns(groups.values())
    data: dict[str, Any] = {
        "seeds": list(settings.seeds),
        "overall": [f"{quantity}.{protocol}" for quantity, protocol in overall],
        "rows": [
            _row(group, _baselines(group, groups.values(), settings, config), overall) for group in groups.values()
        ],
        "unpaired": _unpaired(settings),
        "curves": _curves(groups, settings) if len(settings.epochs) > 1 else None,
    }
    disk.write_json(path / "compare.json", data)
    cells = {label: [path / CELLS / cell.name for cell in group.cells] for label, group in groups.items()}
    comparison_page.write_pages(path, data, manifest, cells, path / SHARED)
    return data


class _Group:
    """The cells of one row of the table, one per seed, and their scores: matrices (S, N), NaN where there is none."""

    def __init__(self, path: Path, cells: Sequence[Cell]) -> None:
        self.cells = sorted(cells, key=lambda cell: cell.seed)
        self.first = self.cells[0]
        tables = [_scores(path / CELLS / cell.name) for cell in self.cells]
        self.phases = {
            phase: {
                column: np.array([table[phase][column] for table in tables], dtype=float)
                for column in COLUMNS
                if all(column in table.get(phase, {}) for table in tables)
            }
            for phase in ("base", "forgotten", "updated")
        }
        self.scores: dict[Column, Scores] = self.phases["updated"]


def _groups(path: Path, cells: Iterable[Cell]) -> dict[str, _Group]:
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    groups = {label: _Group(path, members) for label, members in by_label.items()}
    counts = {scores.shape[-1] for group in groups.values() for own in group.phases.values() for scores in own.values()}
    if len(counts) > 1:
        raise RunError(f"{path / CELLS}: cells have {some(sorted(counts))} facts, and should have the same. Run again.")
    order = list(METHODS)

    def key(label: str) -> tuple[int, str, float, str, int]:
        first = groups[label].first
        return order.index(first.method), first.variant, first.coef or 0, first.budget, first.epochs

    return {label: groups[label] for label in sorted(groups, key=key)}


def _scores(cell: Path) -> dict[str, dict[Column, list[float]]]:
    """Phase, then quantity and protocol, to the score of each fact, in the order of the facts."""
    if not (cell / run_folder.MANIFEST).is_file():
        raise RunError(f"{cell.parent.parent}: the cell {cell.name} is not done. Go on with --resume.")
    run_folder.RunFolder.open(cell).check_results(f"remove {cell} and go on with --resume")
    found: dict[str, dict[Column, list[float]]] = {}
    facts: dict[tuple[str, Column], list[str]] = {}
    for row in records.read_rows(records.Row, cell / "facts.jsonl"):
        own = found.setdefault(row["phase"], {})
        for quantity, protocol in COLUMNS:
            if protocol == row["protocol"] and quantity in row:
                score = row[quantity]
                own.setdefault((quantity, protocol), []).append(np.nan if score is None else score)
                facts.setdefault((row["phase"], (quantity, protocol)), []).append(row["fact"])
    wanted = [fact["id"] for fact in records.read_rows(records.Input, cell / "inputs.jsonl")]
    for (phase, (quantity, protocol)), scored in facts.items():
        if scored != wanted:
            raise RunError(
                f"{cell / 'facts.jsonl'}: fact: the rows of phase {plain(phase)} with {quantity} ({protocol}) are of "
                f"{len(scored)} facts, expected the {len(wanted)} of inputs.jsonl in their order. {records.REMEDY}"
            )
    return found


def _row(group: _Group, baselines: Mapping[Budget, _Group], overall: Sequence[Column]) -> dict[str, Any]:
    cell = group.first
    ours = _overall(group, overall)
    return {
        "label": cell.label,
        "method": cell.method,
        "variant": cell.variant,
        "coef": cell.coef,
        "epochs": cell.epochs,
        "budget": cell.budget,
        "overall": _estimate(ours),
        "scores": {f"{q}.{p}": _estimate(scores) for (q, p), scores in group.scores.items()},
        "forgotten": _forgotten(group),
        "against": {
            budget: {
                "label": baseline.first.label,
                "name": " ".join(filter(None, (baseline.first.method, baseline.first.variant))),
                "overall": _difference(ours, _overall(baseline, overall)),
                "differences": {
                    f"{q}.{p}": _difference(scores, baseline.scores[q, p])
                    for (q, p), scores in group.scores.items()
                    if (q, p) in baseline.scores
                },
            }
            for budget, baseline in baselines.items()
        },
    }


def _overall_columns(groups: Iterable[_Group]) -> list[Column]:
    """What a row's one number is the mean of: reliability, generality, locality, those that every group has."""
    found = [{column for column, scores in group.scores.items() if np.isfinite(scores).any()} for group in groups]
    there = set.intersection(*found)
    protocol = next((name for name in ("token", "generate") if ("reliability", name) in there), None)
    if protocol is None:
        return []
    wanted = [("reliability", protocol), ("generality", protocol), ("locality", "agreement")]
    return [column for column in wanted if column in there]


def _overall(group: _Group, columns: Sequence[Column]) -> Scores:
    """Each fact's mean over the columns; NaN where one of them is missing."""
    matrices = [group.scores[column] for column in columns] or [np.full((1, 1), np.nan)]
    mean: Scores = np.mean(matrices, axis=0)
    return mean


def _forgotten(group: _Group) -> dict[str, Any] | None:
    """What the forgotten model has lost of the old answers (points less than the base), and its locality."""
    base, forgotten = group.phases["base"], group.phases["forgotten"]
    residue = next((column for column in RESIDUES if column in base and column in forgotten), None)
    if residue is None:
        return None
    place = forgotten.get(("locality", "agreement"))
    return {
        "protocol": residue[1],
        "lost": _difference(base[residue], forgotten[residue]),
        "locality": None if place is None else _estimate(place),
    }


def _baselines(
    group: _Group, groups: Iterable[_Group], settings: CompareSettings, config: RunConfig
) -> dict[Budget, _Group]:
    """Plain fine-tuning that learns in the same way: for as many epochs, and for as many steps in all."""
    cell = group.first
    method = METHODS[cell.method]
    if cell.method in PLAIN_METHODS and not cell.variant:
        return {}
    plain = method.plain, _learns_like(cell, settings)
    by_epochs = {other.first.epochs: other for other in groups if (other.first.method, other.first.variant) == plain}
    wanted: dict[Budget, int] = {"equal-epochs": cell.epochs}
    if "equal-steps" in settings.budgets and method.forgets:
        wanted["equal-steps"] = cell.epochs + config.forget.epochs
    return {budget: by_epochs[epochs] for budget, epochs in wanted.items() if epochs in by_epochs}


def _learns_like(cell: Cell, settings: CompareSettings) -> str:
    """The variant of plain fine-tuning that learns what a cell does; "", the plain one, where there is none.

    Else the gain of a setting of learning would stand there as one of forgetting.
    """
    own = settings.variants.get(cell.variant, VariantSettings())
    if cell.method in PLAIN_METHODS or own.learning == VariantSettings().learning:
        return ""
    plain = METHODS[cell.method].plain
    like = (name for name, other in settings.variants.items() if plain in other.methods)
    return next((name for name in like if settings.variants[name].learning == own.learning), "")


def _unpaired(settings: CompareSettings) -> list[dict[str, str]]:
    """Methods that have nothing to be paired with, since the plain one is not among those compared."""
    wanted = {method: METHODS[method].plain for method in settings.methods}
    return [{"method": method, "plain": plain} for method, plain in wanted.items() if plain not in settings.methods]


def _estimate(scores: Scores) -> dict[str, Any] | None:
    """None where nothing was scored."""
    return asdict(statistics.interval(scores)) if np.isfinite(scores).any() else None


def _difference(ours: Scores, baseline: Scores) -> dict[str, Any] | None:
    both = np.isfinite(ours) & np.isfinite(baseline)
    return asdict(statistics.paired_difference(ours, baseline, rng=0)) if both.any() else None


def _curves(groups: Mapping[str, _Group], settings: CompareSettings) -> list[dict[str, Any]]:
    """Per method and coefficient that forgets: what it has at equal reliability against plain fine-tuning."""
    lines: dict[tuple[str, str, float | None], list[_Group]] = {}
    for group in groups.values():
        if group.first.budget == "equal-epochs":
            lines.setdefault((group.first.method, group.first.variant, group.first.coef), []).append(group)
    curves = {key: _curve(members) for key, members in lines.items()}
    found = []
    for (method, variant, coef), curve in curves.items():
        how = METHODS[method]
        against = how.plain
        like = _learns_like(lines[method, variant, coef][0].first, settings)
        plain = curves.get((against, like, None)) if variant or method not in PLAIN_METHODS else None
        against = " ".join(filter(None, (against, like)))
        if curve is None or plain is None:
            continue
        equal = statistics.at_equal_reliability(curve, plain)
        entry: dict[str, Any] = {"method": method, "variant": variant, "coef": coef, "against": against}
        entry |= {"at_equal_reliability": asdict(equal) if equal else None, "area": None}
        if equal is not None and equal.low < equal.high:
            entry["area"] = [asdict(statistics.mean_locality(each, equal.low, equal.high)) for each in (curve, plain)]
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
