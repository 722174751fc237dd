"""What is asked of a reproduction, checked before anything is written: parts, facts, configs, the model's depth."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from forgetlearn.config import preflight
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS, MethodName
from forgetlearn.config.schema import EvaluateSettings, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, ForgetLearnError, MissingExtraError, ModelError
from forgetlearn.evaluation import general_ability
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.facts import read_facts
from forgetlearn.method import keeping
from forgetlearn.models import hub
from forgetlearn.models.language_model import LanguageModel, layer_list
from forgetlearn.models.loading import pick_device
from forgetlearn.models.texts import check_texts
from forgetlearn.planning.outline import Outline, outline_of
from forgetlearn.reproduction import published
from forgetlearn.reproduction.measure import Job
from forgetlearn.reproduction.published import DataName
from forgetlearn.reproduction.settings import (
    FIGURE_KINDS,
    FIRST_SEED_ONLY,
    METHOD_OF_KIND,
    WITH_METHODS,
    PaperSettings,
    PartName,
    at_rate,
    method_config,
    methods_of,
)
from forgetlearn.reproduction.workspace import DataSet, Workspace
from forgetlearn.runs.checks import GivenConfig, check_old_answers, check_stages, check_weights, resolve

log = logging.getLogger("forgetlearn")
OLD_FROM: Mapping[DataName, str] = {"zsre": "pred", "counterfact": "answers"}
NOT_GENERAL: Mapping[str, object] = {"general_prompts": False, "general": None, "probes": ("none",)}
Files = Mapping[DataName, str | Path | None]


@dataclass(frozen=True)
class Request:
    """A reproduction whose input was checked, before anything is written."""

    settings: PaperSettings
    config: RunConfig
    parts: tuple[PartName, ...]
    data: tuple[DataSet, ...]
    outline: Outline
    n_layers: int  # of the model
    left_out: tuple[str, ...]

    @property
    def job(self) -> Job:
        """What the parts need beside a workspace."""
        return Job(self.parts, self.n_layers, tasks_of(self.config.evaluate))

    def workspaces(self, output: Path) -> Iterator[tuple[Workspace, tuple[PartName, ...]]]:
        """Yield each workspace, with the parts to measure in it."""
        for data in self.data:
            for seed in self.settings.seeds:
                own = tuple(part for part in self.parts if self.is_in(part, data, seed))
                if own:
                    yield Workspace(output, data, seed), own

    def is_in(self, part: PartName, data: DataSet, seed: int) -> bool:
        """Return True if a part is measured on this data set with this seed. All but table 1 are on ZsRE alone."""
        on_data = data.name == "zsre" or part == "table1"
        return on_data and (seed == self.settings.seeds[0] or part not in FIRST_SEED_ONLY)


def prepare(
    model: str | Path | None = None,
    *,
    zsre: str | Path | None = None,
    counterfact: str | Path | None = None,
    settings: PaperSettings | None = None,
    config: GivenConfig = None,
) -> Request:
    """Check the input of a reproduction, without reading the model's weights. See `paper` for errors."""
    settings = settings or PaperSettings()
    config = _resolved(model, config)
    files: Files = {"zsre": zsre, "counterfact": counterfact}
    parts, left_out = _parts(settings, files, config.evaluate)
    check_weights(config.model.name)
    outline = outline_of(config.model)
    if outline.encoder is None:
        raise ModelError(f"{outline.name}: {' '.join(outline.notes)}")
    skeleton = outline.skeleton().model
    n_layers = len(layer_list(skeleton)[1])
    data = tuple(
        _data_set(name, str(file), settings, config, n_layers) for name, file in files.items() if file is not None
    )
    device = pick_device(config.model.device)
    lm = LanguageModel(skeleton, outline.encoder, outline.name, device, config.model, {})
    for each in data:
        check_texts(outline.encoder, each.facts)
        keeping.check(config.keep, each.facts)
        for method in _methods_used(parts, each):
            check_old_answers(each.facts, each.configs[method])
            _check_method(method, each, lm)
    return Request(settings, config, parts, data, outline, n_layers, tuple(left_out))


def _methods_used(parts: Collection[PartName], data: DataSet) -> list[MethodName]:
    """Return the methods that these parts run: those with a row, and those of the figures and of tables 4 and 5."""
    used = set(data.methods) if WITH_METHODS & set(parts) else set()
    used |= {METHOD_OF_KIND[FIGURE_KINDS.get(part, "all weights")] for part in set(parts) - WITH_METHODS}
    return [method for method in data.configs if method in used]


def _check_method(method: MethodName, data: DataSet, lm: LanguageModel) -> None:
    try:
        check_stages(Stages(data.configs[method]), lm, data.facts)
    except ForgetLearnError as error:
        if not METHODS[method].closed_form:
            raise
        raise type(error)(f"{method}: {error}\nOr choose rows without it: --methods.") from error


def _resolved(model: str | Path | None, config: GivenConfig) -> RunConfig:
    """Return the config, with the recipe `paper` unless it names another, which is an error."""
    if model is not None and not isinstance(model, (str, Path)):
        raise ConfigError("model: each seed starts from the model's files, so give a folder or a hub id.")
    if not isinstance(config, RunConfig):
        config = validate(RunConfig, {"recipe": "paper", **(config or {})})
    config = resolve(config, model, None)
    if config.recipe != "paper":
        raise ConfigError(f"recipe = {config.recipe}: only the recipe paper is reproduced. Set recipe = paper.")
    preflight.check("paper", config)
    check_engine(config.evaluate, changed_by="paper")
    return config


def _parts(settings: PaperSettings, files: Files, evaluate: EvaluateSettings) -> tuple[tuple[PartName, ...], list[str]]:
    """Return the parts to reproduce, and what is left out; raise ConfigError if a part cannot be reproduced."""
    parts, left_out = settings.parts, []
    if files["counterfact"] is not None and settings.score_table == "table2":
        model = published.MODELS[settings.like]
        raise ConfigError(f"counterfact: the paper has no figures of {model} on COUNTERFACT. Leave out the file.")
    if not any(files.values()) and parts == ("table1",):
        raise ConfigError("table1 needs facts. Give --zsre or --counterfact, or both.")
    if settings.methods and not WITH_METHODS & set(parts):
        raise ConfigError(f"methods: {', '.join(parts)} has no rows of methods. Leave it out.")
    on_zsre = [part for part in parts if part != "table1"]
    if on_zsre and files["zsre"] is None:
        raise ConfigError(
            f"{', '.join(on_zsre)}: measured on ZsRE. Give its file with --zsre, or other parts with --only."
        )
    if "table1" in parts:
        left_out += [
            f"table1 on {published.TITLES[name]}: --{name} was not given"
            for name, file in files.items()
            if file is None
        ]
    if "table5" in parts and (why := _why_no_tasks(evaluate)):
        if "table5" in settings.only:
            raise ConfigError(f"table5: {why}")
        left_out.append(f"table5: {why}")
        parts = tuple(part for part in parts if part != "table5")
    for each in left_out:
        log.warning("left out: %s", each)
    return parts, left_out


def _data_set(name: DataName, file: str, settings: PaperSettings, config: RunConfig, n_layers: int) -> DataSet:
    """Read a data set, and return it with the config of each method in the paper's table."""
    reading = config.facts
    facts = read_facts(
        file,
        old_from=OLD_FROM[name],
        limit=reading.limit,
        strict=reading.strict,
        columns=reading.columns,
        aliases=reading.aliases,
    )
    scored = config.evaluate.model_copy(update={"protocols": ("token",), **NOT_GENERAL, "tasks": ()})
    source = reading.model_copy(update={"source": file, "old_from": facts.old_from})
    config = config.model_copy(update={"facts": source, "evaluate": scored})
    methods = methods_of(settings.like, name)
    configs = {method: method_config(config, settings.like, name, method, n_layers) for method in methods}
    teaching = at_rate(config, published.SETTINGS[settings.like, name].learning_rate)
    return DataSet(name, facts, teaching, configs, settings.methods_on(name))


def _why_no_tasks(evaluate: EvaluateSettings) -> str | None:
    """Return why table 5 cannot be measured; None if it can."""
    try:
        general_ability.check(tasks_of(evaluate))
    except MissingExtraError as error:
        return str(error)
    if not evaluate.tasks and not hub.is_reachable():
        return (
            "the paper's tasks are on the hub, which cannot be reached. Give --tasks, with "
            "--set evaluate.task_folder=DIR for tasks of your own."
        )
    return None


def tasks_of(evaluate: EvaluateSettings) -> EvaluateSettings:
    """Return the settings that measure table 5: the tasks that are given, or the paper's."""
    tasks = evaluate.tasks or tuple(task for task in published.ABILITY if not task.endswith("math"))
    return evaluate.model_copy(update={"tasks": tasks, **NOT_GENERAL})
