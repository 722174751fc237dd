"""The work on one data set with one seed: it starts from a base that was taught the old answers first, once for all.

Everything is kept in the workspace's folder, and nothing in it is computed twice: the taught base, the weights after
fine-tuning on the old answers and the cells of the table of scores as in a comparison, and each other part's results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from forgetlearn.comparison.cells import Cell, cell_config
from forgetlearn.comparison.grid import CELLS, SHARED, CellStore, Comparison, Shared, Worker
from forgetlearn.config.methods import METHODS, MethodName
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.facts import FactSet
from forgetlearn.method.core import old_pairs, teach
from forgetlearn.models.language_model import LanguageModel, load_model
from forgetlearn.reproduction.published import DataName
from forgetlearn.runs.pipeline import Pipeline, Store, Tuned
from forgetlearn.storage import digests, disk
from forgetlearn.storage.records import Row
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
RESULTS = "results"


@dataclass(frozen=True)
class DataSet:
    """A data set of the paper: its facts, how the base is taught their old answers, and the config of each method.

    `methods` are those to measure in tables 1 to 3.
    """

    name: DataName
    facts: FactSet
    teaching: RunConfig
    configs: Mapping[MethodName, RunConfig]
    methods: Sequence[MethodName]

    def cells(self, seed: int) -> list[Cell]:
        """Return the cells of the table of scores, in an order in which they share weights in memory."""
        return [
            self.cell(method, seed) for method in sorted(self.methods, key=lambda name: METHODS[name].forgets or "")
        ]

    def cell(self, method: MethodName, seed: int) -> Cell:
        """Return the cell of a method with this seed."""
        config = self.configs[method]
        coef = config.forget.number if METHODS[method].forgets else None
        return Cell(method, coef, config.learn.epochs, seed, "equal-epochs")


@dataclass(frozen=True)
class PaperComparison(Comparison):
    """A comparison whose methods differ in more than their coefficients."""

    configs: Mapping[MethodName, RunConfig] = field(default_factory=dict)

    def config_of(self, cell: Cell) -> RunConfig:
        """Return the config of a cell's update: its method's own."""
        return cell_config(self.configs[cell.method], cell, {})


class Workspace:
    """A data set with one seed. The model is loaded when something has to be computed, and not before."""

    def __init__(self, path: Path, data: DataSet, seed: int) -> None:
        self.data, self.seed = data, seed
        self.path = path / data.name / f"seed{seed}"
        self.results = Shared(self.path / RESULTS)
        self.facts = data.facts.facts

    def make_folders(self) -> None:
        """Create the workspace's folders."""
        for name in (SHARED, RESULTS, CELLS):
            with disk.naming(self.path):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    @cached_property
    def worker(self) -> Worker:
        """The taught base in memory, with a copy of its weights to restore it from, and what its cells share."""
        folder = Shared(self.path / SHARED).files("taught", self._teach)
        configs = {method: self._on(folder, config) for method, config in self.data.configs.items()}
        first = next(iter(configs.values()))
        comparison = PaperComparison(self.path, first, self.data.facts, self.cells, configs=configs)
        return Worker(comparison, load_model(first.model))

    @property
    def lm(self) -> LanguageModel:
        """The model in memory, which may hold any weights."""
        return self.worker.lm

    @property
    def cells(self) -> list[Cell]:
        """The cells of the table of scores."""
        return self.data.cells(self.seed)

    def folder_of(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.path / CELLS / cell.name

    def config(self, method: MethodName) -> RunConfig:
        """Return a method's config, with this workspace's seed and taught base."""
        return self.worker.comparison.config_of(self.data.cell(method, self.seed))

    def has(self, name: str) -> bool:
        """Return True if a result is there, as it was written."""
        return digests.is_whole(self.results.path / name)

    def store(self, config: RunConfig) -> CellStore:
        """Return a store that shares fine-tuned weights with the cells."""
        return CellStore(self.worker.shared, Stages(config), "")

    def _on(self, base: Path, config: RunConfig) -> RunConfig:
        model = config.model.model_copy(update={"name": str(base), "revision": None})
        return config.model_copy(update={"model": model, "seed": self.seed})

    def _teach(self, folder: Path) -> None:
        config = self.data.teaching.model_copy(update={"seed": self.seed})
        lm = load_model(config.model)
        log.info("%s, seed %d: teaching the old answers of %d facts", self.data.name, self.seed, len(self.facts))
        if stage := Stages(config).teach:
            teach(lm, old_pairs(self.facts), stage.settings, seed=stage.seed, stage_io=StageIO())
        lm.save(folder)


class Unscored(Store):
    """Scores nothing, so that an update is nothing but its training and arithmetic."""

    def __init__(self, cells: CellStore) -> None:
        super().__init__()
        self.cells = cells

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return no rows."""
        return []

    def files(self, step: str, write: Callable[[Path], None]) -> Path:
        """Return the folder of what the base was asked for, which the cells share."""
        return self.cells.files(step, write)


class SharedTuning(Unscored):
    """Takes the weights after fine-tuning on the old answers from the cells."""

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict | None:
        """Return the weights that all coefficients of one kind of stage and seed share."""
        return self.cells.tuned(tune)


def pipeline_of(workspace: Workspace, config: RunConfig, store: Store, n_facts: int | None = None) -> Pipeline:
    """Return an update of the workspace's first facts (default: all), which starts from the taught base."""
    facts = workspace.facts[:n_facts]
    return Pipeline(workspace.lm, facts, config, store, base=workspace.worker.base)


def with_coef(config: RunConfig, coef: float) -> RunConfig:
    """Return the config with another coefficient of forgetting."""
    return config.model_copy(update={"forget": config.forget.model_copy(update={"coef": coef})})
