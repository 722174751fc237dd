"""Refuse or report settings that a command does not use.

One table covers all commands, so that no setting in a run's config is silently ignored. tests/test_preflight.py
compares the table with the settings that each command reads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from forgetlearn.config import recipes
from forgetlearn.config.base import Settings
from forgetlearn.config.methods import FORGETTING_METHODS, METHODS, PLAIN_METHODS, UPDATING_METHODS, MethodName
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError

log = logging.getLogger("forgetlearn")
Command = Literal["update", "forget", "plan", "compare", "paper", "evaluate", "ask"]
OF_FORGETTING = ("coef", "modules", "rows")
WARNED_BY_UPDATE = {f"forget.{name}" for name in OF_FORGETTING}  # see `warn_of_forgetting`


@dataclass(frozen=True)
class Unused:
    """Settings that a command does not use, by name or by section (`teach` means all of `teach.*`).

    Settings that promise a result which the command does not produce are refused wherever they are set (`always`).
    Others may be in a config that several commands share, and are refused only if they are given for this command
    alone, as a flag or with --set.
    """

    names: tuple[str, ...]
    why: str
    always: bool = False


PRODUCTS = ("save_merged", "keep_change", "report_to")
UNLEARN = Unused(("unlearn",), "it is for forget, which learns nothing")
STAGES = ("teach", "forget", "unlearn", "learn", "train", "lora", "edit", "rome", "memit", "alphaedit", "keep")
TRAINING = ("method", "seed", *STAGES, "checkpoint_minutes", "keep_stages", "model.base_model_id")
GENERAL = tuple(
    f"evaluate.{name}" for name in ("max_damage", "general", "general_tokens", "tasks", "task_limit", "task_folder")
)
NO_TRAINING = "nothing is trained or written but answers and scores; update trains"
UNUSED: Mapping[Command, tuple[Unused, ...]] = {
    "update": (UNLEARN,),
    "forget": (
        Unused(("teach",), "the model is taken as it is; an update teaches"),
        Unused(("learn", "edit", "rome", "memit", "alphaedit"), "nothing is learned"),
        Unused(("forget.validation", "forget.trials"), "no coefficient is searched for"),
        Unused(("evaluate.every_phase",), "there are two phases: before and after"),
    ),
    "plan": (UNLEARN,),  # takes whatever an update takes
    "compare": (
        UNLEARN,
        Unused(
            (*GENERAL, *PRODUCTS),
            "a cell keeps scores on facts, no model. Leave them out; an update of the method you choose takes them",
            always=True,
        ),
        Unused(("method", "seed", "forget.coef"), "give --methods, --seeds and --coefs"),
        Unused(("forget.validation", "forget.trials"), "no coefficient is searched for; update --coef auto does"),
        Unused(("evaluate.general_prompts", "evaluate.probes"), "a cell is scored by its facts' own prompts alone"),
        Unused(("keep.earlier",), "cells are compared on their own facts"),
        Unused(("teach",), "the base is taken as it is"),
        Unused(
            ("checkpoint_minutes", "keep_stages", "model.base_model_id", "model.shard"),
            "a cell is done whole, by one process, and keeps no model",
        ),
    ),
    "paper": (
        UNLEARN,
        Unused(
            (*PRODUCTS, "evaluate.max_damage", "evaluate.general", "evaluate.general_tokens"),
            "scores are kept, no models. Leave them out",
            always=True,
        ),
        Unused(("model.shard", "model.quantization"), "all weights are trained, by one process", always=True),
        Unused(
            ("method", "seed", "forget.coef"), "the paper's methods and coefficients are run; give --like and --seeds"
        ),
        Unused(("facts.source", "facts.old_from"), "give --zsre and --counterfact; old answers are the paper's"),
        Unused(("forget.only_known", "forget.validation", "forget.trials"), "all old answers are forgotten"),
        Unused(("learn.until", "learn.max_epochs"), "each method learns for a number of epochs; give learn.epochs"),
        Unused(("learn.modules", "learn.rows"), "the methods differ in what they train"),
        Unused(("alphaedit",), "the paper has no AlphaEdit; compare takes it"),
        Unused(("keep.earlier",), "the paper updates a model once"),
        Unused(
            ("evaluate.protocols", "evaluate.general_prompts", "evaluate.probes", "evaluate.every_phase"),
            "the parts differ in what they score",
        ),
        Unused(
            ("checkpoint_minutes", "keep_stages", "model.base_model_id"), "stages are done whole, and no model is kept"
        ),
    ),
    "evaluate": (
        Unused((*PRODUCTS, "evaluate.max_damage"), NO_TRAINING, always=True),
        Unused((*TRAINING, "evaluate.every_phase"), NO_TRAINING),
    ),
    "ask": (
        Unused(PRODUCTS, NO_TRAINING, always=True),
        Unused(TRAINING, NO_TRAINING),
        Unused(("facts", "model.shard"), "the prompts on the command line are asked, by one process"),
        Unused(
            (
                *("evaluate.protocols", "evaluate.every_phase", "evaluate.general_prompts", "evaluate.probes"),
                *GENERAL,
            ),
            "answers are printed, not scored; evaluate scores",
        ),
    ),
}


def check(command: Command, config: RunConfig, given: Collection[str] | None = None) -> None:
    """Raise ConfigError if the command would ignore a setting that the user relies on.

    `given` lists the settings given for this command alone (flags, --set), by dotted name. Without it, unused settings
    are logged. The command line passes `given`; the function that it then calls does not, and so logs the rest.
    """
    departing, problems, passed_over = changed(config), [], []
    for row in UNUSED[command]:
        names = [name for name in departing if is_within(name, row.names)]
        refused = names if row.always else [name for name in names if is_within(name, given or ())]
        if refused:
            problems.append(f"{', '.join(refused)}: not used by {command}: {row.why}.")
        passed_over += [name for name in names if name not in refused and not row.always]
    if problem := _wrong_method(command, config.method):
        problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    departs = recipes.overridden(dict(config), config.recipe) if command in ("update", "forget", "compare") else []
    if departs and given is None:
        log.info("recipe %s, except for these settings: %s", config.recipe, ", ".join(departs))
    if passed_over and given is None:
        log.info("%s does not use these settings of the config: %s", command, ", ".join(_by_section(passed_over)))


def _wrong_method(command: Command, name: MethodName) -> str | None:
    """Return why this command does not take this method, and what takes it; None if it does."""
    method = METHODS[name]
    if command in ("update", "plan") and method.in_context:
        return (
            f"method = {name}: changes no weight, so an update makes no product. "
            f"Score it with forgetlearn compare --methods {name}."
        )
    if command in ("update", "plan") and not method.learns:
        return (
            f"method = {name}: only forgets. forgetlearn forget takes it; an update takes "
            f"{', '.join(UPDATING_METHODS)}."
        )
    if command == "forget" and method.learns:
        return (
            f"method = {name}: learns new answers. forgetlearn update takes it; forget takes "
            f"{', '.join(FORGETTING_METHODS)}."
        )
    return None


def does_not_forget(method: MethodName) -> str:
    """Return the reason why settings of forgetting have no effect with this method, and which method has one."""
    return f"{method} does not forget" + (f"; --method f-{method} does" if method in PLAIN_METHODS else "")


def idle(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the settings that have no effect on an update with this config, by name or section, and why."""
    stages = Stages(config)
    if not stages.method.learns:
        yield from _idle_in_forgetting(config)
        return
    if not stages.forget:
        yield "forget", "forget.coef is 0" if stages.method.forgets else does_not_forget(config.method)
    elif not stages.chooses_coefficient:
        for name in ("validation", "trials"):
            yield f"forget.{name}", "it is for forget.coef = auto"
    if not any(stage.kind.adapter for stage in stages):
        yield "lora", f"{config.method} trains no adapter"
    yield from _idle_in_saving(config)
    yield from _idle_in_editing(config)
    if not stages.learn.kind.bounded:
        yield "learn.max_change", "it is for method ft-c"
    if not stages.teach:
        yield "teach", "teach.epochs is 0"
    if not stages.method.closed_form:
        yield from _idle_in_training(config)
    yield from _idle_in_scoring(config)
    asks = "generate" in config.evaluate.protocols or "model" in config.facts.old_from
    if not asks and not (stages.forget and config.forget.only_known):
        yield "evaluate.max_new_tokens", "nothing is generated"


def _idle_in_forgetting(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the settings without effect on forgetting alone."""
    kind = METHODS[config.method].last
    if kind.until_gone:
        yield "forget.epochs", f"{config.method} ends by itself, after unlearn.max_epochs at the latest"
        yield "forget.modules", f"{config.method} subtracts nothing"
        yield "forget.rows", f"{config.method} subtracts nothing"
    else:
        yield "unlearn.max_epochs", f"{config.method} takes forget.epochs"
    if not kind.adapter and not config.unlearn.relearn_steps:
        yield "lora", f"{config.method} trains no adapter"
    yield from _idle_in_saving(config)
    yield from _idle_in_keeping(config)
    yield from _idle_in_scoring(config)


def _idle_in_saving(config: RunConfig) -> Iterator[tuple[str, str]]:
    if METHODS[config.method].makes_adapter:
        yield "keep_change", f"the product of {config.method} is an adapter"
    else:
        yield "save_merged", f"the product of {config.method} is a whole model"


def _idle_in_editing(config: RunConfig) -> Iterator[tuple[str, str]]:
    method = METHODS[config.method]
    if method.closed_form:
        for section in ("learn", "keep") if Stages(config).teach else ("learn", "train", "keep"):
            yield section, f"{config.method} fine-tunes nothing"
    else:
        yield "edit", f"it is for methods {', '.join(name for name, each in METHODS.items() if each.closed_form)}"
    readers = {
        "rome": ("rome",),
        "memit.layers": ("memit", "alphaedit"),
        "memit.moment_weight": ("memit",),
        "alphaedit": ("alphaedit",),
    }
    for name, methods in readers.items():
        if config.method not in methods:
            yield name, f"it is for method {' and '.join(methods)}"


def _idle_in_keeping(config: RunConfig) -> Iterator[tuple[str, str]]:
    if not config.keep.weight:
        if METHODS[config.method].learns:  # else, facts in it are scored
            yield "keep.source", "keep.weight is 0"
        yield "keep.neighbours", "keep.weight is 0"
        yield "lora.null_space", "keep.weight is 0"
    elif config.model.shard:
        yield "lora.null_space", "model.shard splits the weights"


def _idle_in_scoring(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.evaluate.general is None:
        yield "evaluate.general_tokens", "evaluate.general names no text"
    if not config.evaluate.tasks:
        yield "evaluate.task_limit", "evaluate.tasks names none"
        yield "evaluate.task_folder", "evaluate.tasks names none"


def _idle_in_training(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield from _idle_in_keeping(config)
    if config.learn.until == "epochs":
        yield "learn.max_epochs", "learn.until is epochs"
    else:
        yield "learn.epochs", "learn.until is learned"


def warn_of_idle(configs: Sequence[RunConfig], given: Collection[str], passed_over: Collection[str] = ()) -> None:
    """Warn about each setting given for this command that has no effect on any of the updates with these configs.

    `passed_over` are settings that the command itself warns about.
    """
    rows = [dict(idle(config)) for config in configs]
    for name, value in changed(configs[0]).items():
        if not is_within(name, given) or name in passed_over:
            continue
        reasons = [next((why for own, why in each.items() if is_within(name, [own])), None) for each in rows]
        if None not in reasons:
            log.warning("%s = %s has no effect: %s", name, value, reasons[0])


def warn_of_forgetting(config: RunConfig) -> None:
    """Warn about each setting of forgetting that is given, in a config whose method does not forget."""
    for name in OF_FORGETTING:
        if name in config.forget.model_fields_set:
            value = getattr(config.forget, name)
            log.warning("forget.%s = %s has no effect: %s", name, value, does_not_forget(config.method))


def is_within(name: str, settings: Collection[str]) -> bool:
    """Return True if `settings` contains this setting or its section."""
    return any(name == own or name.startswith(f"{own}.") for own in settings)


def changed(config: RunConfig) -> dict[str, object]:
    """Return the settings that differ from their defaults in the recipe, by dotted name, with their values."""
    defaults = dict(_flat(RunConfig(recipe=config.recipe))) | {"recipe": RunConfig().recipe}
    return {name: value for name, value in _flat(config) if value != defaults[name]}


def _flat(settings: Settings, section: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every setting."""
    for name, value in settings:
        if isinstance(value, Settings):
            yield from _flat(value, f"{section}{name}.")
        else:
            yield section + name, value


def _by_section(names: Collection[str]) -> list[str]:
    """Return the names. Three or more from one section are shortened to, for example, `learn.*`."""
    sections = [name.partition(".")[0] for name in names]
    return list(dict.fromkeys(f"{s}.*" if sections.count(s) > 2 else n for n, s in zip(names, sections, strict=True)))
