"""Forget, then learn: the method on one screen. `runs.update` adds scores, files and resume.

    knowledge parameters    tau    = FT(theta, old facts) - theta
    forgetting              theta' = theta - coef * tau
    learning                theta* = FT(theta', new facts)

Source: Ni et al., "Forgetting before Learning", ACL 2024, arXiv:2311.08011.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from forgetlearn.config.methods import How
from forgetlearn.config.schema import ForgetSettings, Modules, Rows, StageSettings, TuningSettings
from forgetlearn.errors import ConfigError, FactError, some
from forgetlearn.facts import Fact
from forgetlearn.method import keeping
from forgetlearn.method.controls import controlled
from forgetlearn.models import lora, module_names
from forgetlearn.models import modules as selection
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import LanguageModel, editable_module
from forgetlearn.runtime import sharding
from forgetlearn.training.finetune import StageLog, Variant, check_computing, finetune
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights import task_vector
from forgetlearn.weights.adapter_files import ALL_LINEAR

log = logging.getLogger("forgetlearn")

# Each stage draws from its own stream, so that learning is the same whether or not forgetting went before.
SEED_OFFSETS = {"learn": 0, "forget": 1_000_003, "teach": 2_000_003}


def stage_seed(seed: int, stage: str) -> int:
    """The seed of a stage (`learn`, `forget`, `teach`) of a run with this seed."""
    return (seed + SEED_OFFSETS[stage]) % 2**32


def forget(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: ForgetSettings,
    how: How = "lora",
    *,
    seed: int = 0,
    keep: Sequence[Fact] = (),
    stage_io: StageIO | None = None,
) -> StageLog:
    """Fine-tune on the old answers, subtract `coef` times what that added; `lm` is changed in place.

    With all weights `lm.model` is then the forgotten model, in float32. With LoRA the base keeps its
    weights and `lm.model` carries a frozen adapter "forget" with -coef folded in.

    Of what is subtracted the facts in `keep` are spared, as `settings.keep_by` says (`keeping.read_keep` reads them).
    Facts without an old answer have nothing to forget, and are passed over.

    Raises:
        FactError: no fact has an old answer.
        ConfigError: facts to keep, and not with all weights.
    """
    if keep:
        _check_keep(how)
    if how == "ascent":  # nothing is subtracted: `coef` scales the rate, since Adam does not see the scale of a loss
        slower = settings.model_copy(update={"learning_rate": settings.number * settings.learning_rate})
        return tune_on_old(lm, facts, slower, how, seed=seed, stage_io=stage_io)
    facts = list(facts)
    base = None if how == "lora" else _base_to_subtract_from(lm, stage_io)
    kept = None if base is None or not keep else measure_keep(lm, facts, keep, settings, base, seed=seed)
    stage_log = tune_on_old(lm, facts, settings, how, seed=seed, stage_io=stage_io)
    subtract_old(lm, settings, base, seed=seed, kept=kept, facts=facts)
    return stage_log


def measure_keep(
    lm: LanguageModel,
    facts: Sequence[Fact],
    keep: Sequence[Fact],
    settings: ForgetSettings,
    base: task_vector.StateDict,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What `keeping.spared` has to know of the facts to keep; the weights of `lm`, those of `base`, stay."""
    if settings.keep_by == "fisher":
        all_weights(lm)
        wanted, kept = (keeping.squared_gradients(lm.model, _old_texts(lm, part), lm.device) for part in (facts, keep))
        return keeping.fisher_weights(wanted, kept)
    tune_on_old(lm, keep, settings, "all weights", seed=seed)
    vector = task_vector.TaskVector.between(base, task_vector.snapshot(lm.model))
    task_vector.load_into(lm.model, base)
    return dict(vector.deltas)


def float32_snapshot(lm: LanguageModel) -> dict[str, Tensor]:
    """The base's weights before forgetting. In float32, or the forgotten ones would be rounded to its dtype."""
    all_weights(lm)
    return task_vector.snapshot(lm.model)


def _base_to_subtract_from(lm: LanguageModel, stage_io: StageIO | None) -> dict[str, Tensor]:
    """As `float32_snapshot`; on the CPU, where training needs the memory itself, it lies on the disk meanwhile."""
    all_weights(lm)
    if lm.device.type != "cpu":
        return task_vector.snapshot(lm.model)
    return task_vector.snapshot_on_disk(lm.model, stage_io.points if stage_io else None)


def tune_on_old(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: ForgetSettings,
    how: How,
    *,
    seed: int = 0,
    stage_io: StageIO | None = None,
) -> StageLog:
    """The first half of forgetting: `lm` fine-tuned on the old answers, as an adapter "forget" or all weights."""
    texts = _old_texts(lm, facts)
    if how == "lora":
        lm.model = lora.attach(lm.model, settings.lora, lora.FORGET, seed)
    else:
        all_weights(lm)
    return _train(lm, texts, settings, how, seed, stage_io, "forgetting", Variant(-1 if how == "ascent" else 1))


def subtract_old(
    lm: LanguageModel,
    settings: ForgetSettings,
    base: task_vector.StateDict | None,
    tuned: task_vector.StateDict | None = None,
    *,
    seed: int = 0,
    kept: task_vector.StateDict | None = None,
    facts: Iterable[Fact] = (),
) -> None:
    """The second half: `base - coef * (tuned - base)`, or the adapter "forget" times -coef where `base` is None.

    `tuned` are the weights of `lm` unless they are given; `settings.modules` says which weights change, `settings.rows`
    which of their rows, by the tokens of the old answers of `facts`, and `kept` (of `measure_keep`) what of the change
    is left out.
    """
    factors = selection.factors(lm.model, settings.modules)
    if base is None:
        lora.scale(lm.model, lora.FORGET, -settings.number, factors)
        lora.activate(lm.model, [lora.FORGET])
        return
    tuned = sharding.parts(lm.model) if tuned is None else tuned
    forgotten = task_vector.subtracted(base, tuned, settings.number, factors)
    if settings.rows != "all":
        tokens = tokens_of(lm, _old_pairs(facts), settings.rows)
        vocabulary = selection.groups(lm.model)["vocabulary"]
        forgotten = selection.only_rows(base, forgotten, vocabulary, tokens, settings.rows)
    if kept is not None:
        forgotten = keeping.spared(base, forgotten, kept, settings.keep_by)
    task_vector.load_into(lm.model, controlled(base, forgotten, settings.control, seed))


def check_forgetting(lm: LanguageModel, settings: ForgetSettings, how: How) -> None:
    """Raise ConfigError if this model cannot be made to forget with these settings.

    Raises:
        ConfigError: the device has no such dtype; `modules` match nothing, or nothing that is trained; LoRA cannot be
            put where it is asked for; a control, rows or facts to keep where there are none.
    """
    check_computing(settings, lm.device)
    factors = selection.factors(lm.model, settings.modules)
    targets = lora.check_targets(lm.model, settings.lora, "forget") if how == "lora" else list(factors)
    if not any(name in factors for name in targets):
        raise ConfigError(
            f"forget.modules = {settings.modules!r}: the adapter changes none of these weights, but for example "
            f"{targets[0]}. Name some that forget.lora.target_modules cover."
        )
    if how == "lora" and settings.modules != module_names.ALL:
        matrices = {name for name, weight in lm.model.named_parameters() if weight.dim() > 1}
        if out_of_reach := [name for name in factors if name in matrices and name not in targets]:
            log.warning(
                "forget.modules = %s: forget.lora.target_modules leave out %d of its matrices, which stay: %s",
                *(settings.modules, len(out_of_reach), some(out_of_reach)),
            )
    if lm.is_sharded and (settings.control != "none" or settings.rows != "all" or settings.keep):
        raise ConfigError(
            "forget.control, forget.rows, forget.keep: they look at whole matrices, and model.shard splits them."
        )
    for name, plain in (("control", "none"), ("rows", "all")):
        if how != "all weights" and getattr(settings, name) != plain:
            raise ConfigError(
                f"forget.{name} = {getattr(settings, name)}: is there for forgetting with all weights alone (f-ft)."
            )
    if settings.rows != "all":
        _check_vocabulary(lm, settings, "forget")
    if settings.keep:
        _check_keep(how)
    if how == "ascent" and settings.modules != module_names.ALL:
        raise ConfigError("forget.modules: gradient ascent (ga) subtracts nothing. Leave it at all.")


def out_of_loras_reach(model: nn.Module, stages: Iterable[tuple[How | None, TuningSettings]]) -> str | None:
    """Describe which matrices the adapters of these stages do not reach under all-linear; None if they reach all.

    One example is experts fused into one tensor: peft adapts modules, and these have none.
    """
    for how, settings in stages:
        if how == "lora" and settings.lora.target_modules == ALL_LINEAR:
            return selection.out_of_reach(model, lora.check_targets(model, settings.lora, "learn"))
    return None


def _check_keep(how: How) -> None:
    if how != "all weights":
        raise ConfigError(
            "forget.keep: is there for forgetting with all weights alone (f-ft). An adapter's change without what the "
            "facts to keep need is no adapter of its rank, and gradient ascent subtracts nothing."
        )


def check_learning(lm: LanguageModel, settings: StageSettings, how: How) -> None:
    """Raise ConfigError if learning cannot train what the settings name.

    Raises:
        ConfigError: the device has no such dtype; LoRA cannot be put where it is asked for; `modules` match nothing,
            give a factor, or the method chooses what it trains itself; `rows` where rows are not held.
    """
    if settings.rows != "all":
        _check_rows(lm, settings, how)
    check_computing(settings, lm.device)
    if how == "lora":
        lora.check_targets(lm.model, settings.lora, "learn")
    if settings.modules == module_names.ALL:
        return
    if how not in ("all weights", "bounded"):
        raise ConfigError(
            f"learn.modules = {settings.modules!r}: is there for learning with all weights; "
            "LoRA takes learn.lora.target_modules, and locft chooses its module."
        )
    if isinstance(settings.modules, dict):
        raise ConfigError("learn.modules: a weight is trained or not, so it takes names without factors.")
    selection.factors(lm.model, settings.modules, "learn.modules")


def _check_vocabulary(lm: LanguageModel, settings: TuningSettings, stage: str) -> None:
    changed = selection.factors(lm.model, settings.modules, f"{stage}.modules")
    if not any(name in changed for name in selection.groups(lm.model).get("vocabulary", ())):
        raise ConfigError(
            f"{stage}.rows = {settings.rows}: {stage}.modules = {settings.modules!r} leave the embeddings and the head "
            "as they are, and only these have a row for each token. Name head, embeddings or vocabulary among them."
        )


def _check_rows(lm: LanguageModel, settings: StageSettings, how: How) -> None:
    if settings.rows != "facts":
        raise ConfigError(f"learn.rows = {settings.rows}: is there for forgetting; learning takes all or facts.")
    if how not in ("all weights", "bounded"):
        raise ConfigError(
            "learn.rows = facts: is there for learning with all weights (ft, f-ft, f-lora-ft, ft-c, ga). locft and "
            "LoRA leave the embeddings and the head alone, unless learn.lora.target_modules name them."
        )
    _check_vocabulary(lm, settings, "learn")
    if lm.is_sharded or settings.deepspeed:
        raise ConfigError("learn.rows = facts: looks at whole matrices, and model.shard and DeepSpeed split them.")
    if settings.weight_decay:
        raise ConfigError(
            f"learn.rows = facts: the rows of other tokens stay, and learn.weight_decay = {settings.weight_decay:g} "
            "would shrink them. Set one of the two to its default."
        )


def learn(
    lm: LanguageModel,
    facts: Iterable[Fact],
    settings: StageSettings,
    how: How = "lora",
    *,
    seed: int = 0,
    stage_io: StageIO | None = None,
) -> StageLog:
    """Fine-tune on the new answers; `lm` is changed in place and is then the product.

    With all weights `lm.model` has no adapter and the dtypes it was loaded in (rounded once, here). With
    LoRA it carries one adapter "default", which holds the forgetting too.
    """
    if settings.rows != "all":
        _check_rows(lm, settings, how)
    facts = list(facts)
    texts = _texts(lm, [(fact.prompt, fact.target_new) for fact in facts])
    if how == "lora":
        lm.model = lora.attach(lm.model, settings.lora, lora.LEARN, seed)
        stage_log = _train(lm, texts, settings, how, seed, stage_io, "learning")
        lora.compose(lm.model, lora.names(lm.model))
        return stage_log
    fold_in(lm, lora.FORGET)
    all_weights(lm)
    train_only(lm.model, how, settings.modules)
    answers = [(fact.prompt, answer) for fact in facts for answer in (fact.ground_truth, fact.target_new) if answer]
    with selection.only_rows_train(lm.model, tokens_of(lm, answers, settings.rows), settings.rows):
        bound = Variant(max_change=settings.max_change if how == "bounded" else None)
        stage_log = _train(lm, texts, settings, how, seed, stage_io, "learning", bound)
    return replace(stage_log, rounding=lm.to_own_dtypes(seed))


def train_only(model: nn.Module, how: How, modules: Modules = module_names.ALL) -> None:
    """Let the weights that a stage without an adapter trains, and they alone, require gradients."""
    model.requires_grad_(how != "one module")
    if how == "one module":
        model.get_submodule(editable_module(model)).requires_grad_(True)
    elif modules != module_names.ALL:
        trained = selection.factors(model, modules, "learn.modules")
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in trained)


def fold_in(lm: LanguageModel, name: str) -> None:
    """Add what an adapter holds, where the model carries one, to the base's weights, in float32."""
    if hasattr(lm.model, "peft_config"):
        lm.to_float32()
        lora.fold_in(lm.model, name)
        lm.model = lora.detach(lm.model)


def all_weights(lm: LanguageModel) -> None:
    """Weights that are trained are float32; half precision would lose the small steps."""
    lm.to_float32()
    lm.model.requires_grad_(True)


def _train(
    lm: LanguageModel,
    texts: list[Encoded],
    settings: TuningSettings,
    how: How,
    seed: int,
    stage_io: StageIO | None,
    name: str,
    variant: Variant = Variant(),  # noqa: B008 (frozen)
) -> StageLog:
    if how == "lora":
        settings = settings.model_copy(update={"learning_rate": settings.lora_learning_rate})
    return finetune(
        lm.model,
        texts,
        settings,
        seed=seed,
        pad_id=lm.pad_id,
        device=lm.device,
        variant=variant,
        stage_io=replace(stage_io or StageIO(), name=name),
    )


def _texts(lm: LanguageModel, pairs: list[tuple[str, str]]) -> list[Encoded]:
    return [lm.encoder.encode(prompt, answer, end=True) for prompt, answer in pairs]


def tokens_of(lm: LanguageModel, pairs: list[tuple[str, str]], rows: Rows) -> set[int]:
    """The tokens that `rows` is about: those of whole texts with `facts`, else those of the answers alone."""
    if rows == "all":
        return set()
    whole = rows == "facts"
    texts = (lm.encoder.encode(prompt, answer, end=whole) for prompt, answer in pairs)
    return {token for text in texts for token in (text.ids if whole else text.answer_ids)}


def _old_texts(lm: LanguageModel, facts: Iterable[Fact]) -> list[Encoded]:
    return _texts(lm, _old_pairs(facts))


def _old_pairs(facts: Iterable[Fact]) -> list[tuple[str, str]]:
    """Return prompt and old answer of the facts that have one; the others have nothing to forget.

    Raises:
        FactError: no fact has an old answer.
    """
    pairs = [(fact.prompt, fact.ground_truth) for fact in facts if fact.ground_truth]
    if not pairs:
        raise FactError("No fact has an old answer to forget. Give ground_truth, or read them with old_from = model.")
    return pairs
