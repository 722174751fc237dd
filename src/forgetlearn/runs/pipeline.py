"""The steps of an update: teach, score, forget, score, learn, score. A store keeps their results.

`update` stores them in a run folder, so that a killed run can continue. `compare` shares them between cells. The search
for a coefficient does not need them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch import Tensor

from forgetlearn.config.schema import ForgetSettings, RunConfig, TrainSettings
from forgetlearn.config.stages import Stage, Stages
from forgetlearn.evaluation import general_ability, probes, scoring
from forgetlearn.facts import Fact
from forgetlearn.method import in_context, keeping, lessons
from forgetlearn.method.core import forget, forget_tuned, learn, old_pairs, teach, tune_on_old
from forgetlearn.method.kinds import STAGE_KINDS, Lessons, to_own_form
from forgetlearn.method.lessons import Material, Rehearsal
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.runs import probing, retention
from forgetlearn.runs.nothing_forgotten import why_nothing
from forgetlearn.runs.retention import NO_PAST, Past, Retained
from forgetlearn.storage import disk
from forgetlearn.storage.records import (
    General,
    NothingForgotten,
    ProbeRow,
    Row,
    StageLessons,
    Taught,
    load_rows,
    save_rows,
)
from forgetlearn.storage.run_folder import PROBES
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict, load_into, snapshot

log = logging.getLogger("forgetlearn")
STATED = "statements.json"
P = ParamSpec("P")
T = TypeVar("T")
Tuned = tuple[dict[str, Tensor], StageLog]
Train = Callable[[StageIO], StageLog | None]


class Store:
    """Keeps the results of the steps of an update. This class keeps only the logs of stages, and computes the rest."""

    def __init__(self, stage_io: StageIO | None = None) -> None:
        self.stage_io = stage_io or StageIO()
        self.logs: dict[str, StageLog | None] = {}  # by stage

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a step."""
        return compute()

    def files(self, step: str, write: Callable[[Path], None]) -> Path:
        """Return the folder that a step wrote its files into."""
        raise NotImplementedError

    def train(self, stage: Stage[TrainSettings], n_facts: int | None, compute: Train) -> Callable[[], None] | None:
        """Change the model and return None; if an earlier process did it, return a function that loads the result."""
        self.logs[stage.name] = compute(self.stage_io)
        return None

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict | None:
        """Return the weights that are fine-tuned on the old answers; None if they are not shared."""
        return None

    def learned(self) -> tuple[StateDict, StageLog] | None:
        """Return the learned weights and the log of learning; None if nothing has been learned yet."""
        return None


class HeldBase:
    """A copy of the base's weights in memory, to restore the base without reading it from disk."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.weights = snapshot(lm.model)

    def restore(self) -> None:
        """Restore the base's weights, to the bit."""
        to_own_form(self.lm)
        load_into(self.lm.model, self.weights)


class Pipeline:
    """One update of a model. Its steps fill `rows` (by phase) and `known`.

    With `base`, the model may hold any weights: the base is restored before the first step that needs it. `scored` are
    the facts that are scored (default: all). The facts of the `past` are kept and asked again.
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        config: RunConfig,
        store: Store,
        base: HeldBase | None = None,
        scored: Sequence[Fact] | None = None,
        past: Past = NO_PAST,
    ) -> None:
        self.lm, self.facts, self.store, self.base = lm, facts, store, base
        self.config, self.stages = config, Stages(config)
        self.scored = [lessons.as_scored(fact, config) for fact in (facts if scored is None else scored)]
        self.held_apart: frozenset[str] = frozenset()  # prompts of keep.source that are only scored
        self.material, self.past = Material(), past
        self.retained: Retained | None = None
        self.rows: dict[str, list[Row]] = {}
        self.probed: dict[str, list[ProbeRow]] = {}  # by phase
        self._statements: Path | None = None  # folder with the facts as the base states them
        self._measured: dict[str, Path] = {}  # folders with general ability, by phase
        self.known: list[Fact] = []  # facts whose old answer the base gives
        self.replies: list[Row] = []  # the base's free answers to the facts' prompts
        self.rehearsal = Rehearsal()
        # Functions that load the weights that the next step needs; called only if that step really runs.
        self._pending: dict[str, Callable[[], None]] = {"base": base.restore} if base else {}

    def prepare(self) -> None:
        """Teach the base, score it, and find out which old answers it gives."""
        if stage := self.stages.teach:
            self._train(stage, None, lambda stage_io: self._teach(stage, stage_io))
        self._score("base")
        self._measure("base")
        ask = self.ready(lambda: scoring.ask(self.lm, self.facts, self.config.evaluate))
        self.replies = scoring.free_answers(self.rows["base"], lambda: self.store.rows("probe", ask))
        self.known = scoring.known_facts(self.facts, self.replies)
        self._ask_for_material()
        self._state()
        self._probe("base")

    def update(self) -> None:
        """Forget and learn, and score the results."""
        self.forget()
        self._train(self.stages.learn, len(self.facts), self._learn)
        self._score("updated")
        self._measure("updated")
        self._probe("updated")
        self._ask_earlier()

    def forget(self) -> None:
        """Forget the old answers, if the method does, and score the forgotten model."""
        if (stage := self.stages.forget) and (facts := self.to_forget):
            tuned = self.store.tuned(self.ready(self.tune)) if stage.kind.subtracts else None
            self._train(stage, len(facts), lambda stage_io: self._forget(stage, facts, tuned, stage_io))
            if "forgotten" in self.stages.phases:
                self._score("forgotten")
        elif nothing := self.nothing_forgotten:
            log.warning("%s", "\n".join(filter(None, (nothing.sentence, nothing.example_line))))

    def set_coefficient(self, coef: float) -> None:
        """Set the coefficient of forgetting."""
        settings = self.config.forget.model_copy(update={"coef": coef})
        self.config = self.config.model_copy(update={"forget": settings})
        self.stages = Stages(self.config)

    def tune(self, stage_io: StageIO) -> Tuned:
        """Fine-tune on the old answers; return the weights (all, or the adapter's) and the log. Needs `base`."""
        stage = self.stages.forget
        assert stage is not None, "there is something to forget"
        assert self.base is not None, "it is restored afterwards"
        self._pending["base"] = self.base.restore
        how = stage.kind.name
        texts = self._lessons(stage, self.to_forget)
        stage_log = tune_on_old(
            self.lm, self.to_forget, stage.settings, how, seed=stage.seed, stage_io=stage_io, lessons=texts
        )
        state = STAGE_KINDS[how].state(self.lm, lora.FORGET)
        return {name: weight.cpu().clone() for name, weight in state.items()}, stage_log

    def ready(self, compute: Callable[P, T]) -> Callable[P, T]:
        """Return a function that loads the weights that the stages so far produced, and then calls `compute`.

        Every step that reads or changes the model goes through here: nothing else restores weights before a step.
        """

        def on_model(*args: P.args, **options: P.kwargs) -> T:
            while self._pending:
                self._pending.pop(next(iter(self._pending)))()
            return compute(*args, **options)

        return on_model

    def _ask_for_material(self) -> None:
        """Ask the base for what the stages train on, if they train on more than bare answers."""
        if lessons.asks_base(self.config, self.lm.encoder):
            replies = self._recall() if self.config.keep.weight else []
            said = {row.fact: row for row in (*self.replies, *replies)}
            make = self.ready(
                lambda: lessons.make_material(self.lm, self.facts, self.config, said, self.rehearsal, self.held_apart)
            )
            self.material = Material.load(self.store.files("lessons", lambda folder: make().save(folder)))

    def _recall(self) -> list[Row]:
        """Decide which facts of earlier updates to rehearse, and return what the base says when it is asked them.

        A method that learns also learns lost facts again: if it kept the base's answers to them, they would stay lost.
        """
        taught = [fact for one in self.past.earlier for fact in one.facts]
        drawn = keeping.rehearsed(taught, self.facts, f"{self.config.seed}:{len(self.past.earlier)}")
        adapter = None if self.stages.teach else self.past.adapter  # to teach folds it into the base
        self.rehearsal = Rehearsal(taught, drawn, adapter=adapter)
        if not drawn or not self.stages.method.learns:
            return []
        ask = self.ready(lambda: scoring.ask(self.lm, drawn, self.config.evaluate))
        replies = self.store.rows("probe_earlier", ask)
        held = scoring.held_facts(drawn, replies)
        lost = [fact for fact in drawn if fact not in held]
        if lost:
            log.info("%d of %d facts of earlier updates are no longer said: learned again", len(lost), len(drawn))
        self.rehearsal = replace(self.rehearsal, held=held, lost=lost)
        return replies

    def _lessons(self, stage: Stage[TrainSettings], facts: Sequence[Fact]) -> Lessons | None:
        return lessons.of_stage(self.material, facts, stage.name, self.config, self.lm.encoder)

    def _teach(self, stage: Stage[TrainSettings], stage_io: StageIO) -> StageLog:
        return teach(self.lm, old_pairs(self.facts), stage.settings, seed=stage.seed, stage_io=stage_io)

    def _forget(
        self, stage: Stage[ForgetSettings], facts: Sequence[Fact], tuned: StateDict | None, stage_io: StageIO
    ) -> StageLog | None:
        how = stage.kind.name
        log.info("forgetting %d facts (%s)", len(facts), how)
        if tuned is None:
            texts = self._lessons(stage, facts)
            stage_log = forget(self.lm, facts, stage.settings, how, seed=stage.seed, stage_io=stage_io, lessons=texts)
            # If nothing is learned, the forgotten model is the product.
            return stage_log if self.stages.method.learns else STAGE_KINDS[how].finish(self.lm, stage_log, stage.seed)
        forget_tuned(self.lm, tuned, facts, stage.settings, how)
        return None

    def _learn(self, stage_io: StageIO) -> StageLog:
        stage = self.stages.learn
        how = stage.kind.name
        if learned := self.store.learned():
            weights, stage_log = learned
            STAGE_KINDS[how].put_product(self.lm, stage.settings, weights)
            return stage_log
        log.info("learning %d facts (%s)", len(self.facts), how)
        facts = [*self.facts, *self.rehearsal.lost]
        texts = self._lessons(stage, facts)
        return learn(self.lm, facts, stage.settings, how, seed=stage.seed, stage_io=stage_io, lessons=texts)

    def _train(self, stage: Stage[TrainSettings], n_facts: int | None, compute: Train) -> None:
        """Do a stage that trains; if it was done before, the next step loads its result."""
        if change := self.store.train(stage, n_facts, self.ready(compute)):
            if stage.name == "learn":
                self._pending.pop("forget", None)  # the product includes the forgetting
            self._pending[stage.name] = change

    def _score(self, phase: str) -> None:
        def compute() -> list[Row]:
            log.info("scoring the %s model", phase)
            reference = scoring.locality_predictions(self.rows["base"]) if phase != "base" else None
            evaluate, asked = self.config.evaluate, self._as_asked(phase)
            rows = scoring.score(self.lm, asked, phase=phase, settings=evaluate, reference=reference)
            return in_context.with_cost(rows, self.lm.encoder, self.scored, asked)

        self.rows[phase] = self.store.rows(f"score_{phase}", self.ready(compute))

    def _as_asked(self, phase: str) -> Sequence[Fact]:
        """Return the scored facts as the model is asked them in this phase: some kinds show new facts in the prompt."""
        if phase != "updated":
            return self.scored
        kind = STAGE_KINDS[self.stages.learn.kind.name]
        return kind.asked(self.lm, self.facts, self.scored, self.config.evaluate)

    def _ask_earlier(self) -> None:
        """Ask the facts of earlier updates again."""
        earlier = self.past.earlier
        if not earlier:
            return

        def compute() -> list[Row]:
            if number := sum(len(one.facts) for one in earlier):
                log.info("asking the %d facts of %d earlier updates", number, len(earlier))
            return retention.ask(self.lm, earlier, self.config.evaluate)

        self.retained = retention.retained(earlier, self.store.rows("score_earlier", self.ready(compute)))

    def _measure(self, phase: str) -> None:
        if not general_ability.asked(self.config.evaluate):
            return
        if phase == "base" and self.past.origin is not None:
            self._measured[phase] = self.past.origin
            return

        def write(folder: Path) -> None:
            log.info("measuring the general ability of the %s model", phase)
            before = self._measured.get("base")
            general_ability.measure(self.lm, self.config.evaluate, folder, before, self.facts)

        self._measured[phase] = self.store.files(f"general_{phase}", self.ready(write))

    def _probe(self, phase: str) -> None:
        """Ask about the facts beyond their own wordings."""
        if not probes.are_asked(self.config.evaluate):
            return

        def write(folder: Path) -> None:
            save_rows(probing.ask(self.lm, self.scored, self.config, self.rows[phase], self._stated()), folder / PROBES)

        folder = self.store.files(f"probes_{phase}", self.ready(write))
        self.probed[phase] = load_rows(ProbeRow, folder / PROBES)

    def _state(self) -> None:
        """Let the base state facts, if a probe needs that."""
        if probes.to_state(self.scored, self.config.evaluate):
            state = self.ready(lambda: probing.state(self.lm, self.scored, self.config, self.replies))
            self._statements = self.store.files("statements", lambda folder: disk.write_json(folder / STATED, state()))

    def _stated(self) -> dict[str, str]:
        return disk.read_json(self._statements / STATED) if self._statements else {}

    @property
    def to_forget(self) -> list[Fact]:
        """The facts whose old answers are forgotten."""
        stage = self.stages.forget
        if stage is None:
            return []
        return self.known if stage.settings.only_known else [fact for fact in self.facts if fact.ground_truth]

    @property
    def nothing_forgotten(self) -> NothingForgotten | None:
        """The reason why nothing is forgotten, if the method forgets but nothing is."""
        if not self.stages.method.forgets or self.to_forget:
            return None
        return why_nothing(self.config, self.facts, self.replies)

    @property
    def taught(self) -> list[Taught]:
        """What the stages train on, fact by fact; empty if it is each fact's bare answer."""
        trained = {"learn": {fact.id for fact in self.facts}, "forget": {fact.id for fact in self.to_forget}}
        return [each for each in self.material.taught if each.fact in trained[each.stage]]

    @property
    def lesson_counts(self) -> dict[str, StageLessons]:
        """By stage, how many facts it trains on in which form, and why some texts are bare."""
        return lessons.counts(self.taught, quiz=lessons.has_quiz(self.config))

    @property
    def kept_counts(self) -> dict[str, int]:
        """The number of texts that are kept, and of facts that are learned again, by where they come from."""
        lost = self.rehearsal.lost
        return self.material.kept_counts | ({keeping.AGAIN: len(lost)} if lost else {})

    @property
    def general(self) -> dict[str, General]:
        """The general ability that was measured, by phase."""
        return {phase: general_ability.found_in(folder) for phase, folder in self._measured.items()}
