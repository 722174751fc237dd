"""Fill the cells of a comparison (methods x coefficients x epochs x seeds on one base), doing shared work once.

The base is scored once. Fine-tuning on the old answers is done once per seed and kind of stage (all weights, LoRA), for
all coefficients. A forgotten model is scored once for all cells that learn from it. Each cell is a run folder of its
own, written in one step. Several processes may fill one comparison: a lock protects each cell, and the system releases
it when its process dies.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from forgetlearn.comparison.cells import (
    Cell,
    CompareSettings,
    Variants,
    cell_config,
    cells_of,
    check_names,
    without_teaching,
)
from forgetlearn.config import preflight
from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import probes
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.facts import FactSet, GivenFacts, as_fact_set
from forgetlearn.method import keeping, lessons, moments
from forgetlearn.models.identity import identity_of
from forgetlearn.models.language_model import LanguageModel, as_language_model, load_model
from forgetlearn.models.texts import check_texts
from forgetlearn.runs.checks import (
    GivenConfig,
    GivenModel,
    check_new_answers,
    check_stages,
    check_weights,
    files_read,
    read_config_facts,
    resolve,
)
from forgetlearn.runs.pipeline import HeldBase, Pipeline, Store, Tuned
from forgetlearn.runs.results import Outcome, learning_of, write_results
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk, run_folder
from forgetlearn.storage.locks import claimed
from forgetlearn.storage.records import Row, load_rows, save_rows
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
T = TypeVar("T")
CELLS, SHARED = "cells", "shared"
POLL_S = 0.5


@dataclass(frozen=True)
class Comparison:
    """The data that a process needs to fill cells of a comparison's folder."""

    path: Path
    config: RunConfig
    facts: FactSet
    cells: list[Cell]
    variants: Variants = field(default_factory=dict)

    def config_of(self, cell: Cell) -> RunConfig:
        """Return the config of a cell's update."""
        return cell_config(self.config, cell, self.variants)

    def is_done(self, cell: Cell) -> bool:
        """Return True if the cell is done, by whichever process."""
        return run_folder.is_run(self.path / CELLS / cell.name)

    def open_cells(self) -> list[Cell]:
        """Return the cells that are not done."""
        return [cell for cell in self.cells if not self.is_done(cell)]


@torch.inference_mode(False)  # so that training works even if the caller is in inference mode
def fill(
    model: GivenModel = None,
    facts: GivenFacts = None,
    settings: CompareSettings | None = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> list[Cell]:
    """Fill all cells of a comparison, each in `output/cells/`, and return them. Cells that are already done are kept.

    Several processes may call this on one folder with `resume=True`. See `compare` for arguments and errors.
    """
    if workers > 1:
        check_named(model, f"workers = {workers}")
    comparison, lm = begin(model, facts, settings, config, output=output, resume=resume, overwrite=overwrite)
    worker = Worker(comparison, lm)
    with _helpers(workers - 1, comparison):
        worker.work()
    return comparison.cells


def begin(
    model: GivenModel,
    facts: GivenFacts,
    settings: CompareSettings | None,
    config: GivenConfig,
    *,
    output: str | Path,
    resume: bool,
    overwrite: bool,
) -> tuple[Comparison, LanguageModel]:
    """Check the input, create the comparison's folder, and return the comparison and its base model."""
    settings = settings or CompareSettings()
    facts = as_fact_set(facts)
    config = resolve(config, model, facts)
    preflight.check("compare", config)
    if (untaught := without_teaching(config)) != config:
        log.info("recipe %s, but without its teaching: compare takes the base as it is", config.recipe)
        config = untaught
    less = {"general_prompts": False, "probes": (probes.NONE,)}  # which would each double a cell's scoring
    scores = config.evaluate.model_copy(update=less)
    config = config.model_copy(update={"evaluate": scores})
    _check_settings(settings, config)
    cells = cells_of(settings, config)
    check_names(settings, cells)
    run_folder.check_output(output, resume=resume, overwrite=overwrite, inputs=files_read(config))
    fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config)
    check_new_answers(fact_set)
    keeping.check(config.keep, fact_set)
    named = model if model is not None else str(config.model.name)
    check_weights(named)
    lm = as_language_model(named, None, config.model)
    check_texts(lm.encoder, fact_set)
    lessons.note_unfinished(fact_set, config, lm.encoder)
    comparison = Comparison(Path(output), config, fact_set, cells, settings.variants)
    _check_cells(comparison, lm)
    in_memory = not isinstance(named, (str, Path))
    inputs = {"facts_sha256": fact_set.sha256(), **identity_of(lm, in_memory=in_memory), **lm.encoder.fingerprint()}
    inputs |= keeping.fingerprint(config.keep) | moments.fingerprint(config.edit)
    whole = {"run": config.model_dump(mode="json"), "compare": settings.model_dump(mode="json")}
    run_folder.RunFolder.create(output, whole, inputs, resume=resume, overwrite=overwrite, remove_leftovers=overwrite)
    return comparison, lm


def _check_settings(settings: CompareSettings, config: RunConfig) -> None:
    """Raise ConfigError for settings of an update that cannot be compared."""
    if "equal-steps" in settings.budgets and config.learn.until == "learned" and not settings.epochs:
        raise ConfigError(
            "budgets: equal-steps needs a number of epochs, and here learning ends when the facts are learned. Give "
            "--epochs, or --set learn.until=epochs."
        )
    if config.forget.coef == AUTO:
        raise ConfigError(
            "forget.coef = auto: compare scores every coefficient on all facts, and auto sets some aside to choose on. "
            "Give numbers with --coefs; for auto run `forgetlearn update`."
        )
    if config.teach.epochs or "model" in config.facts.old_from:
        raise ConfigError(
            "compare needs a base that holds its facts: set teach.epochs = 0, and do not use old_from = model."
        )
    check_engine(config.evaluate, changed_by="compare")
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization = {config.model.quantization}: compare restores the base's weights for each cell, "
            "which a 4-bit base does not allow. Run update, or set model.quantization = none."
        )


def _check_cells(comparison: Comparison, lm: LanguageModel) -> None:
    """Raise an error, before the first cell is begun, if a method or variant does not fit the model or the facts."""
    for cell in {(cell.method, cell.variant): cell for cell in comparison.cells}.values():
        try:
            check_stages(Stages(comparison.config_of(cell)), lm, comparison.facts)
        except ConfigError as error:
            raise ConfigError(f"variants.{cell.variant}: {error}" if cell.variant else str(error)) from error


def check_named(model: object, why: str) -> None:
    """Raise ConfigError, starting with `why`, if the model is in memory, so that other processes cannot load it."""
    if model is not None and not isinstance(model, (str, Path)):
        raise ConfigError(f"{why}: each loads its own model, so give a folder or a hub id.")


def help_fill(comparison: Comparison, n_threads: int | None = None) -> None:
    """Load the model and fill cells that no other process is filling; return when all cells are done."""
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    Worker(comparison, load_model(comparison.config.model)).work()


@contextmanager
def _helpers(n: int, comparison: Comparison) -> Iterator[None]:
    """Start `n` processes that fill cells of the same comparison, and wait for them at the end of the block.

    They are stopped if the block fails or this process dies.
    """
    context = multiprocessing.get_context("spawn")
    n_threads = max(1, (os.cpu_count() or 1) // (n + 1))
    call = pickle.dumps((help_fill, (comparison, n_threads)))
    helpers = [context.Process(target=processes.run_tied, args=(call,)) for _ in range(n)]
    for helper in helpers:
        helper.start()
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads if n else before)
    try:
        yield
        for helper in helpers:
            helper.join()
    finally:
        torch.set_num_threads(before)
        for helper in helpers:
            helper.terminate()
    failed = [helper.exitcode for helper in helpers if helper.exitcode]
    if failed:
        log.warning("%d of %d workers failed; this process filled their cells", len(failed), len(helpers))


class Worker:
    """Fills cells in one process. It keeps the base's weights and the latest fine-tuned weights in memory."""

    def __init__(self, comparison: Comparison, lm: LanguageModel) -> None:
        self.comparison, self.lm, self.base = comparison, lm, HeldBase(lm)
        self.shared = Shared(comparison.path / SHARED)
        for folder in (CELLS, SHARED):
            with disk.naming(comparison.path / folder):
                (comparison.path / folder).mkdir(exist_ok=True)

    def work(self) -> None:
        """Score the base and fill the cells that no other process is filling; return when all cells are done."""
        first = self.comparison.config_of(self.comparison.cells[0])
        store = CellStore(self.shared, Stages(first), "")
        Pipeline(self.lm, self.comparison.facts.facts, first, store, base=self.base).prepare()  # scores the base
        while open_cells := self.comparison.open_cells():
            if not self._fill_one(open_cells):
                time.sleep(POLL_S)  # other processes hold the rest; if one dies, its cell is free again

    def _fill_one(self, cells: Sequence[Cell]) -> bool:
        for cell in cells:
            folder = self.comparison.path / CELLS / cell.name
            with claimed(folder.with_name(f".{cell.name}.lock")) as is_ours:
                if is_ours and not self.comparison.is_done(cell):
                    log.info("%s (%d cells open)", cell.name, len(cells))
                    disk.remove_unfinished(folder)
                    self._fill(cell, folder)
                    return True
        return False

    def _fill(self, cell: Cell, path: Path) -> None:
        config = self.comparison.config_of(cell)
        store = CellStore(self.shared, Stages(config), cell.variant)
        pipeline = Pipeline(self.lm, self.comparison.facts.facts, config, store, base=self.base)
        pipeline.prepare()
        pipeline.update()
        learned = store.logs["learn"]
        assert learned is not None, "every method learns"
        forgotten = len(pipeline.to_forget) if pipeline.stages.method.forgets else None
        with disk.atomic_folder(path) as folder:
            inputs = {"comparison": str(self.comparison.path)}
            run = run_folder.RunFolder.create(folder, config.model_dump(mode="json"), inputs)
            (folder / "logs").mkdir()
            disk.write_rows(folder / "logs" / "learn.jsonl", learned.steps)
            outcome = Outcome(
                len(pipeline.known),
                forgotten,
                nothing_forgotten=pipeline.nothing_forgotten,
                taught=pipeline.taught,
                lessons=pipeline.lesson_counts,
                kept=pipeline.kept_counts,
                learning=learning_of(pipeline.facts, learned.epochs, learned.unlearned),
            )
            write_results(folder, config, self.comparison.facts, pipeline.rows, outcome)
            run.note(model=self.lm.describe())
            run.finish()


class Shared:
    """Results that several cells share, each in its own folder. The first process that needs a result computes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tuned: tuple[str, StateDict] = ("", {})  # the name and the result of the last call of `weights`
        self.of_base: dict[str, list[Row]] = {}  # the base's rows, by step

    def rows(self, name: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of this name; compute them unless another process already has."""
        folder = self._folder(name, compute, lambda folder, rows: save_rows(rows, folder / "rows.jsonl"))
        return load_rows(Row, folder / "rows.jsonl")

    def files(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return the folder of this name; write its files unless another process already has."""
        return self._folder(name, lambda: None, lambda folder, _made: write(folder))

    def weights(self, name: str, compute: Callable[[], Tuned]) -> StateDict:
        """Return the weights after fine-tuning on the old answers; compute them unless another process already has.

        The weights returned last stay in memory.
        """

        def write(folder: Path, made: Tuned) -> None:
            save_file(made[0], folder / "weights.safetensors")
            disk.write_rows(folder / "steps.jsonl", made[1].steps)

        if self.tuned[0] != name:
            self.tuned = (name, load_file(self._folder(name, compute, write) / "weights.safetensors"))
        return self.tuned[1]

    def _folder(self, name: str, compute: Callable[[], T], write: Callable[[Path, T], None]) -> Path:
        folder = self.path / name
        with claimed(self.path / f".{name}.lock", waits=True):
            if not digests.is_whole(folder):
                disk.remove_unfinished(folder)
                made = compute()
                with disk.atomic_folder(folder) as unfinished:
                    write(unfinished, made)
                    digests.write_hashes(unfinished)
        return folder


class CellStore(Store):
    """Stores the results of a cell's steps, and shares those that other cells need too."""

    def __init__(self, shared: Shared, stages: Stages, variant: str) -> None:
        super().__init__()
        self.shared, self.stages, self.variant = shared, stages, variant
        self.how = stages.forget.kind.name.replace(" ", "-") if stages.forget else ""
        self.seed = f"seed{stages.config.seed}"

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return a step's rows; rows of the base and of forgotten models are shared with other cells."""
        if step == "score_updated" and self.stages.method.in_context:
            return self.shared.rows(f"updated-{self.stages.config.method}", compute)  # the same for every seed
        if step == "score_updated":
            return compute()
        if step == "score_forgotten" and (stage := self.stages.forget):
            parts = ("forgotten", self.how, self.variant, f"coef{stage.settings.number}", self.seed)
            return self.shared.rows("-".join(filter(None, parts)), compute)
        if step not in self.shared.of_base:
            self.shared.of_base[step] = self.shared.rows(step.removeprefix("score_"), compute)
        return self.shared.of_base[step]

    def files(self, step: str, write: Callable[[Path], None]) -> Path:
        """Return the folder of what the base was asked for: all cells train on the same texts."""
        return self.shared.files(step, write)

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict | None:
        """Return the fine-tuned weights, which all coefficients and variants of one kind of stage and seed share."""
        return self.shared.weights(f"old-{self.how}-{self.seed}", lambda: tune(self.stage_io))
