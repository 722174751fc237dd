"""The stages of one update over its run folder, each done once: score, forget, score, learn, score, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetlearn.evaluation import general_ability, scoring
from forgetlearn.models import lora
from forgetlearn.planning import plan
from forgetlearn.products import chain, restore
from forgetlearn.report import run_page
from forgetlearn.runs import coefficient
from forgetlearn.runtime import processes, sharding
from forgetlearn.storage import disk, run_folder
from forgetlearn.weights import rounding, task_vector
from forgetlearn.config.schema import AUTO, RunConfig, TeachSettings
from forgetlearn.facts import Fact, FactSet, tell_old
from forgetlearn.training.finetune import StageLog, finetune
from forgetlearn.runs.checks import asked_answers, trains_all_weights, with_the_models_answers
from forgetlearn.config.methods import METHODS, How, Method
from forgetlearn.method.core import (
    all_weights,
    fold_in,
    forget,
    learn,
    stage_seed,
)
from forgetlearn.models.language_model import LanguageModel, load_model
from forgetlearn.runs.results import Done, write_results
from forgetlearn.evaluation.scoring import Row
from forgetlearn.training.stage_checkpoints import StageIO

log = logging.getLogger("forgetlearn")
REMEDIES = (
    "--set model.dtype=float32 (twice the size), or a method that learns with LoRA, whose adapter is not rounded, or "
    "--set model.rounding=stochastic (with a little noise)"
)
FORGOTTEN_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class UpdateResult:
    """What an update leaves: scores, rows, and where the product and the report lie."""

    output: Path
    product: Path
    summary: dict[str, Any]
    rows: list[Row]


class Stages:
    """The stages of one update over one run folder."""

    def __init__(
        self, run: run_folder.RunFolder, config: RunConfig, lm: LanguageModel, facts: FactSet, keep: Sequence[Fact]
    ) -> None:
        self.folder, self.config, self.lm, self.facts, self.keep = run, config, lm, facts, keep
        self.method: Method = METHODS[config.method]
        self.rows: dict[str, list[Row]] = {}
        self.general: dict[str, Any] = {}  # what was measured, by phase
        self.known: list[Fact] = []
        self.n_forgotten = 0
        self.choice: coefficient.Choice | None = None
        in_memory = not run.manifest["inputs"].get("base_sha256")  # then nothing has the base's weights by this name
        self.base_name = f"a {type(lm.model).__name__} in memory" if in_memory else lm.name
        # Weights of a stage that was done before a kill are loaded only when a later stage needs them.
        self._pending: Callable[[], None] | None = None

    def run(self) -> UpdateResult:
        """Everything, or what of it is not done."""
        self._use_old_answers()
        self._teach()
        self._score("base")
        self._measure("base")
        self.known = scoring.held_facts(self.facts, self.rows["base"], self._probe)
        if self._forgets():
            if self.config.forget.coef == AUTO:
                self._choose_coefficient()
            self.n_forgotten = len(self._forget_set())
            self._forget()
            if self.config.evaluate.every_phase:
                self._score("forgotten")
        self._learn()
        self._score("updated")
        self._measure("updated")
        return self._finish()

    def _use_old_answers(self) -> None:
        """Policy `model`: what the model itself says is what it holds."""
        if self.facts.to_ask:
            if not self.folder.is_done("old_answers"):
                keep_old_answers(self.folder, asked_answers(self.lm, self.facts, self.config))
            rows = disk.read_rows(self.folder.path / "stages/old_answers/rows.jsonl")
            self.facts = with_the_models_answers(self.facts, rows, self.config)
        self.folder.note(old_answers={**self.facts.old_counts, **self.facts.without_old})
        if self.method.forgets:
            for line in tell_old(self.facts.old_counts, self.facts.without_old):
                log.info(line)

    def _teach(self) -> None:
        settings = self.config.teach
        if settings.epochs == 0:
            return
        taught = self.folder.path / "taught"

        def compute(folder: Path) -> dict[str, Any]:
            stage_log = teach(
                self.lm, list(self.facts), settings, seed=self._seed("teach"), stage_io=self._stage_io("teach")
            )
            self.lm.save(folder)
            return self._log_stage("teach", stage_log)

        if self.folder.is_done("teach"):
            self._pending = lambda: self._load_named(taught)
        self.folder.do("teach", compute, folder="taught")
        self.base_name = str(taught.resolve())

    def _probe(self) -> list[Row]:
        """What the base says to each prompt."""

        def compute(folder: Path) -> None:
            self._restore()
            disk.write_rows(folder / "rows.jsonl", scoring.probe(self.lm, self.facts, self.config.evaluate))

        self.folder.do("probe", compute)
        return disk.read_rows(self.folder.path / "stages/probe/rows.jsonl")

    def _choose_coefficient(self) -> None:
        def compute(folder: Path) -> dict[str, Any]:
            self._restore()
            facts, stage_io = list(self.facts), self._stage_io("coefficient")
            choice, stage_log = coefficient.choose(
                self.lm, facts, self._forget_set(), self.rows["base"], self.config, folder, stage_io
            )
            return {"coef": choice.coef, "why": choice.why, **self._log_stage("forget", stage_log)}

        self.folder.do("coefficient", compute)
        self.choice = coefficient.read_choice(self._chosen)
        log.info(self.choice.why)

    @property
    def _chosen(self) -> Path:
        """Where the choice of the coefficient and the weights that it was made with are."""
        return self.folder.path / "stages/coefficient"

    def _forgets(self) -> bool:
        if not self.method.forgets or self.config.forget.coef == 0:
            return False
        if not self._forget_set():
            log.warning("The model gives none of the old answers, so there is nothing to forget; it only learns.")
            return False
        return True

    def _forget_set(self) -> list[Fact]:
        return scoring.facts_to_forget(self.facts, self.known, self.config.forget)

    def _forget(self) -> None:
        how = self.method.forgets
        assert how is not None, "_forgets() was asked first"
        folder = self.folder.path / "stages/forget"

        def compute(unfinished: Path) -> dict[str, Any]:
            self._restore()
            facts, settings = self._forget_set(), self.config.forget
            log.info("forgetting %d facts (%s)", len(facts), how)
            noted: dict[str, Any] = {"facts": len(facts)}
            if self.choice is not None:
                coefficient.forget_as_chosen(self.lm, self._chosen, self.config)
            else:
                stage_log = forget(
                    self.lm,
                    facts,
                    settings,
                    how,
                    seed=self._seed("forget"),
                    keep=self.keep,
                    stage_io=self._stage_io("forget"),
                )
                noted |= self._log_stage("forget", stage_log)
            self._save_forgotten(unfinished, how)
            return noted

        if self.folder.is_done("forget"):
            self._pending = self._after(self._pending, lambda: self._load_forgotten(folder, how))
        self.folder.do("forget", compute)

    def _save_forgotten(self, folder: Path, how: How) -> None:
        """The state between the stages, to the last bit (float32)."""
        if how == "lora":
            lora.save(self.lm.model, lora.FORGET, folder, self.base_name)
        else:
            sharding.save_parts(sharding.parts(self.lm.model), self.lm.model, folder / FORGOTTEN_WEIGHTS)

    def _load_forgotten(self, folder: Path, how: How) -> None:
        if how == "lora":
            self.lm.model = lora.load(self.lm.model, folder, lora.FORGET, device=self.lm.device)
        else:
            self.lm.to_float32()
            task_vector.load_into(self.lm.model, sharding.load_parts(self.lm.model, folder / FORGOTTEN_WEIGHTS))

    @property
    def product(self) -> Path:
        """Where the updated model or adapter is written."""
        return self.folder.path / ("adapter" if self.method.learns == "lora" else "model")

    def _learn(self) -> None:
        def compute(folder: Path) -> dict[str, Any]:
            self._restore()
            stage_log = coefficient.learn_as_chosen(self.lm, self._chosen, self.config) if self.choice else None
            if stage_log is None:
                log.info("learning %d facts (%s)", len(self.facts), self.method.learns)
                stage_log = learn(
                    self.lm,
                    list(self.facts),
                    self.config.learn,
                    self.method.learns,
                    seed=self._seed("learn"),
                    stage_io=self._stage_io("learn"),
                )
            if self.method.learns == "lora":
                lora.save(self.lm.model, lora.PRODUCT, folder, self._base_for_adapter())
                if processes.is_main():
                    self.lm.tokenizer.save_pretrained(folder)
            else:
                self.lm.save(folder)
            return {"facts": len(self.facts), **self._log_stage("learn", stage_log)}

        if self.folder.is_done("learn"):
            self._pending = self._load_product
        self.folder.do("learn", compute, folder=self.product.name)

    def _load_product(self) -> None:
        """The product, as anybody would load it."""
        if self.method.learns == "lora":
            if self.config.teach.epochs:
                self._load_named(self.folder.path / "taught")
            self.lm.model = lora.load(self.lm.model, self.product, lora.PRODUCT, device=self.lm.device)
        else:
            self._load_named(self.product)

    def _load_named(self, folder: Path) -> None:
        self.lm.model = nn.Identity()  # so that the base is not held beside what replaces it
        settings = self.lm.settings.model_copy(update={"name": str(folder)})
        self.lm.model = load_model(settings, all_weights=trains_all_weights(self.config)).model

    def _base_for_adapter(self) -> str:
        """What the adapter's config names as its base: the hub id if the user gave one."""
        if self.config.teach.epochs == 0 and self.config.model.base_model_id:
            return self.config.model.base_model_id
        folder = Path(self.base_name)
        return str(folder.resolve()) if folder.is_dir() else self.base_name

    def _score(self, phase: str) -> None:
        stage = f"score_{phase}"

        def compute(folder: Path) -> None:
            self._restore()
            log.info("scoring the %s model", phase)
            reference = scoring.locality_predictions(self.rows["base"]) if phase != "base" else None
            rows = scoring.score(self.lm, self.facts, phase=phase, settings=self.config.evaluate, reference=reference)
            disk.write_rows(folder / "rows.jsonl", rows)

        self.folder.do(stage, compute)
        self.rows[phase] = disk.read_rows(self.folder.path / "stages" / stage / "rows.jsonl")

    def _measure(self, phase: str) -> None:
        """General ability, where it is asked for."""
        if not general_ability.asked(self.config.evaluate):
            return
        folder = self.folder.path / f"stages/general_{phase}"
        before = self.folder.path / "stages/general_base" if phase != "base" else None

        def compute(unfinished: Path) -> None:
            self._restore()
            log.info("measuring the general ability of the %s model", phase)
            general_ability.measure(self.lm, self.config.evaluate, unfinished, before)

        self.folder.do(f"general_{phase}", compute)
        self.general[phase] = general_ability.found_in(folder)

    def _restore(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, None
            pending()

    @staticmethod
    def _after(first: Callable[[], None] | None, then: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            if first:
                first()
            then()

        return both

    def _seed(self, stage: str) -> int:
        return stage_seed(self.config.seed, stage)

    def _stage_io(self, stage: str) -> StageIO:
        """What goes on beside the fine-tuning of a stage."""
        config, logs = self.config, self.folder.path / "logs"
        return StageIO(stage, self.folder.points(stage), config.checkpoint_minutes, config.report_to, logs / "trackers")

    def _log_stage(self, stage: str, stage_log: StageLog) -> dict[str, Any]:
        """Every step's numbers to the run folder; the gist for the manifest."""
        logs = self.folder.path / "logs"
        (logs / "seconds").mkdir(parents=True, exist_ok=True)
        disk.write_rows(logs / f"{stage}.jsonl", stage_log.steps)
        times = [{"step": step, "seconds": seconds} for step, seconds in enumerate(stage_log.seconds, 1)]
        disk.write_rows(logs / "seconds" / f"{stage}.jsonl", times)
        gist = {"steps": len(stage_log.steps), "final_loss": stage_log.final_loss, **stage_log.how()}
        return gist | _say_rounding(stage_log.rounding)

    def _finish(self) -> UpdateResult:
        path = self.folder.path
        products = [self.product]
        if self.config.save_merged and self.method.learns == "lora":
            self._merge()
            products.append(path / "merged")
        done = Done(
            known=len(self.known) if any(fact.ground_truth for fact in self.facts) else None,
            forgotten=self.n_forgotten if self.method.forgets else None,
            product=self.product.name,
            choice=self.choice,
            rounding=self.folder.noted("learn", "rounding") or self.folder.noted("merge", "rounding"),
        )
        summary = processes.on_main(lambda: self._write(products, done))
        if self.method.learns != "lora":
            self.lm.now_in(self.product)
        return UpdateResult(path, self.product, summary, disk.read_rows(path / "facts.jsonl"))

    def _write(self, products: list[Path], done: Done) -> dict[str, Any]:
        """The summary, after everything has been written that is made from the scores and the products."""
        path = self.folder.path
        summary = write_results(path, self.config, self.facts, self.rows, done, self.general)
        context = run_page.load_context(path)
        for product in products:
            run_page.write_card(product, context)
        chain.carry_on(self.folder, products, self.facts)
        if self.config.keep_change and self.method.learns != "lora":
            self.folder.do("change", lambda f: restore.keep_change(self.folder, self.product, f), restore.CHANGE)
        run_page.write_run(path, {**context, "manifest": self.folder.manifest})  # last, as it tells of all stages
        self.folder.finish()
        log.info(plan.took(self.folder.manifest, self.lm.device))
        if not self.config.keep_stages:  # after the end, since a killed run needs them to go on
            self.folder.remove_stage_weights()
        return summary

    def _merge(self) -> None:
        """The adapter folded into the base's weights, beside it."""

        def compute(folder: Path) -> dict[str, Any]:
            self._restore()
            fold_in(self.lm, lora.PRODUCT)
            told = self.lm.to_own_dtypes(self._seed("learn"))
            self.lm.save(folder)
            return _say_rounding(told)

        self.folder.do("merge", compute, folder="merged")


def keep_old_answers(run: run_folder.RunFolder, rows: list[Row]) -> None:
    """What the base said before anything was changed, as a stage of its own."""
    run.do("old_answers", lambda folder: disk.write_rows(folder / "rows.jsonl", rows))


def teach(
    lm: LanguageModel, facts: list[Fact], settings: TeachSettings, *, seed: int, stage_io: StageIO | None = None
) -> StageLog:
    """Fine-tune all weights on the old answers, so that the base really holds them; `lm` is changed in place."""
    texts = [lm.encoder.encode(fact.prompt, fact.ground_truth or "", end=True) for fact in facts if fact.ground_truth]
    all_weights(lm)
    stage_io = replace(stage_io or StageIO(), name="teaching")
    stage_log = finetune(lm.model, texts, settings, seed=seed, pad_id=lm.pad_id, device=lm.device, stage_io=stage_io)
    lm.to_own_dtypes(seed)
    return stage_log


def _say_rounding(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """What rounding the product left, for the manifest; said in the log, with what to do where it is little."""
    if told is None:
        return {}
    log.info("%s", rounding.in_words(told))
    if warning := rounding.warning(told, REMEDIES):
        log.warning("%s", warning)
    return {"rounding": dict(told)}
