"""Methods x coefficients x epochs x seeds on one base: shared work, cells that are done once, one table.

The base is scored once. Fine-tuning on the old facts is done once per seed and kind (all weights, LoRA) and
serves every coefficient; a forgotten model is scored once for all cells that learn from it. Each cell is a
run folder of its own, written whole; several processes may fill one folder, each cell guarded by a lock that
the system releases when its process dies.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgetlearn.config import preflight
from forgetlearn.config.base import Settings, upgraded
from forgetlearn.config.methods import METHODS, PAPER_METHODS, How, MethodName
from forgetlearn.config.schema import AUTO, Control, KeepBy, Modules, Rows, RunConfig
from forgetlearn.errors import ConfigError, some
from forgetlearn.evaluation import scoring
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.evaluation.scoring import Row
from forgetlearn.facts import Fact, FactSet, GivenFacts, as_fact_set
from forgetlearn.facts import sha256 as facts_hash
from forgetlearn.method import keeping
from forgetlearn.method.core import float32_snapshot, forget, learn, measure_keep, stage_seed
from forgetlearn.models.identity import base_of
from forgetlearn.models.language_model import LanguageModel, as_language_model, load_model
from forgetlearn.models.texts import check_texts
from forgetlearn.runs.checks import check_stages, check_weights, read_config_facts, resolve
from forgetlearn.runs.coefficient import Forgetter, forget_tuned
from forgetlearn.runs.results import Done, write_results
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk, run_folder
from forgetlearn.storage.locks import claimed
from forgetlearn.training.finetune import StageLog

log = logging.getLogger("forgetlearn")
T = TypeVar("T")
Budget = Literal["equal-epochs", "equal-steps"]
Variants = Mapping[str, "VariantSettings"]
WITH_ALL_WEIGHTS = tuple(name for name, method in METHODS.items() if method.forgets == "all weights")
NO_VARIANTS: Variants = MappingProxyType({})
CELLS, SHARED = "cells", "shared"
POLL_S = 0.5


def _above_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(value <= 0 for value in values):
        raise ValueError("a coefficient must be above 0; without forgetting the method is ft or lora")
    return values


class VariantSettings(Settings):
    """What differs in a variant; the fine-tuning on old facts is the same for all of them."""

    methods: tuple[MethodName, ...] = Field(
        (), description="Methods that it varies; unset: those of the comparison that forget with all weights."
    )
    modules: Modules = Field("all", description="As forget.modules.")
    control: Control = Field("none", description="As forget.control.")
    rows: Rows = Field("all", description="As forget.rows.")
    keep: str | None = Field(None, description="As forget.keep.")
    keep_by: KeepBy = Field("projection", description="As forget.keep_by.")
    learn_modules: Modules = Field("all", description="As learn.modules.")
    learn_rows: Rows = Field("all", description="As learn.rows.")
    coefs: tuple[float, ...] = Field((), description="Its own coefficients; unset: those of the comparison.")

    _forgets = field_validator("coefs")(_above_zero)

    @property
    def learning(self) -> dict[str, Any]:
        """What differs in the learning, by the names of `learn`."""
        return {"modules": self.learn_modules, "rows": self.learn_rows}


class CompareSettings(Settings):
    """What is compared."""

    methods: tuple[MethodName, ...] = Field(PAPER_METHODS, min_length=1, description="docs/method.md describes them.")
    coefs: tuple[float, ...] = Field((0.1, 0.3, 1.0), min_length=1, description="Coefficients of forgetting.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Whole numbers.")
    epochs: tuple[int, ...] = Field((), description="Epochs of learning; unset: those of the config.")
    budgets: tuple[Budget, ...] = Field(
        ("equal-epochs",),
        min_length=1,
        description="equal-epochs: as the paper compares; equal-steps: plain methods also get the steps of forgetting.",
    )

    variants: dict[str, VariantSettings] = Field({}, description="More rows: a name, and what differs.")

    @field_validator("coefs", mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)) and AUTO in values:
            raise ValueError(
                "auto sets facts aside that it does not score, and a table scores all rows on the same facts. "
                "Give numbers here; for auto run `forgetlearn update --coef auto`"
            )
        return values

    @field_validator("methods", "coefs", "seeds", "epochs", "budgets")
    @classmethod
    def _no_repeats(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        repeated = sorted({str(value) for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} stands there more than once")
        return values

    @field_validator("variants")
    @classmethod
    def _names_of_folders(cls, values: dict[str, VariantSettings]) -> dict[str, VariantSettings]:
        bad = [name for name in values if not re.fullmatch(r"[A-Za-z0-9_.+]+", name)]
        if bad:
            raise ValueError(f"{some(bad)}: a variant's name is made of letters, digits, '_', '.' and '+'")
        return values

    _forgets = field_validator("coefs")(_above_zero)


@dataclass(frozen=True)
class Cell:
    """One update of the comparison."""

    method: MethodName
    coef: float | None  # None: the method does not forget
    epochs: int
    seed: int
    budget: Budget
    variant: str = ""  # a name of CompareSettings.variants

    @property
    def label(self) -> str:
        """The row of the table that the cell belongs to; its seeds share it."""
        coef = "" if self.coef is None else f"-coef{self.coef:g}"
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.method}{variant}{coef}-{self.epochs}epochs" + (
            "-equal-steps" if self.budget == "equal-steps" else ""
        )

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.label}-seed{self.seed}"


def cells_of(settings: CompareSettings, config: RunConfig) -> list[Cell]:
    """All cells, ordered so that those with the same fine-tuning on old facts follow each other."""
    cells = []
    epochs = settings.epochs or (config.learn.epochs,)
    for seed, method, n_epochs in itertools.product(settings.seeds, settings.methods, epochs):
        cells += [Cell(method, coef, n_epochs, seed, "equal-epochs") for coef in _coefs(method, settings.coefs)]
        cells += [
            Cell(method, coef, n_epochs, seed, "equal-epochs", name)
            for name, variant in settings.variants.items()
            if method in (variant.methods or WITH_ALL_WEIGHTS)
            for coef in _coefs(method, variant.coefs or settings.coefs)
        ]
        in_all = n_epochs + config.forget.epochs
        if "equal-steps" in settings.budgets and method in ("ft", "lora") and in_all not in epochs:
            cells.append(Cell(method, None, in_all, seed, "equal-steps"))  # else the cell of so many epochs is that
    return sorted(cells, key=lambda cell: (cell.seed, METHODS[cell.method].forgets or "", cell.coef or 0))


def _coefs(method: MethodName, coefs: tuple[float, ...]) -> Sequence[float | None]:
    return coefs if METHODS[method].forgets else (None,)


@dataclass(frozen=True)
class Comparison:
    """What a process needs to fill cells of a comparison's folder."""

    path: Path
    config: RunConfig
    facts: FactSet
    cells: list[Cell]
    variants: Variants = field(default_factory=dict)
    keep: Mapping[str, Sequence[Fact]] = field(default_factory=dict)  # by file

    def is_done(self, cell: Cell) -> bool:
        """Whether somebody has done the cell."""
        return run_folder.is_run(self.path / CELLS / cell.name)

    def open_cells(self) -> list[Cell]:
        """The cells that nobody has done."""
        return [cell for cell in self.cells if not self.is_done(cell)]


@torch.inference_mode(False)  # and with gradients, in whatever mode it is called
def fill(
    model: LanguageModel | nn.Module | str | Path | None = None,
    facts: GivenFacts = None,
    settings: CompareSettings | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> list[Cell]:
    """All cells of the comparison, each in `output/cells/`; what is done already is not done again.

    Several processes may call this with `resume=True` on one folder; `workers` starts that many here (the
    model must then be named, since each loads its own).

    Raises:
        RunError: the folder was begun with other facts, another base or other settings.
    """
    if workers > 1:
        check_named(model, f"workers = {workers}")
    comparison, lm = begin(model, facts, settings, config, output=output, resume=resume, overwrite=overwrite)
    worker = _Worker(comparison, lm)
    with _helpers(workers - 1, comparison):
        worker.work()
    return comparison.cells


def begin(
    model: LanguageModel | nn.Module | str | Path | None,
    facts: GivenFacts,
    settings: CompareSettings | None,
    config: RunConfig | Mapping[str, Any] | None,
    *,
    output: str | Path,
    resume: bool,
    overwrite: bool,
) -> tuple[Comparison, LanguageModel]:
    """The comparison, whose folder is there now, and the base; see `fill`, which fills it."""
    settings = settings or CompareSettings()
    facts = as_fact_set(facts)
    config = resolve(config, model, facts)
    preflight.check("compare", config)
    if config.forget.coef == AUTO:
        raise ConfigError(
            "forget.coef = auto: compare scores every coefficient on all facts, and auto sets some aside to choose on. "
            "Give numbers with --coefs; for auto run `forgetlearn update`."
        )
    if config.teach.epochs or "model" in config.facts.old_from:
        raise ConfigError("compare takes a base that is taught already: teach.epochs must be 0, old_from not model.")
    check_engine(config.evaluate, changed_by="compare")
    if config.model.quantization != "none":
        raise ConfigError("model.quantization: compare sets the base's weights for every cell. Use update, or none.")
    cells = cells_of(settings, config)
    _check_rows(settings, cells)
    run_folder.check_output(output, resume=resume, overwrite=overwrite, inputs=(config.model.name, config.facts.source))
    fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config)
    named = model if model is not None else str(config.model.name)
    check_weights(named)
    lm = as_language_model(named, None, config.model)
    check_texts(lm.encoder, fact_set)
    keep: dict[str, Sequence[Fact]] = {}
    for cell in {(cell.method, cell.variant): cell for cell in cells}.values():
        own = cell_config(config, cell, settings.variants)
        _check(lm, own, cell)
        if own.forget.keep and METHODS[cell.method].forgets and own.forget.keep not in keep:
            keep[own.forget.keep] = keeping.read_keep(own.forget, fact_set)
            check_texts(lm.encoder, keep[own.forget.keep])
    in_memory = not isinstance(named, (str, Path))
    inputs = {"facts_sha256": fact_set.sha256(), **base_of(lm, in_memory=in_memory)}
    inputs |= keeping.fingerprint([fact for facts in keep.values() for fact in facts]) | lm.encoder.fingerprint()
    whole = {"run": config.model_dump(mode="json"), "compare": settings.model_dump(mode="json")}
    run = run_folder.RunFolder.create(
        output,
        whole,
        inputs,
        resume=resume,
        overwrite=overwrite,
        remove_leftovers=overwrite,
        upgraded=lambda was: {
            "run": upgraded(RunConfig, was["run"]),
            "compare": upgraded(CompareSettings, was["compare"]),
        },
    )
    return Comparison(run.path, config, fact_set, cells, settings.variants, keep), lm


def _check_rows(settings: CompareSettings, cells: Sequence[Cell]) -> None:
    """Raise ConfigError unless each cell has a folder of its own, and each variant a row for each of its methods."""
    for name, variant in settings.variants.items():
        wanted = variant.methods or WITH_ALL_WEIGHTS
        missing = [method for method in wanted if method not in settings.methods]
        if missing:
            raise ConfigError(
                f"variants.{name}: varies {some(missing)}, which is not compared here. "
                f"Add it to --methods, or name the variant's methods out of {', '.join(settings.methods)}."
            )
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{some(twice)}: more than one row of the table would have this name. Give the variant another name, or "
            "leave out the coefficient that repeats."
        )


def check_named(model: object, why: str) -> None:
    """Raise ConfigError unless processes that know its name can load the model.

    Raises:
        ConfigError: it is one in memory; `why` others are to load it.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise ConfigError(f"{why}: each loads its own model, so give a folder or a hub id.")


def help_fill(comparison: Comparison) -> None:
    """Load the model and fill the cells that no other process fills; return when all are done."""
    _Worker(comparison, load_model(comparison.config.model)).work()


@contextmanager
def _helpers(n: int, comparison: Comparison) -> Iterator[None]:
    """Start `n` more processes that fill cells of the same folder; they end when this one finishes or dies."""
    context = multiprocessing.get_context("spawn")
    n_threads = max(1, (os.cpu_count() or 1) // (n + 1))
    call = pickle.dumps((_help, (comparison, n_threads)))
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
        log.warning("%d of %d workers failed; their cells were done here", len(failed), len(helpers))


def _help(comparison: Comparison, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    help_fill(comparison)


class _Worker:
    """One process that fills cells. It holds the base's weights and the last fine-tuning on old facts."""

    def __init__(self, comparison: Comparison, lm: LanguageModel) -> None:
        self.comparison, self.lm = comparison, lm
        self.path, self.config, self.facts = comparison.path, comparison.config, comparison.facts
        self.variants = comparison.variants
        self.forgetter = Forgetter(lm)
        self._held: dict[str, tuple[str, dict[str, Tensor]]] = {}  # what `_shared_weights` gave last, by kind
        self._base_rows: list[Row] = []
        self._known: list[Fact] = []
        for folder in (CELLS, SHARED):
            with disk.naming(self.path / folder):
                (self.path / folder).mkdir(exist_ok=True)

    def work(self) -> None:
        """Fill every cell that no other process fills; return when all are done."""
        self._base_rows = self._score_base()
        self._known = scoring.held_facts(self.facts, self._base_rows, self._probe)
        while open_cells := self.comparison.open_cells():
            if not self._fill_one(open_cells):
                time.sleep(POLL_S)  # other processes have the rest; one may die and leave its cell

    def _fill_one(self, cells: Sequence[Cell]) -> bool:
        for cell in cells:
            with claimed(self.path / CELLS / f".{cell.name}.lock") as is_ours:
                if is_ours and not self.comparison.is_done(cell):
                    log.info("%s (%d cells open)", cell.name, len(cells))
                    disk.remove_unfinished(self.path / CELLS / cell.name)
                    self._fill(cell)
                    return True
        return False

    def _fill(self, cell: Cell) -> None:
        config = cell_config(self.config, cell, self.variants)
        method = METHODS[cell.method]
        rows: dict[str, list[Row]] = {"base": self._base_rows}
        self.forgetter.reset()
        to_forget = scoring.facts_to_forget(self.facts, self._known, config.forget)
        if method.forgets and to_forget:
            self._forget(config, method.forgets, to_forget)
            if config.evaluate.every_phase:
                rows["forgotten"] = self._score_forgotten(cell, config)
        stage_log = learn(self.lm, self.facts, config.learn, method.learns, seed=stage_seed(cell.seed, "learn"))
        rows["updated"] = self._score("updated", config)
        forgotten = len(to_forget) if method.forgets else None
        with disk.atomic_folder(self.path / CELLS / cell.name) as folder:
            run = run_folder.RunFolder.create(folder, config.model_dump(mode="json"), {"comparison": str(self.path)})
            (folder / "logs").mkdir()
            disk.write_rows(folder / "logs" / "learn.jsonl", stage_log.steps)
            write_results(folder, config, self.facts, rows, Done(len(self._known), forgotten))
            run.note(model=self.lm.describe())
            run.finish()

    def _forget(self, config: RunConfig, how: How, facts: Sequence[Fact]) -> None:
        """The forgotten model, from the fine-tuning on old facts that every coefficient shares."""
        if how == "ascent":  # depends on the coefficient from its first step
            forget(self.lm, facts, config.forget, how, seed=stage_seed(config.seed, "forget"))
            return
        tuned = self._tune_on_old(config, how, facts)
        kept, seed = self._kept(config, facts), stage_seed(config.seed, "forget")
        forget_tuned(self.lm, tuned, config.forget, how, seed=seed, kept=kept, facts=facts)

    def _tune_on_old(self, config: RunConfig, how: How, facts: Sequence[Fact]) -> dict[str, Tensor]:
        """Tuned weights (all, or the adapter's): from memory, from the folder, or made now, once for all processes."""
        name = f"old-{how.replace(' ', '-')}-seed{config.seed}"

        def compute() -> tuple[dict[str, Tensor], StageLog | None]:
            return self.forgetter.tune(facts, config.forget, how, seed=stage_seed(config.seed, "forget"))

        return self._shared_weights(name, compute)

    def _kept(self, config: RunConfig, facts: Sequence[Fact]) -> dict[str, Tensor] | None:
        """What is known of the facts to keep, measured once for all coefficients and modules; None without any."""
        settings = config.forget
        if not settings.keep:
            return None
        keep = self.comparison.keep[settings.keep]
        name = f"keep-{settings.keep_by}-{facts_hash(keep)[:8]}-seed{config.seed}"

        def compute() -> tuple[dict[str, Tensor], None]:
            base, seed = float32_snapshot(self.lm), stage_seed(config.seed, "forget")
            measured = measure_keep(self.lm, facts, keep, settings, base, seed=seed)
            self.forgetter.reset()
            return measured, None

        return self._shared_weights(name, compute)

    def _shared_weights(
        self, name: str, compute: Callable[[], tuple[dict[str, Tensor], StageLog | None]]
    ) -> dict[str, Tensor]:
        """Weights from memory, from the folder, or made now, once for all processes; the last of each kind stay."""

        def write(folder: Path, made: tuple[dict[str, Tensor], StageLog | None]) -> None:
            weights, stage_log = made
            save_file(weights, folder / "weights.safetensors")
            if stage_log is not None:
                disk.write_rows(folder / "steps.jsonl", stage_log.steps)

        kind = name.partition("-")[0]
        if self._held.get(kind, ("",))[0] != name:
            folder = self._shared(name, compute, write)
            self._held[kind] = (name, load_file(folder / "weights.safetensors"))
        return self._held[kind][1]

    def _score_base(self) -> list[Row]:
        return self._shared_rows(
            "base", lambda: scoring.score(self.lm, self.facts, phase="base", settings=self.config.evaluate)
        )

    def _probe(self) -> list[Row]:
        return self._shared_rows("probe", lambda: scoring.probe(self.lm, self.facts, self.config.evaluate))

    def _score_forgotten(self, cell: Cell, config: RunConfig) -> list[Row]:
        """Rows of the forgotten model: methods that forget alike share it, and all epochs of learning."""
        how = str(METHODS[cell.method].forgets).replace(" ", "-")
        name = "-".join(filter(None, ["forgotten", how, cell.variant, f"coef{cell.coef}", f"seed{cell.seed}"]))
        return self._shared_rows(name, lambda: self._score("forgotten", config))

    def _shared_rows(self, name: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Rows from the folder, or made now, once for all processes."""
        folder = self._shared(name, compute, lambda folder, rows: disk.write_rows(folder / "rows.jsonl", rows))
        return disk.read_rows(folder / "rows.jsonl")

    def _shared(self, name: str, compute: Callable[[], T], write: Callable[[Path, T], None]) -> Path:
        """A folder of what the cells share: as some process wrote it, or computed and written now."""
        folder = self.path / SHARED / name
        with claimed(self.path / SHARED / f".{name}.lock", waits=True):
            if not digests.is_whole(folder):
                disk.remove_unfinished(folder)
                made = compute()
                with disk.atomic_folder(folder) as unfinished:
                    write(unfinished, made)
                    digests.write_hashes(unfinished)
        return folder

    def _score(self, phase: str, config: RunConfig) -> list[Row]:
        reference = scoring.locality_predictions(self._base_rows)
        return scoring.score(self.lm, self.facts, phase=phase, settings=config.evaluate, reference=reference)


def cell_config(config: RunConfig, cell: Cell, variants: Variants = NO_VARIANTS) -> RunConfig:
    """The config of an update that does what the cell does."""
    forgetting: dict[str, Any] = {} if cell.coef is None else {"coef": cell.coef}
    learning: dict[str, Any] = {"epochs": cell.epochs}
    if cell.variant:
        variant = variants[cell.variant]
        forgetting |= {name: getattr(variant, name) for name in ("modules", "rows", "control", "keep", "keep_by")}
        learning |= variant.learning
    forget, learn = config.forget.model_copy(update=forgetting), config.learn.model_copy(update=learning)
    return config.model_copy(update={"method": cell.method, "seed": cell.seed, "forget": forget, "learn": learn})


def _check(lm: LanguageModel, config: RunConfig, cell: Cell) -> None:
    """What would make a cell fail, found before the first one is begun."""
    try:
        check_stages(config, lm)
    except ConfigError as error:
        raise ConfigError(f"variants.{cell.variant}: {error}" if cell.variant else str(error)) from error
