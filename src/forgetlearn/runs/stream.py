"""Run one file of facts as several updates, each on the product of the one before: a stream.

Each batch is an update in a run folder of its own, `batch-001` and so on. Damage is measured from the model before the
first batch, because small steps add up. Of the products only the last is kept, unless `keep_stages` is set: an adapter
that has grown over many batches is as large as a model, and every run folder keeps scores and facts without it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from forgetlearn.config import preflight
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.evaluation import general_ability, probes
from forgetlearn.evaluation.generation import check_engine
from forgetlearn.evaluation.statistics import mean_with_interval
from forgetlearn.facts import FactSet, GivenFacts, as_fact_set
from forgetlearn.method import keeping, moments
from forgetlearn.models.identity import found_again, identity_of
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.products import restore
from forgetlearn.products.chain import check_product, product_of
from forgetlearn.report import stream_page
from forgetlearn.runs import retention
from forgetlearn.runs.base import base_of_update, of_run
from forgetlearn.runs.checks import (
    AS_READ,
    GivenConfig,
    check_old_answers,
    files_read,
    read_config_facts,
    resolve,
)
from forgetlearn.runs.update import Task, carry_out, load_checked
from forgetlearn.runtime import processes
from forgetlearn.storage import run_folder
from forgetlearn.storage.locks import only_writer
from forgetlearn.storage.records import Batch, Mean, RetentionRow, Row, Stream, Summary, load_rows
from forgetlearn.storage.run_folder import ROWS, STREAM, SUMMARY, RunFolder
from forgetlearn.training.callbacks import check_trackers

log = logging.getLogger("forgetlearn")
BASE = "general_base"  # the stage that measures the model before the first batch


@dataclass(frozen=True)
class StreamResult:
    """The result of a stream: its folder, the last batch's product, and what `stream.json` holds."""

    output: Path
    product: Path
    stream: Stream


def stream(
    model: str | Path | None = None,
    facts: GivenFacts = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    batches: int,
    resume: bool = False,
    overwrite: bool = False,
) -> StreamResult:
    """Run the facts as so many updates, in their order, and write a run folder for each and a page for all.

    Batches differ by at most one fact: of 95 facts in 10 batches, the first five have ten. With `resume`, finished
    batches are kept, and the one that was interrupted is continued. See `update` for the other arguments.

    Raises:
        ForgetLearnError: the input is wrong. Nothing has been written yet.
    """
    facts = as_fact_set(facts)
    config = of_run(resolve(config, model, facts))
    preflight.check("update", config)
    _check(model, config, batches)
    check_engine(config.evaluate, changed_by="update")
    check_trackers(config.report_to)
    run_folder.check_output(output, resume=resume, overwrite=overwrite, inputs=files_read(config))
    fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config)
    parts = divided(fact_set, batches)
    for number, part in enumerate(parts, 1):
        try:
            check_old_answers(part, config)
        except FactError as error:
            raise FactError(f"batch {number}: {error}") from error
    with only_writer(Path(output)):
        if resume and run_folder.is_finished(output):
            return _finished(Path(output), fact_set, config, batches)
        run, lm = _begin(Path(output), fact_set, config, batches, resume=resume, overwrite=overwrite)
        origin = _origin(run, lm, fact_set, config)
        del lm
        found = run.path / STREAM
        for done in _updated(run, parts, config, origin):
            done.save(found)
            stream_page.write_page(run.path, done, run.manifest)
        run.finish()
        return _result(run, config)


def _finished(output: Path, facts: FactSet, config: RunConfig, batches: int) -> StreamResult:
    """Return the result of a finished stream from its folder alone; its base may no longer exist."""
    run = RunFolder.open(output)
    run.check_same(_whole(config, batches), "config")
    run.check_same({**run.manifest.inputs, "facts_sha256": facts.sha256()}, "inputs")
    run.check_results()
    check_product(product_of(output))
    return _result(run, config)


def _result(run: RunFolder, config: RunConfig) -> StreamResult:
    if not config.keep_stages:
        run.remove_stage_weights()
    return StreamResult(run.path, product_of(run.path), Stream.load(run.path / STREAM))


def _whole(config: RunConfig, batches: int) -> dict[str, object]:
    """Return the settings of a stream, as its manifest has them."""
    return {"run": config.model_dump(mode="json"), "batches": batches}


def _check(model: object, config: RunConfig, batches: int) -> None:
    """Raise ConfigError if these settings, or this model, do not go with several updates."""
    if model is not None and not isinstance(model, (str, Path)):
        raise ConfigError(f"batches = {batches}: each begins on files, and the model is in memory. Save it first.")
    if config.teach.epochs:
        raise ConfigError(
            f"teach.epochs = {config.teach.epochs}: with batches, each would teach the model its old answers on top of "
            "the batch before. Teach all of them first (a lab base holds its facts), or update in one batch."
        )
    if (number := processes.launched()) > 1:
        raise ConfigError(f"batches = {batches}: are for one process, and {number} were started.")


def divided(facts: FactSet, batches: int) -> list[FactSet]:
    """Return the facts in so many parts, in their order; the first have one fact more if they cannot be equal.

    Raise ConfigError if there are fewer facts than parts.
    """
    if not 0 < batches <= len(facts):
        raise ConfigError(f"batches = {batches}: expected 1 to {len(facts)}, the number of usable facts.")
    size, more = divmod(len(facts), batches)
    ends = [number * size + min(number, more) for number in range(batches + 1)]
    return [facts.part(start, stop) for start, stop in pairwise(ends)]


def _begin(
    output: Path, facts: FactSet, config: RunConfig, batches: int, *, resume: bool, overwrite: bool
) -> tuple[RunFolder, LanguageModel | None]:
    """Return the folder of a stream, new or to be resumed, and the model that it begins on if that was loaded."""
    whole = _whole(config, batches)
    inputs: dict[str, object] = {"facts_sha256": facts.sha256()}
    if resume and run_folder.is_run(output):
        was = RunFolder.open(output).manifest.inputs
        now = {name: value for name, value in found_again(config.model).items() if was.get(name)}
        return RunFolder.create(output, whole, was | inputs | now, resume=True), None
    lm = load_checked(Task(), None, None, facts, config)
    base = base_of_update(lm, config, identity := identity_of(lm, in_memory=False))
    inputs |= {**identity, **lm.encoder.fingerprint(), **keeping.fingerprint(config.keep)}
    inputs |= moments.fingerprint(config.edit) | {"updates_before": len(base.chain())}
    if Stages(config).keeps_change:
        restore.check_keeping(base)
    run = RunFolder.create(output, whole, inputs, overwrite=overwrite)
    run.note(model=lm.describe())
    return run, lm


def _origin(run: RunFolder, lm: LanguageModel | None, facts: FactSet, config: RunConfig) -> Path | None:
    """Return the folder with what the model before the first batch says to general prompts, measured if it is not."""
    if not general_ability.asked(config.evaluate):
        return None
    if not run.is_done(BASE):
        lm = lm or load_checked(Task(), None, None, facts, config)
        log.info("measuring the general ability of the model before the first batch")
        run.do(BASE, partial(_measure, lm, config))
    return run.path / "stages" / BASE


def _measure(lm: LanguageModel, config: RunConfig, folder: Path) -> None:
    general_ability.measure(lm, config.evaluate, folder)


def _updated(run: RunFolder, parts: Sequence[FactSet], config: RunConfig, origin: Path | None) -> Iterator[Stream]:
    """Run the updates that are not done, and yield the stream as it is after each."""
    found = Stream.model_validate(
        {
            "method": config.method,
            "model": str(config.model.name),
            "source": parts[0].source,
            "facts": sum(map(len, parts)),
            "planned": len(parts),
            "updates_before": run.manifest.inputs["updates_before"],
            "batches": [],
        }
    )
    product = Path(str(config.model.name))
    for number, part in enumerate(parts, 1):
        folder, before = run.path / folder_of(number), product
        product = folder / Stages(config).product
        goes_on = run_folder.is_run(run.path / folder_of(number + 1))  # then this one is finished
        if not goes_on:
            log.info("batch %d of %d: %d facts", number, len(parts), len(part))
            own = _config_of(config, parts, number, before)
            carry_out(Task(origin), None, part, own, output=folder, resume=run_folder.is_run(folder))
        batches = [*found.batches, _batch(folder, after=found.updates_before)]
        found = found.model_copy(update={"batches": batches, "product": f"{folder.name}/{product.name}"})
        if not goes_on:
            yield found
        if number > 1 and not config.keep_stages:
            shutil.rmtree(before, ignore_errors=True)


def folder_of(number: int) -> str:
    """Return the name of a batch's run folder; batches are numbered from 1."""
    return f"batch-{number:03}"


def _config_of(config: RunConfig, parts: Sequence[FactSet], number: int, product: Path) -> RunConfig:
    """Return the config of a batch: on the product of the one before.

    Only the last one asks probes, which cost about as much as all other scores, and is merged, if any is to be.
    """
    is_last = number == len(parts)
    probed = config.evaluate.probes if is_last else (probes.NONE,)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": str(product if number == 1 else product.resolve())}),
            "facts": config.facts.model_copy(update={"source": parts[0].source, **AS_READ}),
            "evaluate": config.evaluate.model_copy(update={"probes": probed}),
            "save_merged": config.save_merged and is_last,
        }
    )


def _batch(folder: Path, after: int) -> Batch:
    """Return the scores of a finished update of the stream; `after` is the number of updates before the stream."""
    run = RunFolder.open(folder)
    run.check_results()
    summary = Summary.load(folder / SUMMARY)
    rows = [row for row in load_rows(Row, folder / ROWS) if row.phase == "updated" and row.has("reliability")]
    kept = load_rows(RetentionRow, folder / retention.ROWS) if (folder / retention.ROWS).is_file() else []
    new = [(row.protocol, row.reliability, "reliability" in row.errors) for row in rows if row.split is None]
    earlier = [(row.protocol, row.retention, bool(row.errors)) for row in kept if row.update > after]
    general = summary.general.get("updated")
    prompts = general.prompts if general else None
    damage = {name: getattr(prompts, name) for name in ("kl", "kl_low", "kl_high", "agreement")} if prompts else {}
    return Batch.model_validate(
        {
            "folder": folder.name,
            "facts": summary.facts.used,
            "said": _means([*new, *earlier]),
            "new": _means(new),
            "earlier": _means(earlier),
            "seconds": sum(stage.seconds for stage in run.manifest.stages.values()),
            **damage,
        }
    )


def _means(scored: Sequence[tuple[str, float | None, bool]]) -> dict[str, Mean]:
    """Return by protocol the mean of facts' scores; each is given with its protocol, and whether it errored."""
    found = {}
    for protocol in dict.fromkeys(name for name, _score, _errored in scored):
        own = [(score, errored) for name, score, errored in scored if name == protocol]
        scores = [score for score, _errored in own if score is not None]
        errored = sum(errored for _score, errored in own)
        not_asked = len(own) - len(scores) - errored
        found[protocol] = mean_with_interval(scores, errored=errored, not_asked=not_asked)
    return found
