"""Continue an update with the facts that it got wrong (`--failed-only`): the config of the update that does so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from forgetlearn.config.base import Settings, validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import KeepSettings, RunConfig
from forgetlearn.errors import ConfigError, RunError
from forgetlearn.products.chain import Base, product_of
from forgetlearn.products.restore import merge_product
from forgetlearn.runs.checks import GivenConfig, GivenModel
from forgetlearn.storage.run_folder import FAILED, RIGHT, RunFolder

log = logging.getLogger("forgetlearn")
OF_ITS_BASE = {("model", "name"), ("model", "revision"), ("model", "base_model_id")}


def config_for_failed(run_folder: str | Path, config: GivenConfig, model: GivenModel, facts: object) -> RunConfig:
    """Return the config of an update of the facts that a finished run got wrong, its `failed.jsonl`.

    Where the config is a mapping, settings that it leaves out are the run's, unless it names a recipe. The facts are
    replaced, and, unless a model is given, so is the model, by the run's product. An adapter is merged into its base
    first, to the run's folder `merged`. What the run got right, and what it kept of earlier runs, is kept.

    Raises:
        ConfigError: facts are given too, or the product is an adapter whose base is gone.
        ModelError: the product is an adapter whose base has changed.
        RunError: the run is not a finished update, or no fact failed.
    """
    run = RunFolder.open(run_folder)
    failed = run.path / FAILED
    if facts is not None:
        raise ConfigError(
            f"facts.source: with --failed-only the facts are those of {failed}. Omit --facts, or omit --failed-only."
        )
    _check_some_failed(run)
    if not isinstance(config, RunConfig):
        config = validate(RunConfig, _with_settings_of(run, config or {}), where=str(run.path))
    # The file is of the project's own form, however the run's own file was to be read.
    old_from = tuple(policy for policy in config.facts.old_from if policy != "pred") or ("answers",)
    read_as: dict[str, object] = {"source": str(failed), "old_from": old_from, "columns": {}, "aliases": None}
    changes = {"facts": config.facts.model_copy(update=read_as), "keep": _keeping_right(run, config)}
    if model is None:
        changes["model"] = config.model.model_copy(update={"name": str(_product_to_update(run))})
    elif str(model) == str(run.settings.model.name):
        log.warning(
            "%s: was updated in %s, and this update begins without what that learned. Omit --model to continue from "
            "the run's product.",
            *(model, run.path),
        )
    return config.model_copy(update=changes)


def _check_some_failed(run: RunFolder) -> None:
    """Raise RunError unless the run is a finished update that got facts wrong."""
    run.check_results()
    failed = run.path / FAILED
    if run.manifest.finished and METHODS[str(run.manifest.config["method"])].learns is None:
        raise RunError(
            f"{run.path} only forgot, so there is nothing to learn. To go on: forget --facts {failed}"
            " (--documents, if it forgot texts)"
        )
    if not run.manifest.finished or not failed.is_file():
        raise RunError(f"{run.path} has no {FAILED}: it is not a finished update. Give the folder of one.")
    if not failed.stat().st_size:
        raise RunError(
            f"{run.path}: no fact failed: each prompt gets its new answer, none an old one. Nothing is left to update."
        )


def _keeping_right(run: RunFolder, config: RunConfig) -> KeepSettings:
    """Return the settings of keeping, with the facts that the run got right among those to keep."""
    right = run.path / RIGHT
    if not right.is_file() or not right.stat().st_size:
        return config.keep
    if not config.keep.weight or not METHODS[config.method].fine_tunes:
        log.warning("%s: what it got right may change: this update keeps nothing", run.path)
        return config.keep
    return config.keep.model_copy(update={"facts": tuple(dict.fromkeys((*config.keep.facts, str(right))))})


def _with_settings_of(run: RunFolder, given: Mapping[str, object]) -> Mapping[str, object]:
    """Return the given settings; unless they name a recipe, settings that they leave out are the run's.

    Settings that describe the run's base or facts are not taken: where they come from, and that the base was taught.
    """
    if "recipe" in given:
        return given
    recorded = {name: value for name, value in run.manifest.config.items() if name != "facts"}
    recorded["teach"] = {"epochs": 0}  # else a recipe would fill it up
    for name, value in recorded.items():
        if isinstance(value, Mapping):
            recorded[name] = {own: each for own, each in value.items() if (name, own) not in OF_ITS_BASE}
    if "epochs" in _section(given, "learn") and "until" not in _section(given, "learn"):
        recorded["learn"].pop("until", None)  # epochs that are given end learning
    sections = {name: {**own, **_section(given, name)} for name, own in recorded.items() if isinstance(own, Mapping)}
    return {**recorded, **given, **sections}


def _section(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = settings.get(name)
    if isinstance(found, Settings):
        found = found.model_dump(exclude_unset=True)
    return found if isinstance(found, Mapping) else {}


def _product_to_update(run: RunFolder) -> Path:
    """Return the folder of the whole model that a run made; merge an adapter into its base for that."""
    product, merged = product_of(run.path), run.path / "merged"
    if (product / "adapter_config.json").is_file() and not merged.is_dir():
        base = run.path / "taught" if run.settings.teach.epochs > 0 else Base.of(run).folder()
        if base is None:
            raise ConfigError(
                f"model.name: {product} is an adapter, only a whole model can be updated, and the adapter's base is "
                f"gone. Merge it (forgetlearn apply {run.path} --base BASE --merge --output DIR) and give --model DIR."
            )
        log.info("%s: an adapter, which is merged into %s for this update", product, base)
        merge_product(run, base, merged)
    return merged if merged.is_dir() else product
