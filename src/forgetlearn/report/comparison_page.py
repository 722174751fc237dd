"""A comparison's table to pages for people: the verdict, its plots, the facts across cells.

What is shown comes from `compare.json`'s data and the cells' folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetlearn.evaluation import statistics
from forgetlearn.facts import as_written
from forgetlearn.report import plots, render, run_page
from forgetlearn.report.plots import Panel, Point, Style
from forgetlearn.report.render import COLUMNS
from forgetlearn.storage import disk, records

Row = Mapping[str, Any]  # of compare.json
Cells = Mapping[str, Sequence[Path]]  # a row's label -> its run folders, by seed
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


def write_pages(path: Path, data: Mapping[str, Any], manifest: Mapping[str, Any], cells: Cells, shared: Path) -> None:
    """`compare.md` and `report.html` of a comparison's folder."""
    context = load_context(path, data, manifest)
    disk.write_text(path / "compare.md", render.render("compare.md.j2", context))
    chosen = best_rows(data["rows"])
    styles = plots.styles(dict.fromkeys(line_of(row) for row in data["rows"]))
    front = front_of(data)
    shown = {
        "styles": styles,
        "front": [name_of(row, data["rows"]) for row in front],
        "trade_offs": [plots.plot_trade_off(*axes, styles) for axes in trade_offs(data, front)],
        "panels": [plots.plot_coefficients(panel, styles) for panel in coefficient_panels(data)],
        "panel_epochs": max(row["epochs"] for row in data["rows"] if row["budget"] == "equal-epochs"),
        "losses": _loss_panels(chosen, cells, shared, styles),
        "chosen": {line: name_of(row, data["rows"]) for line, row in chosen.items()},
        **_facts(chosen, cells),
    }
    disk.write_text(path / "report.html", render.render_page("compare.html.j2", {**context, **shown}))


def load_context(path: Path, data: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What both pages show."""
    rows = data["rows"]
    columns = [(q, p) for q, p in COLUMNS if any(f"{q}.{p}" in row["scores"] for row in rows)]
    sentence, remarks = verdict(data)
    return {
        **data,
        "title": path.resolve().name,
        "manifest": manifest,
        "command": render.command_text(manifest["command"]),
        "config_yaml": run_page.as_yaml(manifest["config"]),
        "columns": columns,
        "names": {row["label"]: name_of(row, rows) for row in rows},
        "lines": {row["label"]: line_of(row) for row in rows},
        "verdict": sentence,
        "remarks": remarks,
        "budget_words": BUDGETS,
        "widest": _widest(rows),
        "averaged": ", ".join(_words(column) for column in data["overall"]),
    }


def line_of(row: Row) -> str:
    """The method, and the variant where it is one: what has one colour, and one column among the facts."""
    return f"{row['method']} ({row['variant']})" if row.get("variant") else str(row["method"])


def name_of(row: Row, rows: Sequence[Row]) -> str:
    """A row in words; epochs are named where rows differ in them."""
    parts = [line_of(row)]
    if row["coef"] is not None:
        parts.append(f"coef {row['coef']:g}")
    if len({other["epochs"] for other in rows}) > 1:
        parts.append(f"{row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}")
    return ", ".join(parts)


def verdict(data: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The comparison in one sentence, and what must be known so as not to read too much into it."""
    rows = data["rows"]
    scored = [row for row in rows if row["overall"]]
    if not scored:
        return "Reliability was not scored, so no row can be called the best.", _remarks(data, None)
    best = max(scored, key=lambda row: float(row["overall"]["mean"]))
    what = f"scores highest, {best['overall']['mean']:.1f} % on average of {_quantities(data)}"
    if best["against"]:
        sentence = f"{name_of(best, rows)} {what}: {_against(best, data)}."
        return sentence, _remarks(data, best)
    paired = [row for row in scored if row["against"]]
    if not paired:
        return f"{name_of(best, rows)} {what}; nothing was paired with plain fine-tuning.", _remarks(data, None)
    second = max(paired, key=lambda row: float(row["overall"]["mean"]))
    sentence = (
        f"Plain fine-tuning {what} ({name_of(best, rows)}); the best of the others, {name_of(second, rows)}, has "
        f"{second['overall']['mean']:.1f} %: {_against(second, data)}."
    )
    return sentence, _remarks(data, second)


def comparisons(rows: Iterable[Row]) -> int:
    """How many paired differences of the average stand in the table."""
    return sum(1 for row in rows for against in row["against"].values() if against["overall"])


def _quantities(data: Mapping[str, Any]) -> str:
    names = [column.split(".")[0] for column in data["overall"]]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _against(row: Row, data: Mapping[str, Any]) -> str:
    """The paired difference to the first baseline, and whether it says anything."""
    budget, against = next(iter(row["against"].items()))
    difference = against["overall"]
    text = f"{show_difference(difference)} points against {against['name']} with {BUDGETS[budget]}"
    if difference is None or difference["low"] is None:
        return f"{text}, without an interval"
    if difference["low"] <= 0 <= difference["high"]:
        return f"{text}, an interval that includes zero, so no difference is shown"
    if difference["p_value"] * comparisons(data["rows"]) < ALPHA:
        return f"{text}, which stands for all comparisons made here (p times their number is below {ALPHA:g})"
    return f"{text}, an interval without zero, but not by enough for the best of many"


def _remarks(data: Mapping[str, Any], row: Row | None) -> list[str]:
    count, seeds = comparisons(data["rows"]), len(data["seeds"])
    names = {each["label"]: name_of(each, data["rows"]) for each in data["rows"]}
    remarks = []
    for budget, against in row["against"].items() if row is not None else ():
        other, own = names[against["label"]], show_difference(against["overall"])
        differences = against["differences"]
        parts = [f"{column.split('.')[0]} {show_difference(differences.get(column))}" for column in data["overall"]]
        remarks.append(f"Against {other} ({BUDGETS[budget]}), in points: {own}; of which {', '.join(parts)}.")
    if count > 1:
        remarks.append(
            f"{count} comparisons with plain fine-tuning were made, and the best row was chosen on the very facts "
            "that it is scored on: expect less of it on others."
        )
    if seeds == 1:
        remarks.append("With one seed the intervals are over facts only: they say nothing about training again.")
    remarks += [
        f"{each['method']} is compared with {each['plain']}, which is not among the methods here, so it has no paired "
        f"differences: add {each['plain']} to --methods."
        for each in data["unpaired"]
    ]
    return remarks


def show_difference(difference: Mapping[str, Any] | None) -> str:
    """`+2.1 [-0.3, +4.5]`; a dash where nothing was paired."""
    if not difference:
        return "–"
    text = f"{difference['mean']:+.1f}"
    ends = difference["low"] is not None
    return f"{text} [{difference['low']:+.1f}, {difference['high']:+.1f}]" if ends else text


def _widest(rows: Sequence[Row]) -> float:
    """Half the width, in points, of the bars that show differences: what is longer is cut off.

    After the differences at equal epochs: those at equal steps may be ten times as large.
    """
    means = [
        abs(difference["mean"])
        for row in rows
        for budget, against in row["against"].items()
        if budget == "equal-epochs"
        for difference in [against["overall"], *against["differences"].values()]
        if difference
    ]
    return float(max([1.0, *(1.5 * mean for mean in means)]))


def best_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """For each method and variant the row with the highest average, among those with the given epochs."""
    found: dict[str, Row] = {}
    for row in rows:
        line = line_of(row)
        if row["budget"] == "equal-epochs" and (line not in found or _average(row) > _average(found[line])):
            found[line] = row
    return found


def _average(row: Row) -> float:
    return float(row["overall"]["mean"]) if row["overall"] else 0.0


def front_of(data: Mapping[str, Any]) -> list[Row]:
    """Rows that no other one is better than in one of the averaged quantities and as good in the rest, by the means."""
    rows = [row for row in data["rows"] if all(row["scores"].get(column) for column in data["overall"])]
    points = [[row["scores"][column]["mean"] for column in data["overall"]] for row in rows]
    return [rows[index] for index in statistics.pareto_front(points)] if points and data["overall"] else []


def trade_offs(
    data: Mapping[str, Any], front: Sequence[Row]
) -> list[tuple[str, str, dict[str, dict[str, list[Point]]], list[Point]]]:
    """Per pair of quantities: names of x and y, lines (by method, then by coefficient), the front's points.

    With several epochs a line is a method and coefficient over epochs, without it is a method over coefficients.
    """
    over_epochs = len({row["epochs"] for row in data["rows"] if row["budget"] == "equal-epochs"}) > 1
    found = []
    places = [column for column in data["overall"] if column.startswith("locality")]
    for x, y in [(column, place) for place in places for column in data["overall"] if column != place]:
        lines: dict[str, dict[str, list[Point]]] = {}
        for row in data["rows"]:
            if row["scores"].get(x) and row["scores"].get(y):
                tag = f"{row['coef']:g}" if row["coef"] is not None and over_epochs else ""
                lines.setdefault(line_of(row), {}).setdefault(tag, []).append(_point(row, x, y))
        for own in lines.values():
            for points in own.values():
                points.sort(key=lambda point: point.order)
        marked = [_point(row, x, y) for row in front]
        found.append((_words(x), _words(y), lines, marked))
    return found


def _words(column: str) -> str:
    """`reliability.token` as a reader expects it."""
    quantity, protocol = column.split(".")
    return f"{quantity} ({protocol})"


def _point(row: Row, x: str, y: str) -> Point:
    return Point(row["scores"][x]["mean"], row["scores"][y]["mean"], (row["epochs"], row["coef"] or 0.0))


def coefficient_panels(data: Mapping[str, Any]) -> list[Panel]:
    """Against the coefficient: what forgetting alone does, and the updated models' scores, for the most epochs."""
    own = [row for row in data["rows"] if row["budget"] == "equal-epochs"]
    most = max(row["epochs"] for row in own)
    rows = [row for row in own if row["epochs"] == most]
    forgetting = [row for row in rows if row["coef"] is not None]
    after = [row for row in forgetting if row["forgotten"]]
    panels = []
    if after:
        protocol = after[0]["forgotten"]["protocol"]
        lost = _by_coefficient(after, lambda row: row["forgotten"]["lost"])
        place = _by_coefficient(after, lambda row: row["forgotten"]["locality"])
        panels.append(Panel(f"old answers lost ({protocol})", "after forgetting, points", lost, {}))
        panels.append(Panel("locality (agreement)", "after forgetting, percent", place, {}))
    for quantity, protocol in COLUMNS[:4] if forgetting else ():
        name = f"{quantity}.{protocol}"
        lines = _by_coefficient(forgetting, lambda row, name=name: row["scores"].get(name))
        plain = {line_of(row): cell for row in rows if row["coef"] is None and (cell := row["scores"].get(name))}
        panels.append(Panel(_words(name), "after learning, percent", lines, plain))
    return [panel for panel in panels if panel.lines]


def _by_coefficient(rows: Iterable[Row], cell_of: Any) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in rows:
        if cell := cell_of(row):
            lines.setdefault(line_of(row), []).append((row["coef"], cell))
    return {line: sorted(points, key=lambda point: point[0]) for line, points in lines.items()}


def _loss_panels(chosen: Mapping[str, Row], cells: Cells, shared: Path, styles: Mapping[str, Style]) -> list[Any]:
    """Loss of the first seed: of fine-tuning on the old answers, by kind, and of learning, by method."""
    learning = {line: cells[row["label"]][0] / "logs" / "learn.jsonl" for line, row in chosen.items()}
    old = {file.parent.name.removeprefix("old-"): file for file in sorted(shared.glob("old-*/steps.jsonl"))}
    first = {name.rsplit("-seed", 1)[0]: file for name, file in reversed(old.items())}
    panels = [("fine-tuning on the old answers", first, {}), ("learning the new answers", learning, styles)]
    return [
        plots.plot_training(title, {name: records.read_rows(records.Step, file) for name, file in files.items()}, looks)
        for title, files, looks in panels
        if files
    ]


def _facts(chosen: Mapping[str, Row], cells: Cells) -> dict[str, Any]:
    """The table of facts: for each method at its best row, what every seed's updated model answers."""
    some = next(iter(chosen.values()))["label"]
    inputs = records.read_rows(records.Input, cells[some][0] / "inputs.jsonl")
    answers: dict[str, list[dict[str, Mapping[str, Any]]]] = {}
    judge = None
    for line, row in chosen.items():
        for folder in cells[row["label"]]:
            scores = records.read_rows(records.Row, folder / "facts.jsonl")
            updated = [scored for scored in scores if scored["phase"] == "updated"]
            judge = judge or run_page.judged_by(updated)
            answers.setdefault(line, []).append(
                {scored["fact"]: scored for scored in updated if scored["protocol"] == judge}
            )
    plain = {line: _plain_line(row, chosen) for line, row in chosen.items()}
    facts = [fact_line(fact, answers, plain) for fact in inputs]
    summary = records.read(records.Summary, cells[some][0] / "summary.json")
    return {
        "facts": facts,
        "judged_by": judge,
        "signs": SIGNS,
        "filters": FILTERS,
        "counts": run_page.counts(facts, FILTERS),
        "account": run_page.account({**summary["facts"], "forgotten": None}),
    }


def _plain_line(row: Row, chosen: Mapping[str, Row]) -> str | None:
    """The column that a method's column is held against."""
    against = row["against"].get("equal-epochs")
    fitting = [line for line in chosen if against and against["label"].startswith(f"{line}-")]
    return max(fitting, key=len, default=None)  # "ft" begins "ft-held" too


def fact_line(
    fact: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]],
    plain: Mapping[str, str | None],
) -> dict[str, Any]:
    """A fact, its state under each method in every seed, and the flags that filters look at."""
    states: dict[str, list[str]] = {}
    marks = []
    for line, seeds in answers.items():
        rows = [by_fact.get(fact["id"]) for by_fact in seeds]
        states[line] = [run_page.state_of(row) if row else "not asked" for row in rows]
        said = [row["said"] for row in rows if row and row.get("said") is not None]
        marks.append(_mark(line, states[line], said))
    new = {line: own.count("new") for line, own in states.items()}
    pairs = [(new[line], new[base]) for line, base in plain.items() if base is not None]
    every = [state for own in states.values() for state in own]
    flags = {
        "never": not sum(new.values()),
        "gained": any(ours > base for ours, base in pairs),
        "lost": any(ours < base for ours, base in pairs),
        "residue": "old" in every,
        "errored": "errored" in every,
    }
    told = as_written(fact)
    found = [name for name, is_set in flags.items() if is_set]
    return {**told, **run_page.shown_answers(told), "marks": marks, "flags": found}


def _mark(line: str, states: Sequence[str], said: Sequence[str]) -> dict[str, str]:
    """One method's answers to a fact: a sign per seed, and in words what was said."""
    count = states.count("new")
    texts = "; ".join(dict.fromkeys(text or "(nothing)" for text in said))
    turn = " t-new" if count == len(states) else " t-old" if "old" in states and not count else ""
    return {
        "text": "".join(SIGNS[state] for state in states),
        "title": f"new in {count} of {len(states)}" + (f", said: {texts}" if texts else ""),
        "line": line,
        "turn": turn,
        "value": f"{count / len(states):.3g}",
    }
