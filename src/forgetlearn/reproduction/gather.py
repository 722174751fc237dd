"""Gather what was measured into the report: each of the paper's figures beside ours, and whether signs agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from forgetlearn.comparison.table import Group
from forgetlearn.config.methods import METHODS, MethodName
from forgetlearn.evaluation import general_ability, statistics
from forgetlearn.evaluation.statistics import Difference, Estimate, Floats
from forgetlearn.report.paper_table import (
    Curve,
    CurvePoint,
    CurveRow,
    Distance,
    DistanceRow,
    Distances,
    Measured,
    ScoreRow,
    ScoreTable,
    Seconds,
    Sign,
    TaskRow,
    TextRow,
    TimeRow,
    Verdict,
)
from forgetlearn.report.render import Column
from forgetlearn.reproduction import published
from forgetlearn.reproduction.measure import PHASES, PROMPTS, ROWS, seconds_name
from forgetlearn.reproduction.published import Like
from forgetlearn.reproduction.settings import FIGURE_KINDS, METHOD_OF_KIND, WITH_METHODS, PartName
from forgetlearn.reproduction.workspace import Workspace
from forgetlearn.storage.records import Row, TaskScore, load_rows
from forgetlearn.storage.run_folder import is_run

COLUMN: Mapping[str, Column] = {
    "reliability": ("reliability", "token"),
    "generality": ("generality", "token"),
    "locality": ("locality", "agreement"),
}
LOW, HIGH = published.COEFS[0], published.COEFS[-1]
Z = 1.96  # of a 95 % interval for the difference of two benchmark scores


def verdict_of(paper: float, ours: Measured) -> Verdict:
    """Return whether the interval of our difference lies on the paper's side of zero, on the other, or on both."""
    if ours.low is None or ours.high is None or ours.low <= 0 <= ours.high or paper == 0:
        return "open"
    return "confirmed" if (ours.mean > 0) == (paper > 0) else "contradicted"


def is_measured(part: PartName, workspaces: Sequence[Workspace]) -> bool:
    """Return True if what a part shows is there for all workspaces; of tables 1 to 3, at least one row."""
    if part in WITH_METHODS:
        return bool(workspaces and methods_in(part, workspaces))
    return bool(workspaces) and all(_has(part, workspace) for workspace in workspaces)


def _has(part: PartName, workspace: Workspace) -> bool:
    if part == "table4":
        return all(workspace.has(f"texts-{phase}") for phase in PHASES)
    return bool(_task_sets(workspace)) if part == "table5" else workspace.has(part)


def methods_in(part: PartName, workspaces: Sequence[Workspace]) -> list[MethodName]:
    """Return the methods that are measured for table 1, 2 or 3 in all workspaces, whether or not it was just now."""

    def is_done(own: Workspace, method: MethodName) -> bool:
        if part == "table3":
            edits = [number for number in published.EDITS if number <= len(own.facts)]
            return all(own.has(seconds_name(method, number)) for number in edits)
        return is_run(own.folder_of(own.data.cell(method, own.seed)))

    return [method for method in workspaces[0].data.configs if all(is_done(own, method) for own in workspaces)]


def _task_sets(workspace: Workspace) -> list[str]:
    """Return the beginnings of the names of results on tasks that are there for all three models."""
    begun = {folder.name.rpartition("-")[0] for folder in workspace.results.path.glob("tasks-*")}
    return sorted(name for name in begun if all(workspace.has(f"{name}-{phase}") for phase in PHASES))


# Tables 1 and 2 -------------------------------------------------------------------------------------------


def score_table(part: PartName, like: Like, workspaces: Sequence[Workspace]) -> tuple[ScoreTable, list[Sign]]:
    """Return the table of one data set over all seeds, and the signs of F-Learning's gains."""
    data = workspaces[0].data
    setting = published.SETTINGS[like, data.name]
    groups: dict[MethodName, Group] = {}
    for method in methods_in(part, workspaces):
        cells = [(data.cell(method, own.seed), own) for own in workspaces]
        groups[method] = Group([(cell, own.folder_of(cell)) for cell, own in cells])
    first = next(iter(groups.values()))
    rows = [_score_row(published.ORIGINAL, None, setting.scores[published.ORIGINAL], first.phases["base"])]
    rows[0].ours["locality"] = None  # agreement with itself
    for method in data.configs:
        scores = groups[method].scores if method in groups else {}
        rows.append(_score_row(method, data.cell(method, 0).coef, setting.scores[method], scores))
    table = ScoreTable(
        part=part,
        data=published.TITLES[data.name],
        facts=len(data.facts),
        paper_facts=published.FACTS[data.name],
        held=_estimate(first.phases["base"].get(("residue", "token"))),
        rows=rows,
    )
    return table, list(_gains(table, groups, setting.scores))


def _score_row(method: str, coef: float | None, paper: published.Scores, scores: Mapping[Column, Floats]) -> ScoreRow:
    ours = {quantity: _estimate(scores.get(column)) for quantity, column in COLUMN.items()}
    return ScoreRow(method=method, coef=coef, paper=paper._asdict(), ours=ours)


def _gains(
    table: ScoreTable, groups: Mapping[MethodName, Group], paper: Mapping[str, published.Scores]
) -> Iterator[Sign]:
    """Yield what each method that forgets gains over the method that learns alike without forgetting."""
    for method, group in groups.items():
        plain = METHODS[method].plain
        if not METHODS[method].forgets or plain not in groups:
            continue
        for quantity, column in COLUMN.items():
            own, other = group.scores.get(column), groups[plain].scores.get(column)
            printed, baseline = paper[method]._asdict()[quantity], paper[plain]._asdict()[quantity]
            if own is None or other is None or (difference := _difference(own, other)) is None:
                continue
            what, gain = f"{method} over {plain}: {quantity}", round(printed - baseline, 2)
            yield _sign(table.part, table.data, what, "points", gain, _measured(difference))


def _sign(part: str, data: str, what: str, unit: str, paper: float, ours: Measured) -> Sign:
    verdict = verdict_of(paper, ours)
    return Sign(part=part, data=data, what=what, unit=unit, paper=paper, ours=ours, verdict=verdict)


def _estimate(scores: Floats | None) -> Estimate | None:
    return None if scores is None or not np.isfinite(scores).any() else statistics.interval(scores)


def _difference(ours: Floats, other: Floats) -> Difference | None:
    both = np.isfinite(ours) & np.isfinite(other)
    return statistics.paired_difference(ours, other, rng=0) if both.any() else None


def _measured(estimate: Estimate) -> Measured:
    return Measured(mean=estimate.mean, low=estimate.low, high=estimate.high)


# Tables 3 to 5 --------------------------------------------------------------------------------------------


def times(workspace: Workspace) -> list[TimeRow]:
    """Return the rows of table 3, each beside full fine-tuning."""
    seconds: dict[str, dict[int, float]] = {}
    for method in methods_in("table3", [workspace]):
        names = {number: seconds_name(method, number) for number in published.EDITS if number <= len(workspace.facts)}
        rows = {number: load_rows(Seconds, _file(workspace, name))[0] for number, name in names.items()}
        seconds[method] = {number: row.seconds for number, row in rows.items()}
    paper = {method: dict(zip(published.EDITS, own, strict=True)) for method, own in published.SECONDS.items()}
    return [
        TimeRow(
            method=method,
            seconds=own,
            ratios=_ratios(own, seconds.get("ft", {})),
            paper_seconds=paper.get(method, {}),
            paper_ratios=_ratios(paper.get(method, {}), paper["ft"]),
        )
        for method, own in seconds.items()
    ]


def _ratios(own: Mapping[int, float], plain: Mapping[int, float]) -> dict[int, float]:
    return {number: seconds / plain[number] for number, seconds in own.items() if plain.get(number)}


def texts(workspace: Workspace) -> list[TextRow]:
    """Return the rows of table 4."""
    said = {phase: load_rows(Row, _file(workspace, f"texts-{phase}")) for phase in PHASES}
    answers = {
        phase: {row.fact: row.said or "" for row in rows if row.protocol == "generate"} for phase, rows in said.items()
    }
    return [
        TextRow(
            prompt=fact.prompt,
            old=fact.ground_truth or "",
            new=fact.target_new,
            said={phase: own.get(fact.id, "") for phase, own in answers.items()},
        )
        for fact in workspace.facts[:PROMPTS]
    ]


def ability(workspace: Workspace) -> tuple[list[TaskRow], list[Sign]]:
    """Return the rows of table 5, and the signs of what the update changed."""
    found: dict[str, dict[str, dict[str, TaskScore]]] = {phase: {} for phase in PHASES}
    for name in _task_sets(workspace):
        for phase, own in found.items():
            own.update(general_ability.found_in(workspace.results.path / f"{name}-{phase}").tasks)
    rows = []
    for task, metrics in found["base"].items():
        paper = dict(zip(PHASES, published.ABILITY.get(task, ()), strict=False))
        for metric in metrics:
            ours = {phase: own[task][metric] for phase, own in found.items()}
            rows.append(TaskRow(task=task, metric=metric, paper={str(p): v for p, v in paper.items()}, ours=ours))
    first = {row.task: row for row in reversed(rows)}  # a task's further metrics are not in the paper
    return rows, [_task_sign(row) for row in rows if row.paper and row is first[row.task]]


def _task_sign(row: TaskRow) -> Sign:
    before, after = row.ours["base"], row.ours["updated"]
    paper = round(row.paper["updated"] - row.paper["base"], 2)
    what = f"{row.task} ({row.metric}), updated over original"
    return _sign("table5", "ZsRE", what, "points", paper, _change(before, after))


def _change(before: TaskScore, after: TaskScore) -> Measured:
    """Return the change of a share, in points, with the interval of two independent samples."""
    mean = 100 * (after.value - before.value)
    if before.stderr is None or after.stderr is None:
        return Measured(mean=mean, low=None, high=None)
    half = 100 * Z * float(np.hypot(before.stderr, after.stderr))
    return Measured(mean=mean, low=mean - half, high=mean + half)


def _file(workspace: Workspace, name: str) -> Path:
    return workspace.results.path / name / ROWS


# Figures 4 and 5 ------------------------------------------------------------------------------------------


def distances(part: PartName, workspaces: Sequence[Workspace]) -> Distances:
    """Return the mean distance of each matrix over the seeds."""
    own = [load_rows(DistanceRow, _file(workspace, part)) for workspace in workspaces]
    matrices = [
        Distance(layer=rows[0].layer, matrix=rows[0].matrix, part=rows[0].part, ours=_over_seeds(rows))
        for rows in zip(*own, strict=True)
    ]
    kind = FIGURE_KINDS[part]
    return Distances(part=part, kind=kind, paper=dict(published.FORGETTING[kind].distances), matrices=matrices)


def _over_seeds(rows: Iterable[DistanceRow]) -> Measured:
    return _mean([row.distance for row in rows])


def _mean(values: Sequence[float]) -> Measured:
    mean, low, high = statistics.mean_of(values, [1.0] * len(values))
    return Measured(mean=mean, low=low, high=high)


def distance_signs(workspaces: Mapping[PartName, Sequence[Workspace]]) -> Iterator[Sign]:
    """Yield the signs of figures 4 and 5: the MLP moves farther, and LoRA moves its matrices less."""
    means = {part: [_mean_by_part(own, part) for own in found] for part, found in workspaces.items()}
    full, adapter = (published.FORGETTING[FIGURE_KINDS[part]].distances for part in ("figure4", "figure5"))
    if all(len(own) == 2 for own in means.get("figure4", [{}])):
        paper = _middle(full["mlp"]) - _middle(full["attention"])
        ours = _mean([own["mlp"] - own["attention"] for own in means["figure4"]])
        yield _sign("figure4", "ZsRE", "distance of the MLP's matrices over the attention's", "", round(paper, 2), ours)
    if "figure4" in means and "figure5" in means:
        pairs = list(zip(means["figure4"], means["figure5"], strict=True))
        if all("attention" in one and "attention" in two for one, two in pairs):
            paper = _middle(full["attention"]) - _middle(adapter["attention"])
            ours = _mean([one["attention"] - two["attention"] for one, two in pairs])
            what = "distance of the attention's matrices, all weights over LoRA"
            yield _sign("figure5", "ZsRE", what, "", round(paper, 2), ours)


def _mean_by_part(workspace: Workspace, part: PartName) -> dict[str, float]:
    """Return the mean distance of the matrices that moved, by part of a layer."""
    found: dict[str, list[float]] = {}
    for row in load_rows(DistanceRow, _file(workspace, part)):
        if row.distance:
            found.setdefault(row.part, []).append(row.distance)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _middle(ends: tuple[float, float]) -> float:
    return sum(ends) / 2


# Figures 6 and 7 ------------------------------------------------------------------------------------------

Scored = dict[float, dict[str, Floats]]  # coefficient -> quantity -> scores of seeds x facts


def curve(part: PartName, workspaces: Sequence[Workspace]) -> tuple[Curve, Scored]:
    """Return figure 6 or 7, and the scores that it is made from."""
    kind = FIGURE_KINDS[part]
    scored = _scored([load_rows(CurveRow, _file(workspace, part)) for workspace in workspaces])
    paper = {"reliability": published.FORGETTING[kind].reliability, "locality": published.FORGETTING[kind].locality}
    points = [
        CurvePoint(
            coef=coef,
            paper={quantity: values[coef] for quantity, values in paper.items() if coef in values},
            ours={quantity: _estimate(values) for quantity, values in own.items()},
        )
        for coef, own in scored.items()
    ]
    return Curve(part=part, kind=kind, points=points), scored


def _scored(seeds: Sequence[Sequence[CurveRow]]) -> Scored:
    coefs = dict.fromkeys(row.coef for row in seeds[0])
    return {
        coef: {
            quantity: np.array(
                [[_number(getattr(row, quantity)) for row in rows if row.coef == coef] for rows in seeds], dtype=float
            )
            for quantity in ("reliability", "locality")
        }
        for coef in coefs
    }


def _number(score: float | None) -> float:
    return np.nan if score is None else score


def curve_signs(scored: Mapping[PartName, Scored]) -> Iterator[Sign]:
    """Yield the signs of figures 6 and 7: more is forgotten with a larger coefficient, and less by LoRA."""
    paper = {part: published.FORGETTING[FIGURE_KINDS[part]] for part in scored}
    for part, own in scored.items():
        gain = paper[part].reliability[HIGH] - paper[part].reliability[LOW]
        what = f"{METHOD_OF_KIND[FIGURE_KINDS[part]]}, old answers at coefficient {HIGH:g} over {LOW:g}"
        if difference := _difference(own[HIGH]["reliability"], own[LOW]["reliability"]):
            yield _sign(part, "ZsRE", what, "points", round(gain, 2), _measured(difference))
    if len(scored) == 2:
        full, adapter = scored["figure6"][HIGH], scored["figure7"][HIGH]
        for quantity in ("reliability", "locality"):
            ends = {part: getattr(own, quantity)[HIGH] for part, own in paper.items()}
            name = "old answers" if quantity == "reliability" else "locality"
            what = f"{name} at coefficient {HIGH:g}, LoRA over all weights"
            if difference := _difference(adapter[quantity], full[quantity]):
                gain = round(ends["figure7"] - ends["figure6"], 2)
                yield _sign("figure7", "ZsRE", what, "points", gain, _measured(difference))
