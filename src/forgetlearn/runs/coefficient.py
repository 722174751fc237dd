"""Choose how much to forget (`coef: auto`): try several coefficients, and learn with each.

The coefficient is chosen on facts set aside, and the result is scored on the others. Fine-tuning on the old answers is
done once and serves every trial.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy import optimize

from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.evaluation import scoring
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.facts import Fact
from forgetlearn.method import lessons
from forgetlearn.method.kinds import STAGE_KINDS
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.runs.pipeline import HeldBase, Pipeline, Store, Tuned
from forgetlearn.runtime import sharding
from forgetlearn.storage import disk
from forgetlearn.storage.records import Choice, Row
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
WEIGHTS, CHOICE = "weights.safetensors", "choice.json"
LEARNED, LEARNED_LOG = "learned.safetensors", "learned.json"  # of the best trial
# The range that is searched. The paper searches 0.1 to 3, but at 3 lab bases lost up to 47 points of locality by
# forgetting alone (docs/experiments.md).
LOWEST, HIGHEST = 0.1, 1.5
TOLERANCE = 0.1  # in the natural logarithm of the coefficient
GOAL = (("reliability", "token"), ("generality", "token"), ("locality", "agreement"))


@dataclass(frozen=True)
class Trial:
    """A coefficient that was tried, and its scores on the facts set aside, in percent (None if not scored)."""

    coef: float
    scores: Mapping[str, float | None]

    @property
    def goal(self) -> float:
        """Mean of reliability, generality and locality, as far as they were scored; raise FactError if none was."""
        scored = [score for quantity, _protocol in GOAL if (score := self.scores[quantity]) is not None]
        if not scored:
            raise FactError("forget.coef = auto: none of the facts set aside could be scored. Give a number.")
        return sum(scored) / len(scored)


def read_stage_log(file: Path) -> StageLog:
    """Read the log of a stage from its JSON file."""
    kept: dict[str, Any] = disk.read_json(file)
    return StageLog(**kept | {name: tuple(value) for name, value in kept.items() if isinstance(value, list)})


def check(facts: Sequence[Fact], config: RunConfig) -> None:
    """Raise ConfigError if no coefficient can be chosen for these facts. This needs no model."""
    check_engine(config.evaluate, changed_by="choosing a coefficient")
    if not METHODS[config.method].subtracts:
        able = ", ".join(name for name, method in METHODS.items() if method.subtracts)
        raise ConfigError(
            f"forget.coef = auto: method {config.method} subtracts nothing, so there is no coefficient to choose. "
            f"Choose one of {able}, or give a number."
        )
    if config.forget.rows != "all":
        raise ConfigError(f"forget.rows = {config.forget.rows}: not with forget.coef = auto. Give a number.")
    set_aside(facts, config)


def set_aside(facts: Sequence[Fact], config: RunConfig) -> list[Fact]:
    """Return the facts that the coefficient is chosen on, in their given order.

    The draw depends on the facts' ids and the seed, not on their order in the file.

    Raises:
        ConfigError: the share leaves no fact to choose on, or none to score.
    """
    share = config.forget.validation
    n_aside = round(share * len(facts))
    if not 0 < n_aside < len(facts):
        left = "to choose on" if n_aside == 0 else "to score"
        raise ConfigError(
            f"forget.validation = {share}: of {len(facts)} facts it sets {n_aside} aside, which leaves none {left}. "
            "Choose another share, or give forget.coef as a number."
        )
    drawn = sorted(facts, key=lambda fact: hashlib.sha256(f"{config.seed}:{fact.id}".encode()).digest())
    chosen = {fact.id for fact in drawn[:n_aside]}
    return [fact for fact in facts if fact.id in chosen]


def choose_coefficient(lm: LanguageModel, facts: Iterable[Fact], config: RunConfig) -> Choice:
    """Return the coefficient of forgetting for these facts. `lm` is the base, which is restored afterwards.

    Raises:
        ConfigError: the method subtracts nothing, or the share set aside leaves no fact on one side.
        FactError: the base gives none of the old answers, or none of the facts set aside can be scored.
    """
    facts = list(facts)
    check(facts, config)
    said = scoring.ask(lm, facts, config.evaluate)
    known = scoring.known_facts(facts, said)
    material = lessons.Material()
    if lessons.asks_base(config, lm.encoder):
        material = lessons.make_material(lm, facts, config, {row.fact: row for row in said})
    aside = set_aside(facts, config)
    base_rows = scoring.score(lm, aside, phase="base", settings=_of_trials(config).evaluate)
    search = Search(lm, facts, config, base_rows, known, material)
    if not search.pipeline.to_forget:
        raise FactError("The model gives none of the old answers: there is nothing to forget, and no coefficient.")
    return search.run()[0]


class Search:
    """The search for a coefficient on one base. Each coefficient is tried once.

    A trial learns all facts, as the update would, because scores differ with fewer facts or fewer epochs
    (docs/experiments.md). So the best trial's weights are the product. They are kept in `folder`, if one is given.
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        config: RunConfig,
        base_rows: list[Row],
        known: list[Fact],
        material: lessons.Material,
        folder: Path | None = None,
        stage_io: StageIO | None = None,
    ) -> None:
        self.facts, self.config, self.base_rows, self.known = facts, config, base_rows, known
        self.material = material
        self.folder, self.stage_io = folder, stage_io or StageIO()
        self.aside, self.base = set_aside(facts, config), HeldBase(lm)
        self.trials: dict[float, Trial] = {}
        self.tuned: StateDict = {}
        self.pipeline = self._pipeline(config, Store())

    def _pipeline(self, config: RunConfig, store: Store) -> Pipeline:
        pipeline = Pipeline(self.base.lm, self.facts, config, store, base=self.base, scored=self.aside)
        pipeline.rows["base"], pipeline.known, pipeline.material = self.base_rows, self.known, self.material
        return pipeline

    def run(self) -> tuple[Choice, StageLog]:
        """Return the choice and the log of the fine-tuning on old answers, and restore the base.

        Write the choice, the tuned weights and the best trial's weights to `folder`. An interrupted search starts
        again, but its fine-tuning continues from the checkpoints of `stage_io`.
        """
        log.info("fine-tuning on %d old answers, once for every coefficient", len(self.pipeline.to_forget))
        try:
            self.tuned, stage_log = self.pipeline.tune(self.stage_io.part("old"))
            coef, why = best_coefficient(self.at, self.config.forget.trials)
        finally:
            self.base.restore()
        why = f"coef {coef:g} was chosen (on {len(self.aside)} facts set aside): {why}."
        trials = [asdict(trial) for _coef, trial in sorted(self.trials.items())]
        choice = Choice.model_validate(
            {"coef": coef, "validation": [fact.id for fact in self.aside], "trials": trials, "why": why}
        )
        if self.folder is not None:
            sharding.save_parts(self.tuned, self.base.lm.model, self.folder / WEIGHTS)
            choice.save(self.folder / CHOICE)
        return choice, stage_log

    def at(self, coef: float) -> Trial:
        """Return the trial at a coefficient. If it is the best so far, keep its weights."""
        if coef not in self.trials:
            self.trials[coef] = Trial(coef, self._scores(coef))
            if self.folder is not None and best(self.trials.values()).coef == coef:
                self._keep(self.folder)
        return self.trials[coef]

    def _scores(self, coef: float) -> dict[str, float | None]:
        self.last = _TrialStore(self.tuned, self.stage_io.part(f"learn-{coef:g}"))
        pipeline = self._pipeline(_of_trials(self.config), self.last)
        pipeline.set_coefficient(coef)
        pipeline.update()
        table = scoring.summarise(pipeline.rows["updated"])
        return {quantity: table[quantity][protocol].mean for quantity, protocol in (*GOAL, ("residue", "token"))}

    def _keep(self, folder: Path) -> None:
        """Write the weights that the last trial learned, and its log."""
        lm, stage_log = self.base.lm, self.last.logs["learn"]
        assert stage_log is not None, "each trial learns"
        state = STAGE_KINDS[Stages(self.config).learn.kind.name].state(lm, lora.PRODUCT)
        sharding.save_parts(state, lm.model, folder / LEARNED)
        disk.write_json(folder / LEARNED_LOG, asdict(replace(stage_log, seconds=())))


class _TrialStore(Store):
    """Gives every trial the same tuned weights."""

    def __init__(self, tuned: StateDict, stage_io: StageIO) -> None:
        super().__init__(stage_io)
        self._tuned = tuned

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict:
        """Return the tuned weights that all trials start from."""
        return self._tuned


def _of_trials(config: RunConfig) -> RunConfig:
    """Return the config of a trial. It scores only at the end, and without free answers, which take the most time."""
    scores = {"protocols": ("token",), "every_phase": False, "general_prompts": False, "general": None, "tasks": ()}
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=scores)})


def best(trials: Iterable[Trial]) -> Trial:
    """Return the trial with the highest goal; among equals, the one with the smallest coefficient."""
    return max(trials, key=lambda trial: (trial.goal, -trial.coef))


def best_coefficient(trial_at: Callable[[float], Trial], n_trials: int) -> tuple[float, str]:
    """Try both ends of the range, then search between them; return the best coefficient and the reason."""
    trials: dict[float, Trial] = {}

    def goal(log_coef: float) -> float:
        coef = float(f"{math.exp(log_coef):.3g}")
        trials[coef] = trial_at(coef)
        return trials[coef].goal

    ends = math.log(LOWEST), math.log(HIGHEST)
    for end in ends:
        goal(end)
    if more := n_trials - len(ends):
        options = {"maxiter": more, "xatol": TOLERANCE}
        optimize.minimize_scalar(lambda place: -goal(place), bounds=ends, method="bounded", options=options)
    listed = ", ".join(f"{trial.goal:.1f} at {trial.coef:g}" for trial in sorted(trials.values(), key=lambda t: t.coef))
    reason = f"learned and scored, the mean of reliability, generality and locality is {listed}"
    return best(trials.values()).coef, reason
