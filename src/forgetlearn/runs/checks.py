"""What an update reads: the config with what was passed in, its facts, and the checks before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetlearn.evaluation import scoring
from forgetlearn.method import keeping
from forgetlearn.config.schema import AUTO, FactsSettings, ModelSettings, RunConfig, TuningSettings
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import (
    WITHOUT_OLD,
    Fact,
    FactSet,
    read_facts,
    with_old_answers,
)
from forgetlearn.products.chain import check_product
from forgetlearn.config.methods import METHODS, How
from forgetlearn.method.core import (
    check_forgetting,
    check_learning,
    out_of_loras_reach,
)
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.evaluation.scoring import Row
from forgetlearn.config.base import Settings, validate


def resolve(
    config: RunConfig | Mapping[str, Any] | None, model: object, facts: FactSet | str | Path | None
) -> RunConfig:
    """The config with what was passed in written into it.

    Raises:
        ConfigError: no model is named, or the config contradicts a model or facts that are passed in.
    """
    config = config if isinstance(config, RunConfig) else validate(RunConfig, config or {})
    return config.model_copy(
        update={"model": _model_settings(config.model, model), "facts": _facts_settings(config.facts, facts)}
    )


def _model_settings(settings: ModelSettings, model: object) -> ModelSettings:
    if isinstance(model, LanguageModel):
        _no_contradiction("model", settings, model.settings, "the model that is passed in was wrapped or loaded with")
        return model.settings.model_copy(update={"name": model.name})
    if isinstance(model, (str, Path)):
        return settings.model_copy(update={"name": str(model)})
    if model is None and settings.name is None:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    return settings


AS_READ: dict[str, Any] = {"limit": None, "columns": {}, "aliases": None}  # of facts that are read already


def _facts_settings(settings: FactsSettings, facts: FactSet | str | Path | None) -> FactsSettings:
    if isinstance(facts, FactSet):
        own = settings.model_copy(update={"source": facts.source, "old_from": facts.old_from, **AS_READ})
        _no_contradiction("facts", settings, own, "the facts that are passed in were read with")
        return own
    return settings if facts is None else settings.model_copy(update={"source": str(facts)})


def _no_contradiction(part: str, asked: Settings, given: Settings, why: str) -> None:
    for name in sorted(asked.model_fields_set - {"name", "source"}):
        if getattr(asked, name) != getattr(given, name):
            raise ConfigError(f"{part}.{name} = {getattr(asked, name)!r}, but {why} {getattr(given, name)!r}.")


def read_config_facts(config: RunConfig) -> FactSet:
    """The facts that the config names."""
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
    )


def asked_answers(lm: LanguageModel, facts: FactSet, config: RunConfig) -> list[Row]:
    """Ask the model about the facts that have no old answer from elsewhere (policy `model`)."""
    waiting = frozenset(facts.to_ask)
    return scoring.probe(lm, [fact for fact in facts if fact.id in waiting], config.evaluate)


def with_the_models_answers(facts: FactSet, rows: list[Row], config: RunConfig) -> FactSet:
    """Take what the model said as old answers (policy `model`), unless it was cut off."""
    return with_old_answers(
        facts,
        {row["fact"]: row["said"] or "" for row in rows},
        unfinished={row["fact"] for row in rows if row["truncated"]},
        strict=config.facts.strict,
    )


def check_old_answers(facts: FactSet, config: RunConfig) -> None:
    """Raise FactError if the method needs old answers and no fact has one.

    Facts that the model has still to be asked about may get one, so they pass.
    """
    method = METHODS[config.method]
    needs = (method.forgets and config.forget.coef != 0) or config.teach.epochs > 0
    if not needs or facts.to_ask or any(fact.ground_truth for fact in facts):
        return
    reason = f"method {config.method} forgets" if method.forgets else "teach.epochs > 0 teaches"
    counts = ", ".join(f"{count} {why}" for why, count in facts.without_old.items())
    if "model" in facts.old_from:
        remedy = "\n".join(WITHOUT_OLD[why] for why in facts.without_old if why == "unfinished_old_answer")
        remedy = (
            remedy or "The model says nothing: take the old answers from the file, or choose a method that only learns."
        )
    else:
        remedy = "Add the field ground_truth, or pass --old-from model to forget what the model says itself."
    raise FactError(f"{facts.source}: {reason} old answers, but no fact has one ({counts}).\n{remedy}")


def check_stages(config: RunConfig, lm: LanguageModel) -> None:
    """Raise ConfigError if the settings of a stage do not fit this model.

    Raises:
        ConfigError: the dtype, the modules or what LoRA is to adapt cannot be had.
    """
    method = METHODS[config.method]
    check_learning(lm, config.learn, method.learns)
    if config.forget.coef != 0 and method.forgets:
        check_forgetting(lm, config.forget, method.forgets)


def left_by_lora(config: RunConfig, lm: LanguageModel) -> str | None:
    """Return `method.out_of_loras_reach` for the stages of an update with this config."""
    method = METHODS[config.method]
    stages: list[tuple[How | None, TuningSettings]] = [(method.learns, config.learn)]
    if config.forget.coef != 0:
        stages.append((method.forgets, config.forget))
    return out_of_loras_reach(lm.model, stages)


def check_quantization(config: RunConfig) -> None:
    """Raise ConfigError if the config needs unquantised weights, but quantises the base.

    Raises:
        ConfigError: a stage, or what is written at the end, needs weights that are not quantised.
    """
    if config.model.quantization == "none":
        return
    place = f"model.quantization = {config.model.quantization}"
    if trains_all_weights(config):
        raise ConfigError(
            f"{place}: this update changes the base's own weights, which 4 bits cannot hold. Choose lora or f-lora, "
            "without teach.epochs and save_merged."
        )
    if config.forget.coef == AUTO:
        raise ConfigError(f"{place}: forget.coef = auto sets the base's weights again. Give a number.")
    if config.model.shard:
        raise ConfigError(f"{place}: a model that is split over processes (model.shard) cannot be quantised.")


def facts_to_keep(facts: FactSet, config: RunConfig) -> list[Fact]:
    """See `keeping.read_keep`.

    Raises:
        ConfigError: the method does not forget, or its coefficient is still to be chosen.
    """
    if not config.forget.keep:
        return []
    if not METHODS[config.method].forgets:
        raise ConfigError(
            f"forget.keep = {config.forget.keep}: {config.method} does not forget, and learning does not spare these "
            "facts. Choose f-ft, or leave it out."
        )
    if config.forget.coef == AUTO:
        raise ConfigError("forget.keep: with forget.coef = auto it is not taken into account. Give a number.")
    return keeping.read_keep(config.forget, facts)


def check_weights(*models: object) -> None:
    """Raise RunError if models that are products on this disk have other weights than their last updates wrote.

    Raises:
        RunError: which files are others; what is made of them would say nothing of it.
    """
    for named in models:
        if isinstance(named, (str, Path)) and Path(named).is_dir():
            check_product(Path(named), ".safetensors")


def trains_all_weights(config: RunConfig) -> bool:
    """Whether a stage of such an update, or what is written at its end, needs the base in float32."""
    method = METHODS[config.method]
    return (
        method.learns != "lora"
        or method.forgets not in (None, "lora")
        or bool(config.teach.epochs or config.save_merged)
    )
