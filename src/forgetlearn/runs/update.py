"""One update, from end to end: read, check, score, forget, score, learn, score, report. Resumable after any stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from forgetlearn.config import preflight
from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import DamageError, RunError
from forgetlearn.evaluation import general_ability, probes
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.facts import FactSet, GivenFacts, as_fact_set, describe_old_answers
from forgetlearn.method import keeping, lessons, moments
from forgetlearn.method.checks import out_of_loras_reach
from forgetlearn.models import prompts
from forgetlearn.models.identity import NAMES, Identity, found_again, identity_of
from forgetlearn.models.language_model import LanguageModel, as_language_model
from forgetlearn.models.texts import check_texts
from forgetlearn.planning import plan
from forgetlearn.products import chain, restore
from forgetlearn.report import damage, run_page
from forgetlearn.runs import coefficient, retention
from forgetlearn.runs.base import base_of_update, load_to_update, of_run
from forgetlearn.runs.checks import (
    GivenConfig,
    GivenModel,
    asked_answers,
    check_old_answers,
    check_quantization,
    check_stages,
    files_read,
    read_config_facts,
    resolve,
    with_the_models_answers,
)
from forgetlearn.runs.failed_only import config_for_failed
from forgetlearn.runs.pipeline import Pipeline
from forgetlearn.runs.results import Outcome, learning_of, write_results
from forgetlearn.runs.retention import Past
from forgetlearn.runs.run_store import RunStore
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, records, run_folder
from forgetlearn.storage.locks import only_writer
from forgetlearn.storage.records import Forgetting, Row, Summary, load_rows, save_rows
from forgetlearn.storage.run_folder import RunFolder
from forgetlearn.training.callbacks import check_trackers

log = logging.getLogger("forgetlearn")
REJECTED = "rejected"  # the folder for products that damage too much


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update: the folders of the run and of the product, the summary, and the rows."""

    output: Path
    product: Path
    summary: Summary
    rows: list[Row]


@torch.inference_mode(False)  # so that it trains even if the caller is in inference mode
def update(
    model: GivenModel = None,
    facts: GivenFacts = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    tokenizer: object = None,
    failed_only: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> UpdateResult:
    """Forget the old answers, learn the new ones, score every phase, and write a run folder.

    `model` and `facts` may be omitted if the config names them (`model.name`, `facts.source`). A model in memory is
    changed in place. `failed_only` is the folder of an earlier run: the facts are those that it got wrong, and the
    model, unless another is given, is what it made.

    The model may be what earlier updates made: a run folder or its product. The facts of those updates are kept, if
    the method fine-tunes and `keep.weight` is not 0, and asked again at the end.

    Raises:
        ForgetLearnError: the input is wrong. Nothing has been written yet.
    """
    facts = as_fact_set(facts)
    if failed_only is not None:
        config = config_for_failed(failed_only, config, model, facts)
    config = of_run(resolve(config, model, facts))
    preflight.check("update", config)
    return carry_out(
        Task(), model, facts, config, output=output, tokenizer=tokenizer, resume=resume, overwrite=overwrite
    )


class Task:
    """What a run does: this one updates; `runs.forget` overrides what differs there. For `origin` see `Past`."""

    name = "update"
    reads: tuple[str | Path | None, ...] = ()  # files and folders that it reads, beside those that the config names
    inputs: Mapping[str, str | None] = {}  # what else its result depends on, for the manifest

    def __init__(self, origin: Path | None = None) -> None:
        self.origin = origin

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, before anything is loaded or written, if the task cannot be done with this config."""

    def check_loaded(self, lm: LanguageModel, facts: FactSet, config: RunConfig) -> None:
        """Raise an error, before anything is written, if the task cannot be done with this model and these facts."""

    def taken(self, facts: FactSet) -> FactSet:
        """Return the facts as read, whose `ignored_fields` are those that the task does not read either."""
        return facts

    def asked(self, facts: FactSet) -> FactSet:
        """Return the facts as they are trained on and scored."""
        return facts

    def pipeline(self, lm: LanguageModel, facts: FactSet, config: RunConfig, store: RunStore, past: Past) -> Pipeline:
        """Return the pipeline that does the task."""
        return Pipeline(lm, facts.facts, config, store, past=past)

    def result(self, pipeline: Pipeline, run: RunFolder) -> Forgetting | None:
        """Write what else was measured to the run folder, and return it for the summary."""
        return None


def carry_out(
    task: Task,
    model: GivenModel,
    facts: FactSet | str | Path | None,
    config: RunConfig,
    *,
    output: str | Path,
    tokenizer: object = None,
    resume: bool = False,
    overwrite: bool = False,
) -> UpdateResult:
    """Do a task over a run folder; its config is resolved, and names the model unless that is in memory."""
    in_memory = None if isinstance(model, (str, Path)) else model
    check_engine(config.evaluate, changed_by=task.name)
    task.check(config)
    settings, reads = config.model_dump(mode="json"), (*files_read(config), *task.reads)
    with processes.joined(config.model.device):
        processes.on_main(lambda: run_folder.check_output(output, resume=resume, overwrite=overwrite, inputs=reads))
        with only_writer(Path(output)):
            check_trackers(config.report_to)
            begun = RunFolder.open(output) if resume and processes.on_main(lambda: run_folder.is_run(output)) else None
            if begun:  # before a large model is loaded
                begun.check_same(settings, "config")
            fact_set = task.taken(facts if isinstance(facts, FactSet) else read_config_facts(config))
            if begun and begun.manifest.finished:
                if in_memory is not None:
                    given = as_language_model(in_memory, tokenizer, config.model)
                    _check_same_base(begun, identity_of(given, in_memory=True))
                return processes.on_main(lambda: _result_of_finished(task, begun, fact_set, config))
            lm = load_checked(task, in_memory, tokenizer, fact_set, config)
            identity = identity_of(lm, in_memory=in_memory is not None)
            if begun and in_memory is not None:
                _check_same_base(begun, identity)
            base = base_of_update(lm, config, identity)
            past = processes.on_main(lambda: retention.past_of(base, fact_set, config.keep.earlier, task.origin))
            answers = None if begun else _own_answers(lm, fact_set, config)
            if Stages(config).keeps_change:
                restore.check_keeping(base)
            inputs = {"facts_sha256": fact_set.sha256(), **identity, **_inputs(task, lm, config, past)}
            run = processes.on_main(
                lambda: RunFolder.create(output, settings, inputs, resume=resume, overwrite=overwrite)
            )
            run.check_seen()
            _note_start(run, lm, task.asked(fact_set), config, base)
            fact_set = _with_old_answers(run, lm, fact_set, config, answers)
            return _run_steps(task, run, lm, fact_set, config, base, past)


def load_checked(task: Task, model: GivenModel, tokenizer: object, facts: FactSet, config: RunConfig) -> LanguageModel:
    """Load the model that a task begins on, and check everything that can be checked before it begins."""
    stages = Stages(config)
    _check_without_model(facts, stages)
    lm = load_to_update(model, tokenizer, config)
    check_texts(lm.encoder, task.asked(facts))
    general_ability.check_embedded(lm, config.evaluate)
    lm.name_end_token()
    check_stages(stages, lm, facts)
    task.check_loaded(lm, facts, config)
    return lm


def _check_without_model(facts: FactSet, stages: Stages) -> None:
    """Check everything that can be checked without the model."""
    config = stages.config
    processes.check_enough_for(len(facts))
    check_old_answers(facts, config)
    general_ability.check(config.evaluate)
    probes.check(facts, config.evaluate)
    keeping.check(config.keep, facts)
    check_quantization(stages)
    if config.forget.coef == AUTO:
        coefficient.check(list(facts), config)
    elif not stages.method.forgets:
        preflight.warn_of_forgetting(config)


def _check_same_base(run: RunFolder, base: Identity) -> None:
    """Raise RunError if the run was started on weights other than those of the given model."""
    was, now = ([inputs.get(name) for name in NAMES] for inputs in (run.manifest.inputs, base))
    if was != now:
        begun, given = (next(filter(None, hashes), "unknown") for hashes in (was, now))
        raise RunError(
            f"{run.path} was started on a base with the hash {begun}, but the model passed in has other weights "
            f"(hash {given}): it was changed since.\nLoad the base again and pass that, or choose another folder."
        )


def _own_answers(lm: LanguageModel, facts: FactSet, config: RunConfig) -> list[Row] | None:
    """Return the model's own answers where these are to be the old ones (policy `model`); None if it need not be asked.

    This comes before the run folder is created, and raises FactError if no fact then has an old answer.
    """
    if not facts.to_ask:
        return None
    answers = asked_answers(lm, facts, config)
    held = with_the_models_answers(facts, answers, config)
    check_old_answers(held, config)
    check_texts(lm.encoder, held)
    return answers


def _inputs(task: Task, lm: LanguageModel, config: RunConfig, past: Past) -> dict[str, object]:
    """Return what the result depends on beside the config, the facts and the base, for the manifest."""
    inputs: dict[str, object] = {**lm.encoder.fingerprint(), **task.inputs}
    inputs |= keeping.fingerprint(config.keep) | moments.fingerprint(config.edit)
    if past.earlier:
        inputs["earlier_sha256"] = digests.hash_of([each.as_input() for each in past.earlier])
    if task.origin is not None:
        inputs["origin_sha256"] = digests.sha256_of(task.origin / general_ability.FOUND)
    if processes.world_size() > 1:
        inputs["processes"] = processes.world_size()  # saved parts of the weights fit only this number
    return inputs


def _note_start(run: RunFolder, lm: LanguageModel, facts: FactSet, config: RunConfig, base: chain.Base) -> None:
    """Log the plan and what the stages will leave out; note them and the model in the manifest."""
    n_processes = processes.world_size()
    line, planned = processes.on_main(lambda: plan.plan_line(lm, facts, config, n_processes))
    log.info(line)
    lessons.note_unfinished(facts, config, lm.encoder)
    uses_lora = any(stage.kind.adapter for stage in Stages(config))
    unreached = out_of_loras_reach(lm.model, config.lora) if uses_lora else None
    if unreached:
        log.warning(unreached)
    noted = {name: value for name, value in {"plan": planned, "lora": unreached}.items() if value}
    run.note(model=lm.describe(), parent=chain.parent_of(base), **noted)


def _with_old_answers(
    run: RunFolder, lm: LanguageModel, facts: FactSet, config: RunConfig, rows: list[Row] | None
) -> FactSet:
    """Return the facts with the model's own answers as old answers (policy `model`).

    `rows` are these answers if the model has been asked; otherwise it is asked here, or they are read from the run.
    """
    if facts.to_ask:
        if not run.is_done("old_answers"):
            asked = rows or asked_answers(lm, facts, config)
            run.do("old_answers", lambda folder: save_rows(asked, folder / "rows.jsonl"))
        facts = with_the_models_answers(facts, load_rows(Row, run.path / "stages/old_answers/rows.jsonl"), config)
    run.note(old_answers={**facts.old_counts, **facts.without_old})
    method = Stages(config).method
    if method.forgets and method.learns:
        for line in describe_old_answers(facts.old_counts, facts.without_old):
            log.info(line)
    return facts


def _run_steps(
    task: Task, run: RunFolder, lm: LanguageModel, facts: FactSet, config: RunConfig, base: chain.Base, past: Past
) -> UpdateResult:
    """Do the steps of a task that are not done yet, and finish its run."""
    store = RunStore(run, config, lm, str(base.name) if base.base_sha256 else f"a {type(lm.model).__name__} in memory")
    pipeline = task.pipeline(lm, task.asked(facts), config, store, past)
    pipeline.prepare()
    if store.stages.chooses_coefficient and pipeline.to_forget:
        pipeline.set_coefficient(store.choose(pipeline))
    pipeline.update()
    return _finish(task, facts, pipeline, store)


def _finish(task: Task, facts: FactSet, pipeline: Pipeline, store: RunStore) -> UpdateResult:
    """Write the merged model, the scores, the model cards, the chain and the report, and return the result."""
    run, stages = store.run, store.stages
    product = run.path / stages.product
    products = [product]
    if stages.config.save_merged and stages.method.makes_adapter:
        store.merge(pipeline)
        products.append(run.path / "merged")
    outcome = _outcome(pipeline, store, processes.on_main(lambda: task.result(pipeline, run)))
    summary, rows = processes.on_main(lambda: _write(run, facts, pipeline, stages, outcome, products))
    if not stages.method.makes_adapter:
        pipeline.lm.saved_in(product)
    return UpdateResult(run.path, product, summary, rows)


def _outcome(pipeline: Pipeline, store: RunStore, forgetting: Forgetting | None) -> Outcome:
    """Return the results of the stages other than scores."""
    run, stages = store.run, store.stages
    last = run.manifest.stages[stages.last.name]
    return Outcome(
        known=len(pipeline.known) if any(fact.ground_truth for fact in pipeline.facts) else None,
        forgotten=len(pipeline.to_forget) if stages.method.forgets else None,
        product=stages.product,
        choice=store.choice,
        nothing_forgotten=pipeline.nothing_forgotten,
        rounding=run.rounding(stages.last.name, "merge"),
        taught=pipeline.taught,
        lessons=pipeline.lesson_counts,
        kept=pipeline.kept_counts,
        learning=learning_of(pipeline.facts, last.epochs, last.unlearned) if stages.method.learns else None,
        forgetting=forgetting,
        since_first=pipeline.past.origin is not None,
    )


def _write(
    run: RunFolder, facts: FactSet, pipeline: Pipeline, stages: Stages, outcome: Outcome, products: Sequence[Path]
) -> tuple[Summary, list[Row]]:
    """Write scores, cards, chain and report, and finish the run; return the summary and the rows."""
    config = stages.config
    summary, rows = write_results(run.path, config, facts, pipeline.rows, outcome, pipeline.general, pipeline.probed)
    if pipeline.retained:
        summary = retention.write(run.path, stages.phases[-1], pipeline.retained, summary)
    page = run_page.page_of(run, summary, rows)
    for product in products:
        run_page.write_card(product, page)
    chain.carry_on(run, products, facts, summary)
    if stages.keeps_change:
        run.do("change", lambda folder: restore.keep_change(run, products[0], folder), restore.CHANGE)
    run_page.write_run(run.path, replace(page, manifest=run.manifest))  # last, because it lists all stages
    run.finish()
    log.info(plan.took(run.manifest, pipeline.lm.device))
    if not config.keep_stages:  # only now, because a killed run needs them to continue
        run.remove_stage_weights()
    _check_damage(run.path, config, summary, products)
    return summary, rows


def _check_damage(path: Path, config: RunConfig, summary: Summary, products: Iterable[Path]) -> None:
    """Raise DamageError, and put the products aside, if the update damaged more than `evaluate.max_damage` allows."""
    most, measured = config.evaluate.max_damage, summary.general.get(Stages(config).phases[-1])
    prompts = measured.prompts if measured else None
    if most is None or (prompts and prompts.kl is not None and prompts.kl <= most):
        return
    aside = path / REJECTED
    aside.mkdir(exist_ok=True)
    for product in products:
        if product.is_dir():  # not yet put aside by a process that was killed here
            product.rename(aside / product.name)
    found = damage.in_words(prompts) if prompts else "damage was not measured"
    raise DamageError(
        f"evaluate.max_damage = {most:g}: {found}. The product was put aside, in {aside}; {path / 'report.html'} shows "
        f"what changed. {damage.advice(kept=bool(summary.kept))}"
    )


def _result_of_finished(task: Task, run: RunFolder, facts: FactSet, config: RunConfig) -> UpdateResult:
    """Return the result of a finished run from its folder alone; a named base may no longer exist."""
    path, was = run.path, run.manifest.inputs
    now = {"facts_sha256": facts.sha256(), **found_again(config.model)}
    now |= prompts.fingerprint(config.model.prompt_template)
    known = {name: value for name, value in now.items() if value and was.get(name)}
    run.check_same({**was, **known, **task.inputs}, "inputs")
    summary = records.Summary.load(path / "summary.json")
    if not summary.product:
        raise RunError(f"{path} contains scores, not an update. Choose another folder.")
    product = path / summary.product
    _check_damage(path, config, summary, (product, path / "merged"))
    if not product.is_dir():
        raise RunError(f"{path} is finished, but its product {product.name}/ is gone. Pass --overwrite to run again.")
    run.check_results()
    chain.check_product(product)
    run.remove_leftovers()  # left if it was killed at its end, like the weights between the stages
    if not config.keep_stages:
        run.remove_stage_weights()
    page = run_page.load_page(path)
    run_page.write_run(path, page)
    return UpdateResult(path, product, page.overview.summary, page.rows)
