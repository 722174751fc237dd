"""One update, end to end: read, score, probe, forget, score, learn, score, report; resumable after any stage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetlearn.config import preflight
from forgetlearn.evaluation import general_ability
from forgetlearn.method import keeping
from forgetlearn.models import prompts
from forgetlearn.planning import plan
from forgetlearn.products import chain, restore
from forgetlearn.report import run_page
from forgetlearn.runs import coefficient
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk, records, run_folder
from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.errors import ModelError, RunError
from forgetlearn.facts import Fact, FactSet, GivenFacts, as_fact_set
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.models.identity import NAMES, Identity, base_of
from forgetlearn.runs.checks import (
    asked_answers,
    check_old_answers,
    check_quantization,
    check_stages,
    check_weights,
    facts_to_keep,
    left_by_lora,
    read_config_facts,
    resolve,
    trains_all_weights,
    with_the_models_answers,
)
from forgetlearn.storage.locks import only_writer
from forgetlearn.config.methods import METHODS
from forgetlearn.models.language_model import LanguageModel, as_language_model
from forgetlearn.training.callbacks import check_trackers
from forgetlearn.config.base import upgraded
from forgetlearn.runs.stages import Stages, UpdateResult, keep_old_answers
from forgetlearn.models.texts import check_texts

log = logging.getLogger("forgetlearn")
UPGRADE_CONFIG = functools.partial(upgraded, RunConfig)  # a recorded config, with the settings that came since


@torch.inference_mode(False)  # and with gradients, in whatever mode it is called
def update(
    model: LanguageModel | nn.Module | str | Path | None = None,
    facts: GivenFacts = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> UpdateResult:
    """Forget the old answers, learn the new ones, score every phase, and write a run folder.

    `model` and `facts` may be left to the config (`model.name`, `facts.source`). A model in memory is
    changed in place; a named one is loaded here.

    Raises:
        ForgetLearnError: anything that is wrong with the input, before anything is written.
    """
    facts = as_fact_set(facts)
    config = resolve(config, model, facts)
    preflight.check("update", config)
    check_engine(config.evaluate, changed_by="update")
    reads = (config.model.name, config.facts.source)
    with processes.joined(config.model.device):
        processes.on_main(lambda: run_folder.check_output(output, resume=resume, overwrite=overwrite, inputs=reads))
        with only_writer(Path(output)):
            return _update(model, facts, config, output=output, tokenizer=tokenizer, resume=resume, overwrite=overwrite)


def _update(
    model: LanguageModel | nn.Module | str | Path | None,
    facts: FactSet | str | Path | None,
    config: RunConfig,
    *,
    output: str | Path,
    tokenizer: Any,
    resume: bool,
    overwrite: bool,
) -> UpdateResult:
    """`update`, with the config that was resolved, in a folder that is this process's own, or of several together."""
    check_trackers(config.report_to)
    goes_on = resume and processes.on_main(lambda: run_folder.is_run(output))
    if goes_on:  # before a large model is loaded
        run_folder.RunFolder.open(output).check_same(config.model_dump(mode="json"), "config", UPGRADE_CONFIG)
    fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config)
    named = model if model is not None else str(config.model.name)
    in_memory = not isinstance(named, (str, Path))
    if goes_on and processes.on_main(lambda: run_folder.is_finished(output)):
        base = base_of(as_language_model(named, tokenizer, config.model), in_memory=True) if in_memory else None
        return processes.on_main(lambda: _finished(Path(output), config, fact_set, base))
    keep = _checked(fact_set, config)
    processes.on_main(lambda: check_weights(named))
    lm = as_language_model(named, tokenizer, config.model, all_weights=trains_all_weights(config))
    if hasattr(lm.model, "peft_config"):
        raise ModelError(f"{lm.name}: is an adapter. Update a whole model: merge it, or make it with save_merged.")
    check_texts(lm.encoder, [*fact_set, *keep])
    general_ability.check_embedded(lm, config.evaluate)
    lm.name_end_token()
    check_stages(config, lm)
    base = base_of(lm, in_memory=in_memory)
    if goes_on and in_memory:
        _check_begun_on(run_folder.RunFolder.open(output), base)
    answers = None
    if fact_set.to_ask and not goes_on:
        answers = asked_answers(lm, fact_set, config)  # now, because no fact or no old answer may be left
        held = with_the_models_answers(fact_set, answers, config)
        check_old_answers(held, config)
        check_texts(lm.encoder, held)
    inputs: dict[str, Any] = {
        "facts_sha256": fact_set.sha256(),
        **base,
        **keeping.fingerprint(keep),
        **lm.encoder.fingerprint(),
    }
    if processes.world_size() > 1:
        inputs["processes"] = processes.world_size()  # their parts of the weights fit no other number of them
    if config.keep_change and METHODS[config.method].learns != "lora":
        restore.check_keeping({"config": config.model_dump(), "inputs": inputs, "parent": {"name": lm.name}})
    as_json = config.model_dump(mode="json")
    run = processes.on_main(
        lambda: run_folder.RunFolder.create(output, as_json, inputs, resume=resume, overwrite=overwrite, upgraded=UPGRADE_CONFIG)
    )
    run.check_seen()
    n_processes = processes.world_size()
    line, foreseen = processes.on_main(lambda: plan.foresee(lm, fact_set, config, n_processes))
    log.info(line)
    noted = {"plan": foreseen, "lora": left_by_lora(config, lm)}
    if noted["lora"]:
        log.warning(noted["lora"])
    told = {name: value for name, value in noted.items() if value}
    run.note(model=lm.describe(), parent=chain.parent_of(lm.name, inputs), **told)
    if answers is not None:
        keep_old_answers(run, answers)
    return Stages(run, config, lm, fact_set, keep).run()


def _checked(facts: FactSet, config: RunConfig) -> list[Fact]:
    """The facts to keep, after all that can be checked without the model."""
    processes.check_enough_for(len(facts))
    check_old_answers(facts, config)
    general_ability.check(config.evaluate)
    check_quantization(config)
    keep = facts_to_keep(facts, config)
    if config.forget.coef == AUTO:
        coefficient.check(list(facts), config)
    elif not METHODS[config.method].forgets:
        for name in sorted({"coef", "modules", "rows", "control"} & config.forget.model_fields_set):
            given = getattr(config.forget, name)
            log.warning("forget.%s = %s has no effect: %s does not forget", name, given, config.method)
    return keep


def _check_begun_on(run: run_folder.RunFolder, base: Identity) -> None:
    """Raise RunError if the run was begun on weights other than those of the given model."""
    was, now = ([told.get(name) for name in NAMES] for told in (run.manifest["inputs"], base))
    if was != now:
        begun, given = (next(filter(None, hashes), "unknown") for hashes in (was, now))
        raise RunError(
            f"{run.path} was started on a base with the hash {begun}, but the model passed in has other weights "
            f"(hash {given}): it was changed since.\nLoad the base again and pass that, or choose another folder."
        )


def _finished(path: Path, config: RunConfig, facts: FactSet, in_memory: Identity | None) -> UpdateResult:
    """Return the result of a finished run from its folder alone; a named base may no longer exist."""
    run = run_folder.RunFolder.open(path)
    if in_memory is not None:
        _check_begun_on(run, in_memory)
    base = Path(str(config.model.name))
    was = run.manifest["inputs"]
    now = {"facts_sha256": facts.sha256(), "base_sha256": digests.sha256_of(base) if base.is_dir() else None}
    now |= prompts.fingerprint(config.model.prompt_template)
    run.check_same({**was, **{name: value for name, value in now.items() if value and was.get(name)}}, "inputs")
    summary = records.read(records.Summary, path / "summary.json")
    if not summary["product"]:
        raise RunError(f"{path} holds scores, not an update. Choose another folder.")
    product = path / summary["product"]
    if not product.is_dir():
        raise RunError(f"{path} is finished, but its product {product.name}/ is gone. Pass --overwrite to run again.")
    run.check_results()
    chain.check_product(product)
    run.remove_leftovers()  # killed at its end or in this function, it left some, and weights between the stages
    if not config.keep_stages:
        run.remove_stage_weights()
    run_page.write_run(path)
    return UpdateResult(path, product, summary, disk.read_rows(path / "facts.jsonl"))
