"""Forget, then learn: the method on one screen. `runs.pipeline` adds scores, files and resume.

    knowledge parameters    tau    = FT(theta, old facts) - theta
    forgetting              theta' = theta - coef * tau
    learning                theta* = FT(theta', new facts)

`kinds.py` says what a kind of stage trains and subtracts. Source: Ni et al., "Forgetting before Learning", ACL 2024,
arXiv:2311.08011.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from forgetlearn.config.methods import KindName
from forgetlearn.config.schema import ForgetSettings, Rows, StageSettings, TrainSettings
from forgetlearn.errors import FactError
from forgetlearn.facts import Fact
from forgetlearn.method.checks import check_rows
from forgetlearn.method.kinds import STAGE_KINDS, Lesson, Lessons, Pairs
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.modules import only_rows_train
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict


def forget(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: ForgetSettings,
    how: KindName = "lora",
    *,
    seed: int = 0,
    stage_io: StageIO | None = None,
    lessons: Lessons | None = None,
) -> StageLog:
    """Fine-tune on the old answers, and subtract `coef` times what that added. `lm` is changed in place.

    If all weights are trained, `lm.model` becomes the forgotten model, in float32. With LoRA the base keeps its
    weights, and `lm.model` gets a frozen adapter "forget", multiplied by -coef. Skip facts without an old answer.
    `lessons` are what is trained on; by default, each fact's prompt with its old answer.

    Raises:
        FactError: no fact has an old answer.
    """
    kind, facts, stage_io = STAGE_KINDS[how], list(facts), stage_io or StageIO()
    kind.ready(lm)
    base = kind.copy_base(lm, stage_io.points, in_memory=False)
    stage_log = tune_on_old(lm, facts, settings, how, seed=seed, stage_io=stage_io, lessons=lessons)
    subtract(lm, base, facts, settings, how)
    return stage_log


def learn(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: StageSettings,
    how: KindName = "lora",
    *,
    seed: int = 0,
    stage_io: StageIO | None = None,
    lessons: Lessons | None = None,
) -> StageLog:
    """Fine-tune on the new answers. `lm` is changed in place, and becomes the product.

    If all weights are trained, `lm.model` has no adapter, and is rounded here, once, to the dtypes it was loaded in.
    With LoRA it has one adapter, "default", which includes the forgetting. `lessons` are what is trained on; by
    default, each fact's prompt with its new answer.
    """
    kind, facts = STAGE_KINDS[how], list(facts)
    if settings.rows != "all":
        check_rows(lm, settings, how)
    kind.ready(lm)
    lm.model = kind.prepare(lm.model, settings, lora.LEARN, seed, settings.modules)
    lessons = lessons or Lessons([[Lesson(fact.prompt, fact.target_new)] for fact in facts], facts=facts)
    both = [(fact.prompt, answer) for fact in facts for answer in (fact.ground_truth, fact.target_new) if answer]
    tokens = tokens_of(lm, both, settings.rows)
    with only_rows_train(lm.model, tokens, settings.rows):
        stage_log = kind.fit(lm, lessons, settings, seed, replace(stage_io or StageIO(), name="learning"))
    return kind.finish(lm, stage_log, seed)


def tune_on_old(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: ForgetSettings,
    how: KindName,
    *,
    seed: int = 0,
    stage_io: StageIO | None = None,
    lessons: Lessons | None = None,
) -> StageLog:
    """Fine-tune all weights, or an adapter "forget", on the old answers: the first half of forgetting."""
    kind, lessons = STAGE_KINDS[how], lessons or Lessons([[Lesson(*pair)] for pair in old_pairs(facts)])
    kind.ready(lm)
    lm.model = kind.prepare(lm.model, settings, lora.FORGET, seed)
    return kind.fit(lm, lessons, settings, seed, replace(stage_io or StageIO(), name="forgetting"))


def subtract(
    lm: LanguageModel, base: StateDict | None, facts: Iterable[Fact], settings: ForgetSettings, how: KindName
) -> None:
    """Turn the tuned model into the forgotten one, `base - coef * (tuned - base)`: the second half of forgetting."""
    STAGE_KINDS[how].subtract(lm, settings, base, tokens_of(lm, old_pairs(facts), settings.rows))


def forget_tuned(
    lm: LanguageModel, tuned: StateDict, facts: Iterable[Fact], settings: ForgetSettings, how: KindName
) -> None:
    """Do what `forget` does, without training: `tuned` is the state (`StageKind.state`) after `tune_on_old`."""
    kind = STAGE_KINDS[how]
    kind.ready(lm)
    base = kind.copy_base(lm, None, in_memory=True)
    kind.put_state(lm, settings, tuned)
    subtract(lm, base, facts, settings, how)


def teach(
    lm: LanguageModel, pairs: Pairs, settings: TrainSettings, *, seed: int = 0, stage_io: StageIO | None = None
) -> StageLog:
    """Fine-tune all weights on these answers, so that the base holds them. `lm` is changed in place."""
    kind = STAGE_KINDS["all weights"]
    kind.ready(lm)
    kind.prepare(lm.model, settings, "", seed)
    lessons = Lessons([[Lesson(*pair)] for pair in pairs])
    stage_log = kind.fit(lm, lessons, settings, seed, replace(stage_io or StageIO(), name="teaching"))
    lm.to_own_dtypes(seed)
    return stage_log


def tokens_of(lm: LanguageModel, pairs: Pairs, rows: Rows) -> set[int]:
    """Return the tokens that `rows` selects: the tokens of whole texts (`facts`) or only of the answers (`answers`)."""
    if rows == "all":
        return set()
    whole = rows == "facts"
    texts = (lm.encoder.encode(prompt, answer, end=whole) for prompt, answer in pairs)
    return {token for text in texts for token in (text.ids if whole else text.answer_ids)}


def old_pairs(facts: Iterable[Fact]) -> Pairs:
    """Return the prompt and the old answer of each fact that has one; raise FactError if none has."""
    pairs = [(fact.prompt, fact.ground_truth) for fact in facts if fact.ground_truth]
    if not pairs:
        raise FactError("No fact has an old answer to forget. Give ground_truth, or set facts.old_from = model.")
    return pairs
