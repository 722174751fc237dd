"""Choosing how much to forget: `coef: auto`. From the forgotten model alone (cheap), or by learning too (full).

It is chosen on facts set aside, which the result is then not scored on. Fine-tuning on the old answers is done
once and serves every coefficient that is tried.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scipy import optimize
from torch import Tensor

from forgetlearn.evaluation import scoring
from forgetlearn.models import lora
from forgetlearn.runtime import sharding
from forgetlearn.storage import disk
from forgetlearn.weights import task_vector
from forgetlearn.config.schema import EvaluateSettings, ForgetSettings, RunConfig
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import Fact
from forgetlearn.training.finetune import StageLog
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.config.methods import METHODS, How
from forgetlearn.method.core import float32_snapshot, learn, stage_seed, subtract_old, tune_on_old
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.evaluation.scoring import Row
from forgetlearn.training.stage_checkpoints import StageIO

log = logging.getLogger("forgetlearn")
WEIGHTS, CHOICE = "weights.safetensors", "choice.json"
LEARNED, LEARNED_LOG = "learned.safetensors", "learned.json"  # of the best trial, where trials learn
# Where it is looked for. The paper's own are 0.1 to 3; at 3 lab bases lost up to 47 points of locality by forgetting
# alone (docs/experiments.md).
LOWEST, HIGHEST = 0.1, 1.5
TOLERANCE = 0.1  # of the natural logarithm of the coefficient
GOAL = (("reliability", "token"), ("generality", "token"), ("locality", "agreement"))


@dataclass(frozen=True)
class Trial:
    """A coefficient that was tried, and the percentages by quantity on the facts set aside; None: not asked."""

    coef: float
    scores: Mapping[str, float | None]

    @property
    def goal(self) -> float:
        """Mean of reliability, generality and locality, of those that there are.

        Raises:
            FactError: there is none.
        """
        there = [score for quantity, _protocol in GOAL if (score := self.scores[quantity]) is not None]
        if not there:
            raise FactError("forget.coef = auto: none of the facts set aside could be scored. Give a number.")
        return sum(there) / len(there)


@dataclass(frozen=True)
class Choice:
    """The coefficient that was chosen, on which facts (their ids), from which trials, and why."""

    coef: float
    search: str
    validation: tuple[str, ...]
    trials: tuple[Trial, ...]
    why: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "validation": list(self.validation), "trials": [asdict(trial) for trial in self.trials]}


class Forgetter:
    """A model and its base's weights, so that it is fine-tuned and the base again."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.base = task_vector.snapshot(lm.model)

    def tune(
        self, facts: Iterable[Fact], settings: ForgetSettings, how: How, *, seed: int, stage_io: StageIO | None = None
    ) -> tuple[dict[str, Tensor], StageLog]:
        """What fine-tuning on the old answers ends at: all weights, or an adapter's. The model is the base again."""
        stage_log = tune_on_old(self.lm, facts, settings, how, seed=seed, stage_io=stage_io)
        if how == "lora":
            tuned = lora.weights_of(self.lm.model, lora.FORGET)
        else:
            tuned = task_vector.snapshot(self.lm.model)
        self.reset()
        return tuned, stage_log

    def reset(self) -> None:
        """The base again, to the bit, without reading it from disk."""
        _to_own_form(self.lm)
        task_vector.load_into(self.lm.model, self.base)


def forget_tuned(
    lm: LanguageModel,
    tuned: Mapping[str, Tensor],
    settings: ForgetSettings,
    how: How,
    *,
    seed: int = 0,
    kept: Mapping[str, Tensor] | None = None,
    facts: Iterable[Fact] = (),
) -> None:
    """Make the base the forgotten model, from what `Forgetter.tune` gave and the coefficient of the settings.

    `kept` is what `method.measure_keep` gave, where there are facts to keep; `facts` are those that are forgotten.
    """
    if how == "lora":
        lm.model = lora.attach(lm.model, settings.lora, lora.FORGET, seed=0)
        lora.set_weights(lm.model, tuned)
        subtract_old(lm, settings, None)
    else:
        subtract_old(lm, settings, float32_snapshot(lm), tuned, seed=seed, kept=kept, facts=facts)


def choose_coefficient(lm: LanguageModel, facts: Iterable[Fact], config: RunConfig) -> Choice:
    """The coefficient of forgetting for these facts, chosen as `config.forget` says; `lm` is the base, and stays it.

    Raises:
        ConfigError: the method subtracts nothing, or the share set aside leaves no fact on one side.
        FactError: the base gives none of the old answers, or no fact set aside has what the search looks at.
    """
    facts = list(facts)
    check(facts, config)
    asked = scoring.probe(lm, facts, config.evaluate) if config.forget.only_known else []
    to_forget = scoring.facts_to_forget(facts, scoring.known_facts(facts, asked), config.forget)
    if not to_forget:
        raise FactError("The model gives none of the old answers: there is nothing to forget, and no coefficient.")
    base_rows = scoring.score(lm, set_aside(facts, config), phase="base", settings=_teacher_forced(config))
    return choose(lm, facts, to_forget, base_rows, config)[0]


def choose(
    lm: LanguageModel,
    facts: Sequence[Fact],
    to_forget: Sequence[Fact],
    base_rows: Sequence[Row],
    config: RunConfig,
    folder: Path | None = None,
    stage_io: StageIO | None = None,
) -> tuple[Choice, StageLog]:
    """The choice, and the log of the fine-tuning on old answers that it needed; `lm` is the base again.

    A search that is cut short begins again; with checkpoints (`stage_io`) its fine-tunings go on from theirs.

    The choice, the tuned weights and what the best trial learned are written to `folder`, for `read_choice`,
    `forget_as_chosen` and `learn_as_chosen`.
    """
    forgetter, how = Forgetter(lm), _subtracts(config)
    log.info("fine-tuning on %d old answers, once for every coefficient that is tried", len(to_forget))
    stage_io, seed = stage_io or StageIO(), stage_seed(config.seed, "forget")
    tuned, stage_log = forgetter.tune(to_forget, config.forget, how, seed=seed, stage_io=stage_io.part("old"))
    choice = search(forgetter, tuned, facts, base_rows, config, folder, stage_io)
    if folder is not None:
        sharding.save_parts(tuned, lm.model, folder / WEIGHTS)
        disk.write_json(folder / CHOICE, choice.as_dict())
    return choice, stage_log


def read_choice(folder: Path) -> Choice:
    """What `choose` wrote."""
    data = disk.read_json(folder / CHOICE)
    trials = tuple(Trial(**trial) for trial in data["trials"])
    return Choice(data["coef"], data["search"], tuple(data["validation"]), trials, data["why"])


def forget_as_chosen(lm: LanguageModel, folder: Path, config: RunConfig) -> None:
    """Make the base the forgotten model of the coefficient that `choose` wrote; nothing is fine-tuned again."""
    settings = config.forget.model_copy(update={"coef": read_choice(folder).coef})
    tuned, seed = sharding.load_parts(lm.model, folder / WEIGHTS), stage_seed(config.seed, "forget")
    forget_tuned(lm, tuned, settings, _subtracts(config), seed=seed)


def learn_as_chosen(lm: LanguageModel, folder: Path, config: RunConfig) -> StageLog | None:
    """Make the forgotten model the product that the best trial learned: to the bit what `learn` makes of it.

    What comes back is that trial's log; None, and nothing is done, where trials did not learn.
    """
    if not (folder / LEARNED_LOG).is_file():
        return None
    learned = sharding.load_parts(lm.model, folder / LEARNED)
    if METHODS[config.method].learns == "lora":
        lm.model = lora.attach(lm.model, config.learn.lora, lora.LEARN, seed=0)
        lora.compose(lm.model, lora.names(lm.model))
        lora.set_weights(lm.model, learned)
    else:
        _to_own_form(lm)
        task_vector.load_into(lm.model, learned)
    return read_stage_log(folder / LEARNED_LOG)


def read_stage_log(file: Path) -> StageLog:
    """What was written of a stage's log."""
    kept: dict[str, Any] = disk.read_json(file)
    return StageLog(**kept | {name: tuple(value) for name, value in kept.items() if isinstance(value, list)})


def _to_own_form(lm: LanguageModel) -> None:
    """No adapter, and the dtypes that it was loaded in."""
    if hasattr(lm.model, "peft_config"):
        lm.model = lora.detach(lm.model)
    lm.to_own_dtypes()


def check(facts: Sequence[Fact], config: RunConfig) -> None:
    """Raise ConfigError unless a coefficient can be chosen for these facts; the model is not needed for this.

    Raises:
        ConfigError: the method subtracts nothing, `rows` are named, or the share set aside leaves no fact on one side.
        FactError: no fact set aside has an unrelated probe, and the search needs one.
    """
    check_engine(config.evaluate, changed_by="choosing a coefficient")
    _subtracts(config)
    if config.forget.rows != "all":
        raise ConfigError(f"forget.rows = {config.forget.rows}: not with forget.coef = auto. Give a number.")
    aside = set_aside(facts, config)
    if config.forget.search == "cheap" and not any(fact.locality for fact in aside):
        raise FactError(
            f"forget.coef = auto, forget.search = cheap: none of the {len(aside)} facts set aside has an unrelated "
            "probe to measure locality with. Give locality_prompt, or --set forget.search=full."
        )


def _subtracts(config: RunConfig) -> How:
    how = METHODS[config.method].forgets
    if how not in ("all weights", "lora"):
        able = ", ".join(name for name, method in METHODS.items() if method.forgets in ("all weights", "lora"))
        raise ConfigError(
            f"forget.coef = auto: method {config.method} subtracts nothing, so there is no coefficient to choose. "
            f"Choose one of {able}, or give a number."
        )
    return how


def set_aside(facts: Sequence[Fact], config: RunConfig) -> list[Fact]:
    """The facts that choose, in their order: told by their ids and the seed, not by their place in the file.

    Raises:
        ConfigError: the share leaves no fact on one side.
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


def search(
    forgetter: Forgetter,
    tuned: Mapping[str, Tensor],
    facts: Sequence[Fact],
    base_rows: Sequence[Row],
    config: RunConfig,
    folder: Path | None = None,
    stage_io: StageIO | None = None,
) -> Choice:
    """The choice for these facts, from one fine-tuning on old answers; the model is the base again.

    `base_rows` are the base's scores of at least the facts set aside. What the best trial learned is written to
    `folder`.
    """
    trying = _Trying(forgetter, tuned, facts, base_rows, config, folder, stage_io or StageIO())
    aside = trying.aside
    cheap = config.forget.search == "cheap"
    try:
        coef, why = _largest_within_bound(trying) if cheap else _best_after_learning(trying)
    finally:
        forgetter.reset()
    why = f"coef {coef:g} was chosen ({config.forget.search} search on {len(aside)} facts set aside): {why}."
    trials = tuple(sorted(trying.trials.values(), key=lambda trial: trial.coef))
    return Choice(coef, config.forget.search, tuple(fact.id for fact in aside), trials, why)


class _Trying:
    """What the model is at a coefficient, on the facts set aside; each coefficient is tried once.

    The full search learns all facts, as the update would: fewer facts, or fewer epochs, cost other coefficients other
    scores (docs/experiments.md). So what the best trial learned is the product, and is kept in `folder`.
    """

    def __init__(
        self,
        forgetter: Forgetter,
        tuned: Mapping[str, Tensor],
        facts: Sequence[Fact],
        base_rows: Sequence[Row],
        config: RunConfig,
        folder: Path | None,
        stage_io: StageIO,
    ) -> None:
        self.forgetter, self.tuned, self.facts, self.config = forgetter, tuned, facts, config
        self.folder, self.stage_io = folder, stage_io
        self.aside, self.reference = set_aside(facts, config), scoring.locality_predictions(base_rows)
        self.trials: dict[float, Trial] = {}
        self.learned: StageLog | None = None  # by the last trial

    def at(self, log_coef: float) -> Trial:
        """The trial at a coefficient, rounded to three digits, given by its natural logarithm."""
        coef = float(f"{math.exp(log_coef):.3g}")
        if coef not in self.trials:
            self.trials[coef] = Trial(coef, self._scores(coef))
            if self.learned is not None and self.folder is not None and self.best.coef == coef:
                self._keep(self.learned, self.folder)
        return self.trials[coef]

    @property
    def best(self) -> Trial:
        """The trial with the highest goal so far; of equal ones that with the smallest coefficient."""
        return max(self.trials.values(), key=lambda trial: (trial.goal, -trial.coef))

    def _keep(self, learned: StageLog, folder: Path) -> None:
        model = self.forgetter.lm.model
        is_lora = METHODS[self.config.method].learns == "lora"
        learned_weights = lora.weights_of(model, lora.PRODUCT) if is_lora else task_vector.snapshot(model)
        sharding.save_parts(learned_weights, model, folder / LEARNED)
        disk.write_json(folder / LEARNED_LOG, asdict(replace(learned, seconds=())))

    def _scores(self, coef: float) -> dict[str, float | None]:
        config, lm = self.config, self.forgetter.lm
        self.forgetter.reset()
        settings = config.forget.model_copy(update={"coef": coef})
        forget_tuned(lm, self.tuned, settings, _subtracts(config), seed=stage_seed(config.seed, "forget"))
        if config.forget.search == "full":
            learns, seed = METHODS[config.method].learns, stage_seed(config.seed, "learn")
            self.learned = learn(
                lm, self.facts, config.learn, learns, seed=seed, stage_io=self.stage_io.part(f"learn-{coef:g}")
            )
        rows = scoring.score(
            lm,
            self.aside,
            phase="trial",
            settings=_teacher_forced(config),
            reference=self.reference,
        )
        table = scoring.summarise(rows)
        return {quantity: table[quantity][protocol]["mean"] for quantity, protocol in (*GOAL, ("residue", "token"))}


def _teacher_forced(config: RunConfig) -> EvaluateSettings:
    """Scoring without free answers, which take most of the time."""
    return config.evaluate.model_copy(update={"protocols": ("token",)})


def _largest_within_bound(trying: _Trying) -> tuple[float, str]:
    """The largest coefficient of forgetting whose loss of locality stays within the bound, by halving."""
    bound = trying.config.forget.max_locality_loss

    def excess(log_coef: float) -> float:
        kept = trying.at(log_coef).scores["locality"]
        if kept is None:
            raise FactError("forget.coef = auto: no unrelated probe of the facts set aside could be scored.")
        return 100 - kept - bound

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if excess(high) > 0 and excess(low) <= 0:
        optimize.bisect(excess, low, high, xtol=TOLERANCE)
    lost = {coef: 100 - float(trial.scores["locality"] or 0) for coef, trial in trying.trials.items()}
    over = min((coef for coef in lost if lost[coef] > bound), default=math.inf)
    coef = max((coef for coef in lost if coef < over), default=LOWEST)
    why = f"there forgetting alone costs {lost[coef]:.1f} points of locality (at most {bound:g} are allowed)"
    if lost[coef] > bound:
        return coef, f"{why}, and it is the smallest that is tried"
    return coef, why + (f", at {over:g} it costs {lost[over]:.1f}" if over < math.inf else ", and no more is tried")


def _best_after_learning(trying: _Trying) -> tuple[float, str]:
    """The best trial: at both ends, then, where more are asked for, where a bracketing search between them looks."""
    ends = math.log(LOWEST), math.log(HIGHEST)
    for end in ends:
        trying.at(end)
    if more := trying.config.forget.trials - len(ends):
        options = {"maxiter": more, "xatol": TOLERANCE}
        optimize.minimize_scalar(lambda place: -trying.at(place).goal, bounds=ends, method="bounded", options=options)
    trials = sorted(trying.trials.values(), key=lambda trial: trial.coef)
    listed = ", ".join(f"{trial.goal:.1f} at {trial.coef:g}" for trial in trials)
    return trying.best.coef, f"learned and scored, the mean of reliability, generality and locality is {listed}"
