"""Make a comparison's table from its cells: means with intervals, paired differences, values at equal reliability.

Everything is read from the folder, so the table and its report can be made again without the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from forgetlearn.comparison.cells import Budget, Cell, CompareSettings, VariantSettings, cells_of
from forgetlearn.comparison.grid import CELLS, SHARED
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS, PLAIN_METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.errors import RunError, plain, some
from forgetlearn.evaluation import statistics
from forgetlearn.evaluation.statistics import Difference, Estimate, Floats
from forgetlearn.report import comparison_page
from forgetlearn.report.comparison_page import CellAnswers
from forgetlearn.report.render import COLUMNS, Column, leading_columns
from forgetlearn.report.table import FILE, Against, EqualReliability, Forgotten, Table, TableRow, Unpaired
from forgetlearn.storage.records import REMEDY, ComparisonConfig, Input, Row, Summary, load_rows
from forgetlearn.storage.run_folder import INPUTS, ROWS, SUMMARY, RunFolder, is_run

Scores = dict[str, dict[Column, list[float]]]  # phase -> column -> a score per fact, in the facts' order


def write_table(path: Path) -> Table:
    """Return the table of a comparison's folder; write it to `compare.json`, `compare.md` and `report.html` there.

    Raise RunError if the folder holds no comparison, or a cell is not done.
    """
    run = RunFolder.open(path)
    if "compare" not in run.manifest.config:
        raise RunError(f"{path} does not contain a comparison. Give the folder of `forgetlearn compare`.")
    recorded = run.config_as(ComparisonConfig)
    settings, config = validate(CompareSettings, recorded.compare), validate(RunConfig, recorded.run.as_json())
    groups = _groups(path, cells_of(settings, config))
    overall = _overall_columns(groups.values())
    table = Table(
        seeds=list(settings.seeds),
        overall=[f"{quantity}.{protocol}" for quantity, protocol in overall],
        rows=[_row(group, _baselines(group, groups.values(), settings, config), overall) for group in groups.values()],
        unpaired=[
            Unpaired(method=method, plain=plain)
            for method in settings.methods
            if (plain := METHODS[method].plain) not in settings.methods
        ],
        curves=_curves(groups, settings) if len(settings.epochs) > 1 else None,
    )
    table.save(path / FILE)
    comparison_page.write_pages(
        path, table, run.manifest, {label: group.answers for label, group in groups.items()}, path / SHARED
    )
    return table


class Group:
    """The cells of one row of the table, one per seed, and their scores. Each cell is given with its folder.

    Scores are matrices of seeds x facts, with NaN where a fact was not scored.
    """

    def __init__(self, cells: Sequence[tuple[Cell, Path]]) -> None:
        ordered = sorted(cells, key=lambda item: item[0].seed)
        self.first = ordered[0][0]
        tables: list[Scores] = []
        self.answers: list[CellAnswers] = []
        added: dict[str, float] = {}  # tokens, by fact
        for cell, folder in ordered:
            if not is_run(folder):
                raise RunError(f"{folder}: the cell {cell.name} is not finished. Continue with --resume.")
            RunFolder.open(folder).check_results(f"remove {folder} and continue with --resume")
            rows = load_rows(Row, folder / ROWS)
            tables.append(_scores(folder, rows))
            added |= {row.fact: row.added_tokens for row in rows if row.added_tokens is not None}
            self.answers.append(CellAnswers.of(folder, rows))
        self.phases = {
            phase: {
                column: np.array([table[phase][column] for table in tables], dtype=float)
                for column in COLUMNS
                if all(column in table.get(phase, {}) for table in tables)
            }
            for phase in ("base", "forgotten", "updated")
        }
        self.scores: dict[Column, Floats] = self.phases["updated"]
        self.added_tokens = sum(added.values()) / len(added) if added else None
        summaries = [Summary.load(folder / SUMMARY) for _cell, folder in ordered]
        self.nothing_forgotten = summaries[0].nothing_forgotten
        self.n_unlearned = len({fact for own in summaries if own.learning for fact in own.learning.unlearned})


def _groups(path: Path, cells: Iterable[Cell]) -> dict[str, Group]:
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    groups = {
        label: Group([(cell, path / CELLS / cell.name) for cell in members]) for label, members in by_label.items()
    }
    counts = {scores.shape[-1] for group in groups.values() for own in group.phases.values() for scores in own.values()}
    if len(counts) > 1:
        raise RunError(
            f"{path / CELLS}: the cells cover different numbers of facts ({some(sorted(counts))}). Run the "
            "comparison again."
        )
    order = list(METHODS)

    def key(label: str) -> tuple[int, str, float, str, int]:
        first = groups[label].first
        return order.index(first.method), first.variant, first.coef or 0, first.budget, first.epochs

    return {label: groups[label] for label in sorted(groups, key=key)}


def _scores(folder: Path, rows: Iterable[Row]) -> Scores:
    """Return the scores of a cell; raise RunError unless each column has every fact, in the order of inputs.jsonl."""
    found: Scores = {}
    facts: dict[tuple[str, Column], list[str]] = {}
    for row in rows:
        own = found.setdefault(row.phase, {})
        for quantity, protocol in COLUMNS:
            if protocol == row.protocol and row.has(quantity):
                score = row.score(quantity)
                own.setdefault((quantity, protocol), []).append(np.nan if score is None else score)
                facts.setdefault((row.phase, (quantity, protocol)), []).append(row.fact)
    wanted = [fact.id for fact in load_rows(Input, folder / INPUTS)]
    for (phase, (quantity, protocol)), scored in facts.items():
        if scored != wanted:
            raise RunError(
                f"{folder / ROWS}: fact: the rows of phase {plain(phase)} with {quantity} ({protocol}) are of "
                f"{len(scored)} facts, expected the {len(wanted)} of inputs.jsonl in their order. {REMEDY}"
            )
    return found


def _row(group: Group, baselines: Mapping[Budget, Group], overall: Sequence[Column]) -> TableRow:
    cell, ours = group.first, _overall(group, overall)
    return TableRow(
        label=cell.label,
        method=cell.method,
        variant=cell.variant,
        coef=cell.coef,
        epochs=cell.epochs,
        budget=cell.budget,
        overall=_estimate(ours),
        scores={f"{q}.{p}": _estimate(scores) for (q, p), scores in group.scores.items()},
        forgotten=_forgotten(group),
        nothing_forgotten=group.nothing_forgotten,
        unlearned=group.n_unlearned,
        added_tokens=group.added_tokens,
        against={
            budget: Against(
                label=baseline.first.label,
                name=" ".join(filter(None, (baseline.first.method, baseline.first.variant))),
                overall=_difference(ours, _overall(baseline, overall)),
                differences={
                    f"{q}.{p}": _difference(scores, baseline.scores[q, p])
                    for (q, p), scores in group.scores.items()
                    if (q, p) in baseline.scores
                },
            )
            for budget, baseline in baselines.items()
        },
    )


def _overall_columns(groups: Iterable[Group]) -> list[Column]:
    """Return the columns that a row's overall score averages: reliability, generality, locality.

    Columns that some group lacks are left out.
    """
    scored = [{column for column, scores in group.scores.items() if np.isfinite(scores).any()} for group in groups]
    shared = set.intersection(*scored)
    protocols = {protocol for quantity, protocol in shared if quantity == "reliability"}
    if not protocols:
        return []
    return [column for column in leading_columns(protocols) if column in shared and column[0] != "residue"]


def _overall(group: Group, columns: Sequence[Column]) -> Floats:
    """Return the mean over the columns for each seed and fact; NaN if a column has no score."""
    matrices = [group.scores[column] for column in columns] or [np.full((1, 1), np.nan)]
    mean: Floats = np.mean(matrices, axis=0)
    return mean


def _forgotten(group: Group) -> Forgotten | None:
    """Return how much of the old answers the forgotten model lost (in points below the base), and its locality."""
    base, forgotten = group.phases["base"], group.phases["forgotten"]
    residue = leading_columns(protocol for _quantity, protocol in base.keys() & forgotten.keys())[-1]
    if residue not in base or residue not in forgotten:
        return None
    place = forgotten.get(("locality", "agreement"))
    return Forgotten(
        protocol=residue[1],
        lost=_difference(base[residue], forgotten[residue]),
        locality=None if place is None else _estimate(place),
    )


def _baselines(
    group: Group, groups: Iterable[Group], settings: CompareSettings, config: RunConfig
) -> dict[Budget, Group]:
    """Return the groups of plain fine-tuning that a group is compared with, by budget (equal epochs, equal steps)."""
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
    """Return the variant of plain fine-tuning whose learning settings equal the cell's; "" if there is none.

    With any other baseline, a gain from a learning setting would be credited to forgetting.
    """
    own = settings.variants.get(cell.variant, VariantSettings())
    if cell.method in PLAIN_METHODS or own.learning == VariantSettings().learning:
        return ""
    plain = METHODS[cell.method].plain
    like = (name for name, other in settings.variants.items() if plain in other.methods)
    return next((name for name in like if settings.variants[name].learning == own.learning), "")


def _estimate(scores: Floats) -> Estimate | None:
    return statistics.interval(scores) if np.isfinite(scores).any() else None


def _difference(ours: Floats, baseline: Floats) -> Difference | None:
    both = np.isfinite(ours) & np.isfinite(baseline)
    return statistics.paired_difference(ours, baseline, rng=0) if both.any() else None


def _curves(groups: Mapping[str, Group], settings: CompareSettings) -> list[EqualReliability]:
    """Return how each method and coefficient compares with plain fine-tuning at equal reliability."""
    lines: dict[tuple[str, str, float | None], list[Group]] = {}
    for group in groups.values():
        if group.first.budget == "equal-epochs" and METHODS[group.first.method].fine_tunes:
            lines.setdefault((group.first.method, group.first.variant, group.first.coef), []).append(group)
    curves = {key: _curve(members) for key, members in lines.items()}
    found = []
    for (method, variant, coef), curve in curves.items():
        against = METHODS[method].plain
        like = _learns_like(lines[method, variant, coef][0].first, settings)
        plain = curves.get((against, like, None)) if variant or method not in PLAIN_METHODS else None
        if curve is None or plain is None:
            continue
        equal = statistics.at_equal_reliability(curve, plain)
        found.append(
            EqualReliability(
                method=method,
                variant=variant,
                coef=coef,
                against=" ".join(filter(None, (against, like))),
                at_equal_reliability=equal,
                area=[statistics.mean_locality(each, equal.low, equal.high) for each in (curve, plain)]
                if equal and equal.low < equal.high
                else None,
            )
        )
    return found


def _curve(groups: Sequence[Group]) -> statistics.Curve | None:
    """Return the curve over epochs: matrices of seeds x epochs, in percent; None if a quantity was not scored."""
    reliability, generality, locality, _residue = leading_columns(
        protocol for group in groups for _quantity, protocol in group.scores
    )
    columns = reliability, locality, generality
    ordered = sorted(groups, key=lambda group: group.first.epochs)
    points = []
    for column in columns:
        if any(column not in group.scores or not np.isfinite(group.scores[column]).any() for group in ordered):
            return None
        points.append(np.array([100 * np.nanmean(group.scores[column], axis=1) for group in ordered]).T)
    return statistics.Curve(*points)
