"""Forget facts or texts without learning anything in their place, and test how well: one run over its run folder.

It is an update (`runs.update`) that stops after forgetting. What is added are tests: ROUGE-L and probability of the
answers, facts that should stay, TOFU's truth ratio, and a relearning probe.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch

from forgetlearn.config import preflight
from forgetlearn.config.recipes import FORGET
from forgetlearn.config.schema import AUTO, ForgetSettings, RunConfig
from forgetlearn.config.stages import Stage
from forgetlearn.errors import ConfigError, FactError, ModelError, some
from forgetlearn.evaluation import forgetting, scoring
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import Fact, FactSet, GivenFacts, as_fact_set, only_old, read_facts, sha256
from forgetlearn.facts.documents import READER, joint
from forgetlearn.facts.files import SUFFIXES, is_hub_id
from forgetlearn.facts.variants import FIELDS, WRONG, Variants, read_variants
from forgetlearn.method import keeping
from forgetlearn.method.kinds import Lesson, Lessons, fold_in
from forgetlearn.method.relearning import halves, relearn
from forgetlearn.models import lora
from forgetlearn.models.encoding import Passage, UnspacedPassage
from forgetlearn.models.language_model import LanguageModel, as_language_model
from forgetlearn.models.loading import adapter_base, read_outline
from forgetlearn.runs.base import of_run
from forgetlearn.runs.checks import GivenConfig, GivenModel, resolve
from forgetlearn.runs.pipeline import Pipeline
from forgetlearn.runs.retention import Past
from forgetlearn.runs.run_store import RunStore
from forgetlearn.runs.update import Task, UpdateResult, carry_out
from forgetlearn.storage import digests
from forgetlearn.storage.records import (
    Forgetting,
    KeptFacts,
    Relearning,
    Row,
    TruthRatio,
    TruthRow,
    load_rows,
    save_rows,
)
from forgetlearn.storage.run_folder import KEPT_FACTS, TRUTH, RunFolder
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
QUESTIONS = "question-answer"  # the form of facts that may bring variants of its answers
RELEARNED = "relearning.jsonl"


@torch.inference_mode(False)  # so that it trains even if the caller is in inference mode
def forget_facts(
    model: GivenModel = None,
    facts: GivenFacts = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    reference: LanguageModel | str | Path | None = None,
    tokenizer: object = None,
    resume: bool = False,
    overwrite: bool = False,
) -> UpdateResult:
    """Make a model forget facts, or the texts of `read_documents`, test it, and write a run folder.

    What is forgotten of a fact is its old answer, or its only answer. Settings that `config` leaves out are those of
    the recipe `forget`. Of a file of facts in `keep.source`, the answers to one half of the prompts are trained on, and
    the other half is scored. `reference` is a model that never knew the facts. A model in memory is changed in place.

    Raises:
        ForgetLearnError: the input is wrong. Nothing has been written yet.
        FactError: with forget.only_known, the model says none of the answers.
    """
    given = as_fact_set(facts, to_forget=True)
    if not isinstance(config, RunConfig):
        config = {"recipe": FORGET, **(config or {})}
    config = of_run(resolve(config, model, given))
    preflight.check("forget", config)
    task = ForgetTask(reference)
    return carry_out(task, model, given, config, output=output, tokenizer=tokenizer, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class Kept:
    """The facts of keep.source: the answers to `trained` are trained on, those to `scored` are only scored."""

    source: str = ""
    trained: tuple[Fact, ...] = ()
    scored: tuple[Fact, ...] = ()
    variants: Mapping[str, Variants] = field(default_factory=dict)

    @classmethod
    def read(cls, config: RunConfig) -> Kept:
        """Read and divide the facts at random, by the seed; a text file of prompts has none.

        A fact that another one asks too, as a prompt or rephrasing, is not trained on if the other is scored.
        """
        source = config.keep.source
        if not source or Path(source).suffix.lower() not in SUFFIXES:
            if source and not config.keep.weight:
                log.warning("keep.source = %s has no effect: keep.weight is 0, and only facts can be scored", source)
            return cls()
        found = read_facts(source, purpose="forget")
        shuffled = Random(config.seed).sample(found.facts, len(found))
        middle = (len(shuffled) + 1) // 2 if config.keep.weight else 0
        trained, apart = shuffled[:middle], shuffled[middle:]
        while same := keeping.changed(keeping.wordings_of(trained), apart):
            apart += [fact for fact in trained if fact.prompt in same]
            trained = [fact for fact in trained if fact.prompt not in same]
        if not apart:
            log.warning("keep.source = %s: its only fact is trained on, so no fact that should stay is scored", source)
        return cls(str(source), tuple(trained), tuple(map(as_kept, apart)), _variants(found))


def as_forgotten(fact: Fact, *, is_passage: bool = False) -> Fact:
    """Return a fact as `only_old` does; raise FactError if it has no answer."""
    if not fact.old_answers and not fact.new_answers:
        raise FactError(f"{fact.place}: has no answer to forget (prompt {fact.prompt[:60]!r}). Give ground_truth.")
    fact = only_old(fact)
    if not is_passage:
        return fact
    passage = Passage if joint(fact.prompt, fact.old_answers[0]) else UnspacedPassage
    return replace(fact, prompt=passage(fact.prompt))


def as_kept(fact: Fact) -> Fact:
    """Return a fact whose old answer, or else its only one, is to be said as before; it is scored like a new answer."""
    answers = fact.old_answers or fact.new_answers
    return replace(
        fact,
        ground_truth=None,
        ground_truth_aliases=(),
        target_new=answers[0],
        target_new_aliases=answers[1:],
        locality=(),
    )


def _variants(facts: FactSet) -> dict[str, Variants]:
    """Return the variants that the source of facts brings; none if the facts were made of records in memory."""
    is_source = facts.reader == QUESTIONS and (is_hub_id(facts.source) or Path(facts.source).exists())
    return read_variants(facts.source) if is_source else {}


class ForgetTask(Task):
    """Forgetting as a task of `runs.update`."""

    name = "forget"

    def __init__(self, reference: LanguageModel | str | Path | None) -> None:
        super().__init__()
        named = reference if isinstance(reference, (str, Path)) else None
        self.reference, self.kept = reference, Kept()
        self.variants: Mapping[str, Variants] = {}  # of the facts' answers, by prompt
        self.reads = (named,)
        place = Path(named) if named is not None else None
        digest = digests.sha256_of(place) if place is not None and place.exists() else None
        name = reference.name if isinstance(reference, LanguageModel) else named
        self.inputs = {"reference": None if name is None else str(name), "reference_sha256": digest}

    def check(self, config: RunConfig) -> None:
        """Read the facts to keep; raise ConfigError if the coefficient is to be searched for."""
        if config.forget.coef == AUTO or config.forget.coef == 0:
            raise ConfigError(
                f"forget.coef = {config.forget.coef}: forget needs a number above 0. An update searches for one "
                "(auto), by what it then learns."
            )
        try:
            self.kept = Kept.read(config)
        except FactError as error:
            raise ConfigError(f"keep.source = {config.keep.source}: {error}") from None
        kept = sha256(self.kept.scored) if self.kept.scored else None
        self.inputs = {**self.inputs, "kept_facts_sha256": kept}

    def check_loaded(self, lm: LanguageModel, facts: FactSet, config: RunConfig) -> None:
        """Raise an error if facts to keep are to be forgotten, or the reference cannot be compared."""
        if both := keeping.changed(keeping.wordings_of(self.kept.scored), facts):
            raise ConfigError(
                f"keep.source = {config.keep.source}: {len(both)} facts ask what is to be forgotten: "
                f"{some(list(both.values()))}. Remove them from one of the files."
            )
        if self.reference is not None:
            self._check_reference(lm, config)

    def _check_reference(self, lm: LanguageModel, config: RunConfig) -> None:
        """Raise an error if the reference has another vocabulary, or if nothing would be compared with it."""
        if not config.unlearn.relearn_steps and not self.variants:
            raise ConfigError(
                f"--reference {self.inputs['reference']}: nothing would be compared with it. The facts have no "
                f"{WRONG}, which the truth ratio needs, and unlearn.relearn_steps is 0."
            )
        if isinstance(self.reference, LanguageModel):
            tokenizer = self.reference.tokenizer
        else:
            settings = config.model.model_copy(update={"name": str(self.reference), "revision": None})
            under = adapter_base(settings)  # an adapter's tokenizer is its base's
            tokenizer = read_outline(settings.model_copy(update={"name": under or settings.name}))[1]
        if tokenizer is not None and tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise ModelError(
                f"--reference {self.inputs['reference']}: has another vocabulary than {lm.name}, so their answers "
                "cannot be compared. Give a model of the same kind."
            )

    def taken(self, facts: FactSet) -> FactSet:
        """Read variants of the facts' answers, if their file brings some; return the facts as read."""
        self.variants = _variants(facts)
        if not self.variants:
            return facts
        ignored = {name: count for name, count in facts.ignored_fields.items() if name not in FIELDS}
        return replace(facts, ignored_fields=ignored)

    def asked(self, facts: FactSet) -> FactSet:
        """Return the facts with the answer to forget as their old and only one."""
        is_passage = facts.reader == READER
        return replace(facts, facts=tuple(as_forgotten(fact, is_passage=is_passage) for fact in facts))

    def pipeline(
        self, lm: LanguageModel, facts: FactSet, config: RunConfig, store: RunStore, past: Past
    ) -> ForgetPipeline:
        """Return the pipeline that forgets and tests."""
        return ForgetPipeline(lm, facts, config, store, self, past)

    def result(self, pipeline: Pipeline, run: RunFolder) -> Forgetting:
        """Write the rows of the facts to keep, and the truth ratios; return what they come to."""
        assert isinstance(pipeline, ForgetPipeline), "see `pipeline`"
        if kept := [row for own in pipeline.kept_rows.values() for row in own]:
            save_rows(kept, run.path / KEPT_FACTS)
        if truth := [row for own in pipeline.truth.values() for row in own]:
            save_rows(truth, run.path / TRUTH)
        stage = run.manifest.stages["forget"]
        return Forgetting(
            epochs=stage.epochs if pipeline.stages.last.kind.until_gone else None,
            not_gone=len(stage.unlearned) if pipeline.stages.last.kind.until_gone else None,
            kept=pipeline.kept_facts() if kept else None,
            truth=pipeline.truth_ratios(),
            reference=self.inputs["reference"],
            relearning=pipeline.relearned,
        )


class ForgetPipeline(Pipeline):
    """Forgets, and tests the base and the product. Its tests fill `kept_rows`, `truth` (by phase) and `relearned`."""

    def __init__(
        self,
        lm: LanguageModel,
        facts: FactSet,
        config: RunConfig,
        store: RunStore,
        task: ForgetTask,
        past: Past,
    ) -> None:
        super().__init__(lm, facts.facts, config, store, past=past)
        self.kept, self.variants, self.reference = task.kept, task.variants, task.reference
        self.held_apart = frozenset(prompt for fact in self.kept.scored for prompt in fact.prompts)
        self.kept_rows: dict[str, list[Row]] = {}
        self.truth: dict[str, list[TruthRow]] = {}
        self.relearned: list[Relearning] = []

    def prepare(self) -> None:
        """Score and test the base, and ask it what to train on."""
        super().prepare()
        self._test("base")

    def update(self) -> None:
        """Forget, and score and test the result, which is the product."""
        if not self.to_forget:
            raise FactError(
                f"forget.only_known: the model says none of the {len(self.facts)} answers when it is asked, so nothing "
                "would be forgotten. Set it to false to forget them all the same."
            )
        self.forget()
        self._measure("forgotten")
        self._ask_earlier()
        self._probe("forgotten")
        self._test("forgotten")
        if self.config.unlearn.relearn_steps:
            step = self.store.files("relearning", self.ready(self._relearn))
            self.relearned += load_rows(Relearning, step / RELEARNED)
        if self.reference is not None:
            step = self.store.files("reference", self._read_reference)
            self.truth["reference"] = load_rows(TruthRow, step / TRUTH)
            self.relearned += load_rows(Relearning, step / RELEARNED)

    def _forget(
        self, stage: Stage[ForgetSettings], facts: Sequence[Fact], tuned: StateDict | None, stage_io: StageIO
    ) -> StageLog | None:
        stage_log = super()._forget(stage, facts, tuned, stage_io)
        if stage_log and stage.kind.until_gone:
            log.info(
                "forgetting ended after %d of at most %d epochs, with %d of %d answers still likely",
                stage_log.epochs,
                self.config.unlearn.max_epochs,
                len(stage_log.unlearned),
                len(facts),
            )
        return stage_log

    def _probe(self, phase: str) -> None:
        """Ask about facts in other ways; the windows of a text are no facts."""
        if not any(isinstance(fact.prompt, Passage) for fact in self.scored):
            super()._probe(phase)

    def _test(self, phase: str) -> None:
        """Test the model in this phase: what is left of the answers, and what became of the facts to keep."""

        def write(folder: Path) -> None:
            log.info("testing the %s model", phase)
            scorer, evaluate = Scorer(self.lm, self.config.evaluate, phase), self.config.evaluate
            graded = forgetting.graded_rows(scorer, self.scored, self.rows[phase], phase, kept=False)
            save_rows(graded, folder / "graded.jsonl")
            rows = scoring.score(self.lm, self.kept.scored, phase=phase, settings=evaluate) if self.kept.scored else []
            rows += forgetting.graded_rows(scorer, self.kept.scored, rows, phase, kept=True)
            for truth in forgetting.truth_rows(scorer, self.kept.scored, self.kept.variants, phase):
                share = forgetting.truthfulness(truth.ratio)
                rows.append(Row(fact=truth.fact, phase=phase, protocol=forgetting.TRUTH, errors={}, reliability=share))
            save_rows([row for row in rows if row.protocol not in ("agreement", "accuracy")], folder / KEPT_FACTS)
            save_rows(forgetting.truth_rows(scorer, self.scored, self.variants, phase), folder / TRUTH)

        folder = self.store.files(f"test_{phase}", self.ready(write))
        self.rows[phase] = [*self.rows[phase], *load_rows(Row, folder / "graded.jsonl")]
        self.kept_rows[phase] = load_rows(Row, folder / KEPT_FACTS)
        self.truth[phase] = load_rows(TruthRow, folder / TRUTH)

    def _relearn(self, folder: Path) -> None:
        save_rows([self._relearned_by(self.lm, "product")], folder / RELEARNED)

    def _relearned_by(self, lm: LanguageModel, name: str) -> Relearning:
        """Return how fast a model learns the answers again."""
        stage = self.stages.last
        assert isinstance(stage.settings, ForgetSettings), "it only forgets"
        same, other = halves(self.to_forget, self.config.seed)
        found = self._lessons(stage, same)
        of_facts = found.of_facts if found else [[Lesson(fact.prompt, fact.old_answers[0])] for fact in same]
        texts, evaluate = Lessons(of_facts), self.config.evaluate
        return relearn(lm, same, other, texts, stage.settings, evaluate, model=name, seed=stage.seed)

    def _read_reference(self, folder: Path) -> None:
        """Write the truth ratios of the model that never knew the facts, and how fast it learns them."""
        assert self.reference is not None, "asked for"
        lm = as_language_model(self.reference, None, self.config.model.model_copy(update={"revision": None}))
        fold_in(lm, lora.PRODUCT)
        scorer = Scorer(lm, self.config.evaluate, "reference")
        save_rows(forgetting.truth_rows(scorer, self.scored, self.variants, "reference"), folder / TRUTH)
        asked = self.config.unlearn.relearn_steps
        save_rows([self._relearned_by(lm, "reference")] if asked else [], folder / RELEARNED)

    def kept_facts(self) -> KeptFacts:
        """Return the scores of the facts to keep, by phase, and the harmonic mean of the graded ones."""
        scores = {phase: scoring.summarise(rows) for phase, rows in self.kept_rows.items()}
        graded = (forgetting.PROBABILITY, forgetting.ROUGE, forgetting.TRUTH)
        parts = [name for name in graded if name in scores["base"]["reliability"]]
        means = {phase: [own["reliability"][name].mean or 0.0 for name in parts] for phase, own in scores.items()}
        return KeptFacts(
            source=Path(self.kept.source).name,
            trained=len(self.kept.trained),
            scored=len(self.kept.scored),
            scores=scores,
            utility={phase: forgetting.harmonic_mean([mean / 100 for mean in own]) for phase, own in means.items()},
            parts=parts,
        )

    def truth_ratios(self) -> dict[str, TruthRatio]:
        """Return the truth ratio of each phase, and its test against the reference if there is one."""
        ratios = {phase: [row.ratio for row in rows] for phase, rows in self.truth.items() if rows}
        never_knew = ratios.get("reference")
        found = {}
        for phase, own in ratios.items():
            tested = never_knew and phase != "reference"
            quality = forgetting.forget_quality(own, never_knew) if tested and never_knew else None
            found[phase] = TruthRatio(closeness=forgetting.closeness(own), n=len(own), quality=quality)
        return found
