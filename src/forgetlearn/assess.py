"""Scoring and asking a model that is there already: `evaluate` writes a run folder, `ask` prints answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from forgetlearn import report, runs
from forgetlearn.config import RunConfig
from forgetlearn.errors import FactError
from forgetlearn.facts import FactSet
from forgetlearn.models import LanguageModel, as_language_model, load_model
from forgetlearn.results import write_results
from forgetlearn.scoring import Said, Scorer, locality_predictions, score
from forgetlearn.session import read_config_facts, resolve


def evaluate(
    model: LanguageModel | nn.Module | str | Path | None = None,
    facts: FactSet | str | Path | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    reference: LanguageModel | str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """The folder with scores and a report of a model, or of an adapter on its base, on facts.

    With `reference` (the model before) its scores stand beside, and locality is agreement with it.

    Raises:
        ForgetLearnError: anything that is wrong with the input, before anything is written.
    """
    config = resolve(config, model, facts)
    reads = (config.model.name, config.facts.source, reference if isinstance(reference, (str, Path)) else None)
    runs.check_output(output, resume=False, overwrite=overwrite, inputs=reads)
    fact_set = facts if isinstance(facts, FactSet) else read_config_facts(config)
    rows = {}
    before = None
    if reference is not None:
        rows["base"] = score(
            as_language_model(reference, None, config.model), fact_set, phase="base", settings=config.evaluate
        )
        before = locality_predictions(rows["base"])
    lm = as_language_model(model if model is not None else str(config.model.name), tokenizer, config.model)
    phase = "model" if reference is None else "updated"
    rows[phase] = score(lm, fact_set, phase=phase, settings=config.evaluate, reference=before)
    if before is None:
        rows[phase] = [row for row in rows[phase] if row["protocol"] != "agreement"]  # with itself: says nothing
    run = runs.RunFolder.create(
        output, config.model_dump(mode="json"), {"facts_sha256": fact_set.sha256()}, overwrite=overwrite
    )
    write_results(run.path, config, fact_set, rows)
    report.write_run(run.path)
    run.finish()
    return run.path


def ask(
    prompts: Iterable[str],
    model: LanguageModel | str | Path | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Prompt to the model's greedy answer.

    Raises:
        ModelError: the model cannot be loaded.
        FactError: a prompt is empty, or longer than the model's context.
    """
    prompts = list(prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise FactError("A prompt is empty. Give a question.")
    config = resolve(config, model, None)
    lm = model if isinstance(model, LanguageModel) else load_model(config.model)
    answers = {}
    for prompt, said in Scorer(lm, config.evaluate, "asking").say(prompts).items():
        if not isinstance(said, Said):
            raise FactError(f"{prompt[:60]!r}: {said.reason}")
        answers[prompt] = said.text
    return answers
