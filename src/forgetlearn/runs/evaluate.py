"""Score or ask an existing model: `evaluate` writes a run folder, `ask` returns answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peft import PeftModel

from forgetlearn.config import preflight
from forgetlearn.config.schema import EvaluateSettings, RunConfig
from forgetlearn.errors import FactError, ModelError
from forgetlearn.evaluation import general_ability, generation, probes
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.evaluation.scoring import locality_predictions, score
from forgetlearn.facts import Fact, FactSet, GivenFacts, as_fact_set
from forgetlearn.models.language_model import LanguageModel, as_language_model, load_model
from forgetlearn.report import run_page
from forgetlearn.runs import probing, retention
from forgetlearn.runs.checks import (
    GivenConfig,
    GivenModel,
    asked_answers,
    check_weights,
    read_config_facts,
    resolve,
    with_the_models_answers,
)
from forgetlearn.runs.results import write_results
from forgetlearn.runtime import processes
from forgetlearn.storage import run_folder
from forgetlearn.storage.records import General, ProbeRow, Row

Phase = Literal["base", "updated", "model"]


def evaluate(
    model: GivenModel = None,
    facts: GivenFacts = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    reference: LanguageModel | str | Path | None = None,
    tokenizer: object = None,
    earlier: Sequence[str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Score a model or an adapter on facts, write the scores and a report to a folder, and return its path.

    `reference` is the model before the update. It is scored too, and locality is agreement with it. Under the policy
    `model` the old answers come from the reference if there is one, else from the model.

    `earlier` lists places to look for the facts of the model's earlier updates; it may be empty. Unless it is None,
    these facts are scored too (retention).

    Raises:
        ForgetLearnError: the input is wrong. Nothing has been written yet.
    """
    facts = as_fact_set(facts)
    config = resolve(config, model, facts)
    preflight.check("evaluate", config)
    generation.check_engine(config.evaluate, (model, reference))
    reads = (config.model.name, config.facts.source, reference if isinstance(reference, (str, Path)) else None)
    with processes.joined(config.model.device):
        processes.on_main(
            lambda: run_folder.check_output(output, resume=False, overwrite=overwrite, inputs=reads, can_resume=False)
        )
        check_weights(config.model.name, reference)
        fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config, "score")
        _check_answers(fact_set)
        processes.check_enough_for(len(fact_set))
        with _scratch() as scratch:
            write = _scored(model, fact_set, config, reference, tokenizer, earlier, scratch)
            return processes.on_main(lambda: write(Path(output), overwrite))


def _check_answers(facts: FactSet) -> None:
    """Raise FactError if a fact has no answer to score, and will get none from the model."""
    waiting = frozenset(facts.to_ask)
    for fact in facts:
        if not fact.new_answers and not fact.old_answers and fact.id not in waiting:
            raise FactError(
                f"{fact.place} has no answer to score (prompt {fact.prompt[:60]!r}). Give target_new or ground_truth."
            )


@contextmanager
def _scratch() -> Iterator[Path]:
    """Make a temporary folder that all processes share."""
    folder = processes.on_main(lambda: tempfile.mkdtemp(prefix="forgetlearn-"))
    try:
        yield Path(folder)
    finally:
        if processes.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _scored(
    model: GivenModel,
    fact_set: FactSet,
    config: RunConfig,
    reference: LanguageModel | str | Path | None,
    tokenizer: object,
    earlier: Sequence[str | Path] | None,
    scratch: Path,
) -> Callable[[Path, bool], Path]:
    """Score everything, and return a function that writes the run folder, given its path and `overwrite`."""
    updates = [] if earlier is None else retention.earlier_updates(str(config.model.name), fact_set, earlier)
    general_ability.check(config.evaluate)
    probes.check(fact_set, config.evaluate)
    found, vocabulary = _Scores(config, scratch), None
    if reference is not None:
        base = as_language_model(reference, None, config.model)
        general_ability.check_embedded(base, config.evaluate)
        fact_set = _with_old_answers(base, fact_set, config)
        found.add(base, fact_set, "base")
        vocabulary = base.tokenizer.get_vocab()
        del base  # to free its memory before the other model is loaded
    lm = as_language_model(model if model is not None else str(config.model.name), tokenizer, config.model)
    general_ability.check_embedded(lm, config.evaluate)
    if vocabulary is not None and vocabulary != lm.tokenizer.get_vocab():
        raise ModelError(f"{lm.name} and {reference} have different vocabularies: their tokens cannot be compared.")
    phase: Phase = "model" if reference is None else "updated"
    if reference is None:
        fact_set = _with_old_answers(lm, fact_set, config)
    found.add(lm, fact_set, phase)
    retained = retention.retained(updates, retention.ask(lm, updates, config.evaluate))

    def write(output: Path, overwrite: bool) -> Path:
        inputs = {"facts_sha256": fact_set.sha256(), **lm.encoder.fingerprint()}
        run = run_folder.RunFolder.create(output, config.model_dump(mode="json"), inputs, overwrite=overwrite)
        run.note(model=lm.describe(), old_answers={**fact_set.old_counts, **fact_set.without_old})
        summary, written = write_results(
            run.path, config, fact_set, found.rows, general=found.general, probed=found.probed
        )
        if updates:
            summary = retention.write(run.path, phase, retained, summary)
        run_page.write_run(run.path, run_page.page_of(run, summary, written))
        run.finish()
        return run.path

    return write


class _Scores:
    """The scores of a model, and of its reference if there is one, by phase.

    The reference is `base` and the model then `updated`; a model without a reference is `model`.
    """

    def __init__(self, config: RunConfig, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        self.rows: dict[str, list[Row]] = {}
        self.probed: dict[str, list[ProbeRow]] = {}
        self.general: dict[str, General] = {}
        self._stated: dict[str, str] | None = None  # the facts as the first model states them

    def add(self, lm: LanguageModel, facts: FactSet, phase: Phase) -> None:
        """Score a model on facts and probes, and measure its general ability."""
        evaluate = self.config.evaluate
        reference = locality_predictions(self.rows["base"]) if phase == "updated" else None
        rows = score(lm, facts, phase=phase, settings=evaluate, reference=reference)
        self.probed[phase] = self._probed(lm, list(facts), rows)
        # Without a reference, agreement would be with the model itself.
        self.rows[phase] = [row for row in rows if row.protocol != "agreement"] if phase == "model" else rows
        if general_ability.asked(evaluate):
            before = self.scratch if phase == "updated" else None
            if phase == "model":
                before = _own_base(lm, evaluate, self.scratch / "own_base", facts)
            self.general[phase] = general_ability.measure(lm, evaluate, self.scratch, before, facts)

    def _probed(self, lm: LanguageModel, facts: Sequence[Fact], rows: Sequence[Row]) -> list[ProbeRow]:
        if not probes.are_asked(self.config.evaluate):
            return []
        if self._stated is None:
            replies = [row for row in rows if row.protocol == "generate"]
            self._stated = probing.state(lm, facts, self.config, replies)
        return probing.ask(lm, facts, self.config, rows, self._stated)


def _own_base(lm: LanguageModel, settings: EvaluateSettings, folder: Path, facts: FactSet) -> Path | None:
    """Measure the base under a model's adapter into `folder`; return None if the model has no adapter to switch off."""
    model = lm.model
    if not isinstance(model, PeftModel) or settings.engine == "vllm":
        return None
    if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()):
        return None  # it changed biases of the base
    processes.on_main(folder.mkdir)
    with model.disable_adapter():
        general_ability.measure(lm, settings.model_copy(update={"tasks": ()}), folder, facts=facts)
    return folder


def _with_old_answers(lm: LanguageModel, facts: FactSet, config: RunConfig) -> FactSet:
    if not facts.to_ask:
        return facts
    return with_the_models_answers(facts, asked_answers(lm, facts, config), config, "score")


def ask(
    prompts: Iterable[str],
    model: LanguageModel | str | Path | None = None,
    config: GivenConfig = None,
) -> dict[str, str]:
    """Return the model's greedy answer to each prompt.

    Raises:
        ModelError: the model cannot be loaded.
        FactError: a prompt is empty, or longer than the model's context.
        ConfigError: the engine cannot be used.
    """
    prompts = list(prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise FactError("A prompt is empty. Give a question.")
    config = resolve(config, model, None)
    preflight.check("ask", config)
    generation.check_engine(config.evaluate, (model,))
    lm = model if isinstance(model, LanguageModel) else load_model(config.model)
    answers = {}
    stripped = {prompt: prompt.strip() for prompt in prompts}  # as in the prompts of facts
    found = Scorer(lm, config.evaluate, "asking").say(stripped.values())
    for prompt, plain in stripped.items():
        said = found[plain]
        if not isinstance(said, Generated):
            raise FactError(f"{prompt[:60]!r}: {said.reason}")
        answers[prompt] = said.text
    return answers
