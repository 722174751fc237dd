"""What each part of the reproduction measures in a workspace. What is finished is not measured again."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from forgetlearn.comparison.grid import CellStore, Shared
from forgetlearn.config.methods import MethodName
from forgetlearn.config.schema import EvaluateSettings, RunConfig, TrainSettings
from forgetlearn.config.stages import Phase, Stage
from forgetlearn.evaluation import general_ability
from forgetlearn.facts import Fact
from forgetlearn.method.kinds import fold_in
from forgetlearn.models import lora, modules
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.products.inspect import place_of
from forgetlearn.report.paper_table import CurveRow, DistanceRow, Seconds
from forgetlearn.reproduction import published
from forgetlearn.reproduction.settings import FIGURE_KINDS, METHOD_OF_KIND, PartName, same_depth
from forgetlearn.reproduction.workspace import SharedTuning, Unscored, Workspace, pipeline_of, with_coef
from forgetlearn.runs.pipeline import Pipeline, Train
from forgetlearn.storage import digests
from forgetlearn.storage.records import Record, Row, save_rows
from forgetlearn.storage.run_folder import is_run

log = logging.getLogger("forgetlearn")
PHASES: tuple[Phase, ...] = ("base", "forgotten", "updated")
PROMPTS = 5  # of table 4
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Job:
    """The parts to reproduce, the model's layers, and the tasks of table 5."""

    parts: tuple[PartName, ...]
    n_layers: int
    tasks: EvaluateSettings


def measure(workspace: Workspace, parts: tuple[PartName, ...], job: Job) -> None:
    """Measure these parts in a workspace."""
    workspace.make_folders()
    for part in parts:
        log.info("%s, seed %d: %s", workspace.data.name, workspace.seed, part)
        if part in ("table1", "table2"):
            _fill_cells(workspace)
        elif part == "table3":
            _time_edits(workspace)
        elif part in ("table4", "table5"):
            _look_at_phases(workspace, job.tasks if "table5" in parts else None)
        elif part in ("figure4", "figure5"):
            _measure_distances(workspace, part, job.n_layers)
        else:
            _score_old_answers(workspace, part)


def _fill_cells(workspace: Workspace) -> None:
    if not all(is_run(workspace.folder_of(cell)) for cell in workspace.cells):
        workspace.worker.work()


# Table 3 --------------------------------------------------------------------------------------------------


def seconds_name(method: MethodName, edits: int) -> str:
    """Return the name of the result with the seconds that a number of edits took."""
    return f"seconds-{method}-{edits}"


def _time_edits(workspace: Workspace) -> None:
    """Time the edits of each method: forgetting and learning on a model in memory, without scoring."""
    warm: set[MethodName] = set()
    for method in workspace.data.methods:
        for edits in (edits for edits in published.EDITS if edits <= len(workspace.facts)):
            name = seconds_name(method, edits)
            if workspace.has(name):
                continue
            if method not in warm:  # libraries are imported and products prepared once in each process
                _seconds(workspace, method, 1)
                warm.add(method)
            found = Seconds(method=method, edits=edits, seconds=round(_seconds(workspace, method, edits), 4))
            workspace.results.files(name, functools.partial(_save, [found]))


def _save(rows: Sequence[Record], folder: Path) -> None:
    save_rows(rows, folder / ROWS)


def _seconds(workspace: Workspace, method: MethodName, edits: int) -> float:
    config = workspace.config(method)
    pipeline = pipeline_of(workspace, config, Unscored(workspace.store(config)), edits)
    pipeline.prepare()
    pipeline.ready(lambda: None)()  # the base is restored before the clock starts
    start = _now(workspace.lm)
    pipeline.update()
    return _now(workspace.lm) - start


def _now(lm: LanguageModel) -> float:
    if lm.device.type != "cpu":
        torch.accelerator.synchronize(lm.device)
    return time.perf_counter()


# Tables 4 and 5 -------------------------------------------------------------------------------------------


def tasks_name(tasks: EvaluateSettings, phase: str) -> str:
    """Return the name of the result with the general ability on these tasks in a phase."""
    asked = [list(tasks.tasks), tasks.task_limit, tasks.task_folder]
    return f"tasks-{digests.hash_of(asked)[:12]}-{phase}"


def _look_at_phases(workspace: Workspace, tasks: EvaluateSettings | None) -> None:
    """Ask the original, the forgotten and the updated model of f-ft five prompts, and measure general ability."""
    names = [f"texts-{phase}" for phase in PHASES] + [tasks_name(tasks, phase) for phase in PHASES if tasks]
    if all(workspace.has(name) for name in names):
        return
    config = workspace.config("f-ft")
    said = config.evaluate.model_copy(update={"protocols": ("generate",)})
    config = config.model_copy(update={"evaluate": said})
    store = _Phases(workspace.store(config), workspace.results, workspace.lm, tasks)
    asked = workspace.facts[:PROMPTS]
    pipeline = Pipeline(workspace.lm, workspace.facts, config, store, base=workspace.worker.base, scored=asked)
    pipeline.prepare()
    pipeline.update()


class _Phases(SharedTuning):
    """Keeps what the model says in each phase, and its general ability there, if there are tasks."""

    def __init__(self, cells: CellStore, results: Shared, lm: LanguageModel, tasks: EvaluateSettings | None) -> None:
        super().__init__(cells)
        self.results, self.lm, self.tasks = results, lm, tasks

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a phase. Computing them also brings the phase's weights into the model."""
        phase = step.removeprefix("score_")
        if phase not in PHASES:
            return []
        rows = compute()
        self.results.rows(f"texts-{phase}", lambda: rows)
        if tasks := self.tasks:
            log.info("measuring the general ability of the %s model", phase)
            self.results.files(tasks_name(tasks, phase), lambda folder: _measure_tasks(self.lm, tasks, folder))
        return rows


def _measure_tasks(lm: LanguageModel, tasks: EvaluateSettings, folder: Path) -> None:
    general_ability.measure(lm, tasks, folder)


# Figures 4 and 5 ------------------------------------------------------------------------------------------


def _measure_distances(workspace: Workspace, part: PartName, n_layers: int) -> None:
    """Measure how far each matrix of four layers moves when the old answers are forgotten with coefficient 1."""

    def write(folder: Path) -> None:
        config = with_coef(workspace.config(METHOD_OF_KIND[FIGURE_KINDS[part]]), 1.0)
        pipeline = pipeline_of(workspace, config, SharedTuning(workspace.store(config)))
        pipeline.prepare()
        pipeline.forget()
        fold_in(workspace.lm, lora.FORGET)
        save_rows(_distances(workspace, n_layers), folder / ROWS)

    workspace.results.files(part, write)


def _distances(workspace: Workspace, n_layers: int) -> list[DistanceRow]:
    base, now = workspace.worker.base.weights, dict(workspace.lm.model.named_parameters())
    groups = modules.groups(workspace.lm.model)
    part_of = {name: part for part in ("attention", "mlp") for name in groups.get(part, ())}
    found = []
    for layer in dict.fromkeys(same_depth(number, n_layers) for number in published.DISTANCE_LAYERS):
        for name in groups.get(f"layers.{layer}", ()):
            weight = now[name].detach()
            if weight.dim() > 1 and name in part_of:
                moved = weight.float() - base[name].to(weight.device, torch.float32)
                distance = float(torch.linalg.vector_norm(moved, dtype=torch.float64))
                found.append(DistanceRow(layer=layer, matrix=place_of(name)[1], part=part_of[name], distance=distance))
    return found


# Figures 6 and 7 ------------------------------------------------------------------------------------------


def _score_old_answers(workspace: Workspace, part: PartName) -> None:
    """Score the forgotten model on the OLD answers, for each coefficient; 0 is the original model."""

    def write(folder: Path) -> None:
        config = workspace.config(METHOD_OF_KIND[FIGURE_KINDS[part]])
        found: list[CurveRow] = []
        for coef in published.COEFS:
            phases = _forget_and_score(workspace, with_coef(config, coef))
            if not found:
                found += _curve_rows(0.0, phases["base"])
            found += _curve_rows(coef, phases["forgotten"])
        save_rows(found, folder / ROWS)

    workspace.results.files(part, write)


def _forget_and_score(workspace: Workspace, config: RunConfig) -> Mapping[str, list[Row]]:
    store = _OldAnswers(workspace.store(config), workspace.results, config)
    asked = [_asked_for_old(fact) for fact in workspace.facts if fact.ground_truth]
    pipeline = Pipeline(workspace.lm, workspace.facts, config, store, base=workspace.worker.base, scored=asked)
    pipeline.prepare()
    pipeline.forget()
    return pipeline.rows


def _asked_for_old(fact: Fact) -> Fact:
    """Return a fact whose reliability is that of the OLD answer. Nothing but that and locality is scored."""
    return replace(
        fact,
        target_new=fact.ground_truth or "",
        target_new_aliases=(),
        ground_truth=None,
        ground_truth_aliases=(),
        rephrase_prompts=(),
    )


class _OldAnswers(SharedTuning):
    """Keeps the scores of each coefficient. The forgotten model is made only if it has yet to be scored."""

    def __init__(self, cells: CellStore, results: Shared, config: RunConfig) -> None:
        super().__init__(cells)
        self.results, self.coef = results, config.forget.number

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the scores on old answers before or after forgetting."""
        if step == "probe":
            return []
        if step == "score_base":
            return self.results.rows("old-answers", compute)
        return self.results.rows(f"old-answers-{self.cells.how}-coef{self.coef:g}", compute)

    def train(self, stage: Stage[TrainSettings], n_facts: int | None, compute: Train) -> Callable[[], None] | None:
        """Return a function that makes the forgotten model."""

        def forget() -> None:
            compute(self.stage_io)

        return forget


def _curve_rows(coef: float, rows: list[Row]) -> list[CurveRow]:
    reliability = {row.fact: row.reliability for row in rows if row.protocol == "token"}
    locality = {row.fact: row.locality for row in rows if row.protocol == "agreement"}
    return [
        CurveRow(coef=coef, fact=fact, reliability=score, locality=locality.get(fact))
        for fact, score in reliability.items()
    ]
