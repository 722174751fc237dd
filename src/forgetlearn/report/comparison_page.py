"""The report of a comparison: a verdict, plots, and each fact's answers under every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from forgetlearn.config.methods import METHODS
from forgetlearn.evaluation import statistics
from forgetlearn.evaluation.statistics import Estimate
from forgetlearn.report import plots, render, run_page
from forgetlearn.report.plots import Panel, Point, Style
from forgetlearn.report.render import COLUMNS, leading_columns, show_difference
from forgetlearn.report.run_page import FactLine, Mark
from forgetlearn.report.table import Table, TableRow
from forgetlearn.storage import disk
from forgetlearn.storage.records import Input, Manifest, Row, Step, Summary, load_rows
from forgetlearn.storage.run_folder import INPUTS, SUMMARY

FILTERS = {
    "all": "all",
    "never": "never learned",
    "gained": "more often than plain",
    "lost": "less often than plain",
    "residue": "still old",
    "errored": "errored",
}
SIGNS = {"new": "●", "old": "△", "other": "○", "errored": "!", "not asked": "–"}
BUDGETS = {"equal-epochs": "as many epochs", "equal-steps": "the steps that forgetting costs"}
ALPHA = 0.05


class Answered(NamedTuple):
    """The state of a fact in one cell, and the text of the model's answer."""

    state: str
    said: str | None


@dataclass(frozen=True)
class CellAnswers:
    """The answers of one cell's updated model, by fact id; `judge` is the protocol that decides a fact's state."""

    folder: Path
    judge: str | None
    by_fact: Mapping[str, Answered]

    @classmethod
    def of(cls, folder: Path, rows: Iterable[Row]) -> CellAnswers:
        """Return the updated model's answers, taken from a cell's rows."""
        updated = [row for row in rows if row.phase == "updated"]
        judge = run_page.judged_by(updated)
        said = {row.fact: row.said for row in updated if row.protocol == "generate"}
        asked = {
            row.fact: Answered(run_page.state_of(row), said.get(row.fact)) for row in updated if row.protocol == judge
        }
        return cls(folder, judge, asked)


def write_pages(
    path: Path, table: Table, manifest: Manifest, cells: Mapping[str, Sequence[CellAnswers]], shared: Path
) -> None:
    """Write `compare.md` and `report.html` into a comparison's folder.

    `cells` holds the cells of each row, by label; `shared` is the folder of the work that cells share.
    """
    sentence, remarks = verdict(table)
    context = {
        **{name: getattr(table, name) for name in ("seeds", "overall", "rows", "curves")},
        "title": path.resolve().name,
        "manifest": manifest,
        "command": render.command_text(manifest.command),
        "config_yaml": run_page.as_yaml(manifest.config),
        "columns": [(q, p) for q, p in COLUMNS if any(f"{q}.{p}" in row.scores for row in table.rows)],
        "leading": leading_columns(table.protocols),
        "names": {row.label: table.name_of(row) for row in table.rows},
        "lines": {row.label: row.line for row in table.rows},
        "verdict": sentence,
        "remarks": remarks,
        "adds_tokens": any(row.added_tokens is not None for row in table.rows),
        "widest": _widest(table),
        "averaged": ", ".join(map(_words, table.overall)),
    }
    best = best_rows(table)
    chosen = {line: cells[row.label] for line, row in best.items()}
    styles = plots.styles(dict.fromkeys(row.line for row in table.rows))
    front = front_of(table)
    shown = {
        "styles": styles,
        "front": [table.name_of(row) for row in front],
        "trade_offs": [plots.plot_trade_off(*axes, styles) for axes in trade_offs(table, front)],
        "panels": [plots.plot_coefficients(panel, styles) for panel in coefficient_panels(table)],
        "panel_epochs": max(row.epochs for row in table.at_equal_epochs),
        "losses": _loss_panels(chosen, shared, styles),
        "chosen": {line: table.name_of(row) for line, row in best.items()},
        **_facts_context(chosen, {line: _plain_line(row, best) for line, row in best.items()}),
    }
    disk.write_text(path / "compare.md", render.render("compare.md.j2", context))
    disk.write_text(path / "report.html", render.render_page("compare.html.j2", {**context, **shown}))


def verdict(table: Table) -> tuple[str, list[str]]:
    """Return one sentence that sums up the comparison, and remarks on how far it can be trusted."""
    scored = [row for row in table.rows if row.overall]
    if not scored:
        return "Reliability was not scored, so no row can be called the best.", _remarks(table, None)
    best, paired = max(scored, key=lambda row: row.average), [row for row in scored if row.against]
    names = [column.split(".")[0] for column in table.overall]
    quantities = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    what = f"scores highest, {best.average:.1f} % on average of {quantities}"
    if best.against:
        return f"{table.name_of(best)} {what}: {_against(best, table)}.", _remarks(table, best)
    if not paired:
        return f"{table.name_of(best)} {what}; nothing was paired with plain fine-tuning.", _remarks(table, None)
    second = max(paired, key=lambda row: row.average)
    sentence = (
        f"Plain fine-tuning {what} ({table.name_of(best)}); the best of the others, {table.name_of(second)}, has "
        f"{second.average:.1f} %: {_against(second, table)}."
    )
    return sentence, _remarks(table, second)


def _comparisons(table: Table) -> int:
    """Return how many paired differences of the average the table holds."""
    return sum(against.overall is not None for row in table.rows for against in row.against.values())


def _against(row: TableRow, table: Table) -> str:
    """Format a row's difference from its first baseline, and say whether the difference is significant."""
    budget, against = next(iter(row.against.items()))
    difference = against.overall
    text = f"{show_difference(difference)} points against {against.name}{_budget(row, budget, ' with {}')}"
    if difference is None or difference.low is None or difference.high is None:
        return f"{text}, without an interval"
    if difference.low <= 0 <= difference.high:
        return f"{text}, an interval that includes zero, so no difference is shown"
    if difference.p_value * _comparisons(table) < ALPHA:
        return f"{text}, which holds for all comparisons made here (p times their number is below {ALPHA:g})"
    return f"{text}, an interval without zero, but not by enough for the best of many"


def _budget(row: TableRow, budget: str, form: str) -> str:
    """Return a baseline's budget in words, put into a form; "" if the row itself trains nothing."""
    return form.format(BUDGETS[budget]) if METHODS[row.method].fine_tunes else ""


def _differences(row: TableRow, table: Table) -> list[str]:
    """Return a sentence for each baseline of a row: the paired differences from it."""
    names = {each.label: table.name_of(each) for each in table.rows}
    found = []
    for budget, against in row.against.items():
        shown = [f"{c.split('.')[0]} {show_difference(against.differences.get(c))}" for c in table.overall]
        found.append(
            f"Against {names[against.label]}{_budget(row, budget, ' ({})')}, in points: "
            f"{show_difference(against.overall)}; of which {', '.join(shown)}."
        )
    return found


def _remarks(table: Table, row: TableRow | None) -> list[str]:
    count = _comparisons(table)
    remarks = _differences(row, table) if row else []
    whys = {own.sentence: own.example_line for each in table.rows if (own := each.nothing_forgotten)}
    remarks += [f"{why} ({example})" if example else why for why, example in whys.items()]
    remarks += [
        f"{table.name_of(each)}: {each.unlearned} fact{'s were' if each.unlearned > 1 else ' was'} not learned when "
        "learning ended."
        for each in table.rows
        if each.unlearned
    ]
    if count > 1:
        remarks.append(
            f"{count} comparisons with plain fine-tuning were made, and the best row was chosen on the very facts "
            "that it is scored on: expect less of it on others."
        )
    if len(table.seeds) == 1:
        remarks.append("With one seed the intervals are over facts only: they say nothing about training again.")
    remarks += [
        f"{each.method} is compared with {each.plain}, which is not among the methods here, so it has no paired "
        f"differences: add {each.plain} to --methods."
        for each in table.unpaired
    ]
    remarks.append("A comparison scores facts only. Run update with the method you choose to see what else changes.")
    return remarks


def _widest(table: Table) -> float:
    """Return the largest difference, in points, that the bars show in full; longer bars are cut off.

    It is chosen to fit the differences at equal epochs. Those at equal steps may be ten times as large.
    """
    paired = [row.against["equal-epochs"] for row in table.rows if "equal-epochs" in row.against]
    shown = [difference for against in paired for difference in (against.overall, *against.differences.values())]
    return max([1.0, *(1.5 * abs(difference.mean) for difference in shown if difference)])


def best_rows(table: Table) -> dict[str, TableRow]:
    """Return the row with the highest average for each method and variant, among the rows at equal epochs."""
    found: dict[str, TableRow] = {}
    for row in table.at_equal_epochs:
        if row.line not in found or row.average > found[row.line].average:
            found[row.line] = row
    return found


def front_of(table: Table) -> list[TableRow]:
    """Return the rows whose means lie on the Pareto front of the table's `overall` columns."""
    means = [[cell.mean for column in table.overall if (cell := row.scores.get(column))] for row in table.rows]
    whole = [place for place, own in enumerate(means) if len(own) == len(table.overall)]
    if not whole or not table.overall:
        return []
    return [table.rows[whole[place]] for place in statistics.pareto_front([means[place] for place in whole])]


def trade_offs(
    table: Table, front: Sequence[TableRow]
) -> list[tuple[str, str, dict[str, dict[str, list[Point]]], list[Point]]]:
    """Return the arguments of each trade-off plot: the names of x and y, the lines, and the points on the front.

    Locality is plotted against each other quantity. If several numbers of epochs were compared, a line connects the
    epochs of one method and coefficient; otherwise it connects the coefficients of one method.
    """
    over_epochs = len({row.epochs for row in table.at_equal_epochs}) > 1
    found = []
    places = [column for column in table.overall if column.startswith("locality")]
    for x, y in [(column, place) for place in places for column in table.overall if column != place]:
        lines: dict[str, dict[str, list[Point]]] = {}
        marked = []
        for row in table.rows:
            at, up = row.scores.get(x), row.scores.get(y)
            if at and up:
                point = Point(at.mean, up.mean, (row.epochs, row.coef or 0.0))
                tag = f"{row.coef:g}" if row.coef is not None and over_epochs else ""
                lines.setdefault(row.line, {}).setdefault(tag, []).append(point)
                marked += [point] if row in front else []
        for own in lines.values():
            for points in own.values():
                points.sort(key=lambda point: point.order)
        found.append((_words(x), _words(y), lines, marked))
    return found


def _words(column: str) -> str:
    """Return a column's name for people: `reliability (token)` for `reliability.token`."""
    quantity, protocol = column.split(".")
    return f"{quantity} ({protocol})"


def coefficient_panels(table: Table) -> list[Panel]:
    """Return the panels of scores by coefficient, for the most epochs: first after forgetting, then after learning."""
    most = max(row.epochs for row in table.at_equal_epochs)
    rows = [row for row in table.at_equal_epochs if row.epochs == most]
    forgetting = [row for row in rows if row.coef is not None]
    protocol = next((row.forgotten.protocol for row in forgetting if row.forgotten), None)
    panels = []
    if protocol:
        lost = _by_coefficient((row, row.forgotten.lost) for row in forgetting if row.forgotten)
        place = _by_coefficient((row, row.forgotten.locality) for row in forgetting if row.forgotten)
        panels.append(Panel(f"old answers lost ({protocol})", "after forgetting, points", lost, {}))
        panels.append(Panel("locality (agreement)", "after forgetting, percent", place, {}))
    for quantity, by in leading_columns(table.protocols) if forgetting else ():
        name = f"{quantity}.{by}"
        lines = _by_coefficient((row, row.scores.get(name)) for row in forgetting)
        plain = {row.line: cell for row in rows if row.coef is None and (cell := row.scores.get(name))}
        panels.append(Panel(_words(name), "after learning, percent", lines, plain))
    return [panel for panel in panels if panel.lines]


def _by_coefficient(cells: Iterable[tuple[TableRow, Estimate | None]]) -> dict[str, list[tuple[float, Estimate]]]:
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row, cell in cells:
        if cell and row.coef is not None:
            lines.setdefault(row.line, []).append((row.coef, cell))
    return {line: sorted(points, key=lambda point: point[0]) for line, points in lines.items()}


def _loss_panels(
    chosen: Mapping[str, Sequence[CellAnswers]], shared: Path, styles: Mapping[str, Style]
) -> list[Markup]:
    """Return loss plots for the first seed: fine-tuning on the old answers, by kind; learning, by method."""
    learning = {line: cells[0].folder / "logs" / "learn.jsonl" for line, cells in chosen.items()}
    old = {file.parent.name.removeprefix("old-"): file for file in sorted(shared.glob("old-*/steps.jsonl"))}
    first = {name.rsplit("-seed", 1)[0]: file for name, file in reversed(old.items())}
    panels = [("fine-tuning on the old answers", first, {}), ("learning the new answers", learning, styles)]
    return [
        plots.plot_training(title, curves, looks)
        for title, files, looks in panels
        if (curves := {name: steps for name, file in files.items() if (steps := load_rows(Step, file))})
    ]


def _facts_context(chosen: Mapping[str, Sequence[CellAnswers]], plain: Mapping[str, str | None]) -> dict[str, object]:
    """Return the template values of the table of facts: the answers of each method's best row, for every seed."""
    cells = [cell for seeds in chosen.values() for cell in seeds]
    folder = cells[0].folder  # all cells have the same facts
    answers = {line: [cell.by_fact for cell in seeds] for line, seeds in chosen.items()}
    lines = [fact_line(fact, answers, plain) for fact in load_rows(Input, folder / INPUTS)]
    counts = Summary.load(folder / SUMMARY).facts.model_copy(update={"forgotten": None})
    return {
        "facts": lines,
        "judged_by": next((cell.judge for cell in cells if cell.judge), None),
        "signs": SIGNS,
        "filters": FILTERS,
        "counts": run_page.counts((line.flags for line in lines), FILTERS),
        "account": run_page.account(counts),
    }


def _plain_line(row: TableRow, chosen: Mapping[str, TableRow]) -> str | None:
    """Return the column of plain fine-tuning that a row is compared with, or None if it is not shown."""
    against = row.against.get("equal-epochs")
    fitting = [line for line in chosen if against and against.label.startswith(f"{line}-")]
    return max(fitting, key=len, default=None)  # "ft" is also a prefix of "ft-held"


def fact_line(
    fact: Input, answers: Mapping[str, Sequence[Mapping[str, Answered]]], plain: Mapping[str, str | None]
) -> FactLine:
    """Return a fact's line: its state under each method for every seed, and the filters that show it."""
    nothing = Answered("not asked", None)
    own = {line: [by_fact.get(fact.id, nothing) for by_fact in seeds] for line, seeds in answers.items()}
    new = {line: sum(answer.state == "new" for answer in seeds) for line, seeds in own.items()}
    pairs = [(new[line], new[base]) for line, base in plain.items() if base is not None]
    states = {answer.state for seeds in own.values() for answer in seeds}
    flags = {
        "never": not sum(new.values()),
        "gained": any(ours > base for ours, base in pairs),
        "lost": any(ours < base for ours, base in pairs),
        "residue": "old" in states,
        "errored": "errored" in states,
    }
    return FactLine(
        prompt=fact.prompt,
        ground_truth_shown=run_page.shown_answer(fact.old),
        target_new_shown=run_page.shown_answer(fact.new),
        marks=[_mark(line, seeds) for line, seeds in own.items()],
        flags=[name for name, is_set in flags.items() if is_set],
    )


def _mark(line: str, answers: Sequence[Answered]) -> Mark:
    """Return the cell for one method's answers to a fact: a sign per seed, and the texts of the answers."""
    states = [answer.state for answer in answers]
    texts = "; ".join(dict.fromkeys(answer.said or "(nothing)" for answer in answers if answer.said is not None))
    count = states.count("new")
    turn = " t-new" if count == len(states) else " t-old" if "old" in states and not count else ""
    title = f"new in {count} of {len(states)}" + (f", said: {texts}" if texts else "")
    return Mark("".join(SIGNS[state] for state in states), title, turn, f"{count / len(states):.3g}", line)
