"""Prepare the config, the model and the facts of a command, and check them before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from forgetlearn.config.base import Settings, validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.recipes import set_by
from forgetlearn.config.schema import FactsSettings, ModelSettings, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.evaluation import scoring
from forgetlearn.facts import WITHOUT_OLD, Fact, FactSet, Purpose, read_facts, with_old_answers
from forgetlearn.method.checks import check_forgetting, check_learning, check_subjects
from forgetlearn.models import gguf
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.products.chain import check_product
from forgetlearn.storage.records import Row

GivenConfig = RunConfig | Mapping[str, object] | None
GivenModel = LanguageModel | nn.Module | str | Path | None

AS_READ: dict[str, object] = {"limit": None, "columns": {}, "aliases": None}  # for facts that are passed in


def resolve(config: GivenConfig, model: object, facts: FactSet | str | Path | None) -> RunConfig:
    """Return the config, updated with the model and the facts that are passed in.

    Raises:
        ConfigError: no model is named, or the config contradicts the model or the facts that are passed in.
    """
    config = config if isinstance(config, RunConfig) else validate(RunConfig, config or {})
    return config.model_copy(
        update={
            "model": _model_settings(config.model, model),
            "facts": _facts_settings(config.facts, facts, set_by(config.recipe, "facts")),
        }
    )


def files_read(config: RunConfig) -> tuple[str | Path | None, ...]:
    """Return the files and folders that a config names as its input; a run must not write over any of them."""
    keep = config.keep
    return config.model.name, config.facts.source, keep.source, *keep.facts, *keep.earlier, config.edit.moments


def _model_settings(settings: ModelSettings, model: object) -> ModelSettings:
    if isinstance(model, LanguageModel):
        _no_contradiction("model", settings, model.settings, "the model that is passed in was wrapped or loaded with")
        return model.settings.model_copy(update={"name": model.name})
    if isinstance(model, (str, Path)):
        return settings.model_copy(update={"name": gguf.resolved(str(model))})
    if model is not None:
        return settings
    if settings.name is None:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    return settings.model_copy(update={"name": gguf.resolved(settings.name)})


def _facts_settings(
    settings: FactsSettings, facts: FactSet | str | Path | None, of_recipe: Mapping[str, object]
) -> FactsSettings:
    if isinstance(facts, FactSet):
        own = settings.model_copy(update={"source": facts.source, "old_from": facts.old_from, **AS_READ})
        why = "the facts that are passed in were read with"
        _no_contradiction("facts", settings, own, why, of_recipe)
        return own
    return settings if facts is None else settings.model_copy(update={"source": str(facts)})


def _no_contradiction(
    part: str, asked: Settings, given: Settings, why: str, of_recipe: Mapping[str, object] | None = None
) -> None:
    """Raise ConfigError if a setting that the user chose, and no recipe, is not the one that is given."""
    for name in sorted(asked.model_fields_set - {"name", "source"}):
        by_recipe = of_recipe is not None and of_recipe.get(name) == getattr(asked, name)
        if not by_recipe and getattr(asked, name) != getattr(given, name):
            raise ConfigError(f"{part}.{name} = {getattr(asked, name)!r}, but {why} {getattr(given, name)!r}.")


def read_config_facts(config: RunConfig, purpose: Purpose | None = None) -> FactSet:
    """Read the facts that the config names; their purpose is that of its method unless another is given."""
    settings = config.facts
    if not settings.source:
        raise ConfigError("facts.source is not set. Give --facts with a file of facts (JSON, JSONL, CSV, TSV, XLSX).")
    return read_facts(
        settings.source,
        old_from=settings.old_from,
        limit=settings.limit,
        strict=settings.strict,
        columns=settings.columns,
        aliases=settings.aliases,
        purpose=purpose or purpose_of(config),
    )


def purpose_of(config: RunConfig) -> Purpose:
    """Return what the config's method does with facts."""
    return "learn" if METHODS[config.method].learns else "forget"


def asked_answers(lm: LanguageModel, facts: FactSet, config: RunConfig) -> list[Row]:
    """Return the model's own answers to the facts that have no other old answer (policy `model`)."""
    waiting = frozenset(facts.to_ask)
    return scoring.ask(lm, [fact for fact in facts if fact.id in waiting], config.evaluate)


def with_the_models_answers(
    facts: FactSet, rows: list[Row], config: RunConfig, purpose: Purpose | None = None
) -> FactSet:
    """Return the facts with the model's answers as old answers (policy `model`), except answers that were cut off."""
    return with_old_answers(
        facts,
        {row.fact: row.said or "" for row in rows},
        unfinished={row.fact for row in rows if row.truncated},
        writes_on=any(row.writes_on for row in rows),
        strict=config.facts.strict,
        to_forget=(purpose or purpose_of(config)) == "forget",
    )


def check_new_answers(facts: Iterable[Fact]) -> None:
    """Raise FactError if a fact that is to be learned has no new answer."""
    if missing := next((fact for fact in facts if not fact.target_new), None):
        raise FactError(
            f"{missing.place} has no new answer to learn (prompt {missing.prompt[:60]!r}). Give target_new. To forget "
            "the old answer: forgetlearn forget."
        )


def check_old_answers(facts: FactSet, config: RunConfig) -> None:
    """Raise FactError if a stage needs old answers and no fact has one, or learns a fact without a new answer.

    Pass if the model has yet to be asked about some facts, because they may still get an old answer.
    """
    stages = Stages(config)
    if not stages.method.learns:  # without an old answer, a fact's only answer is forgotten
        return
    check_new_answers(facts)
    if not stages.needs_old_answers or facts.to_ask or any(fact.ground_truth for fact in facts):
        return
    reason = f"method {config.method} forgets" if stages.method.forgets else "teach.epochs > 0 teaches"
    counts = ", ".join(f"{count} {why}" for why, count in facts.without_old.items())
    if "model" in facts.old_from:
        remedy = "\n".join(WITHOUT_OLD[why] for why in facts.without_old if why == "unfinished_old_answer")
        remedy = (
            remedy or "The model says nothing: take the old answers from the file, or choose a method that only learns."
        )
    else:
        remedy = "Add the field ground_truth, or pass --old-from model to forget what the model says itself."
    raise FactError(f"{facts.source}: {reason} old answers, but no fact has one ({counts}).\n{remedy}")


def check_stages(stages: Stages, lm: LanguageModel, facts: FactSet) -> None:
    """Raise an error if the settings of a stage do not fit this model or these facts; see `method.checks`."""
    if stages.method.closed_form:
        check_subjects(facts)
    if stages.method.learns:
        check_learning(lm, stages.learn.settings, stages.learn.kind.name)
    if stages.forget:
        check_forgetting(lm, stages.forget.settings, stages.forget.kind.name)


def check_quantization(stages: Stages) -> None:
    """Raise ConfigError if the config quantises the base, but the update needs unquantised weights."""
    settings = stages.config.model
    if settings.quantization == "none":
        return
    place = f"model.quantization = {settings.quantization}"
    if stages.changes_base:
        raise ConfigError(
            f"{place}: this update changes the base's own weights, which a 4-bit base cannot store. Choose lora "
            "or f-lora, without teach.epochs and save_merged."
        )
    if stages.chooses_coefficient:
        raise ConfigError(f"{place}: forget.coef = auto restores the base's weights. Give a number.")
    if settings.shard:
        raise ConfigError(f"{place}: a sharded model (model.shard) cannot be quantised.")


def check_weights(*models: object) -> None:
    """Raise RunError if a model folder that forgetlearn wrote no longer has the weights of its last update."""
    for named in models:
        if isinstance(named, (str, Path)) and Path(named).is_dir():
            check_product(Path(named), ".safetensors")
