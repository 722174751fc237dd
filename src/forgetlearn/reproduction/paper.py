"""Reproduce the paper on any model with one call: tables 1 to 5 and figures 4 to 7, each beside the paper's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from forgetlearn.config import preflight
from forgetlearn.config.methods import MethodName
from forgetlearn.config.schema import RunConfig
from forgetlearn.errors import RunError
from forgetlearn.method import editing, keeping, moments
from forgetlearn.models.identity import named_sha256
from forgetlearn.report import paper_page
from forgetlearn.report.paper_table import FILE, PaperReport
from forgetlearn.reproduction import gather, published
from forgetlearn.reproduction.measure import measure
from forgetlearn.reproduction.published import DataName
from forgetlearn.reproduction.request import Request, prepare
from forgetlearn.reproduction.settings import (
    FIRST_SEED_ONLY,
    ORDER,
    WITH_METHODS,
    PaperSettings,
    PartName,
    same_depth,
)
from forgetlearn.reproduction.workspace import Workspace
from forgetlearn.runs.checks import GivenConfig, files_read
from forgetlearn.storage import run_folder
from forgetlearn.storage.locks import only_writer

Found = Mapping[tuple[PartName, DataName], Sequence[Workspace]]  # what is measured, by part and data set
SAID_ELSEWHERE = ("recipe", "model", "facts", "evaluate")  # settings that the page states in other places


@torch.inference_mode(False)  # so that training works even if the caller is in inference mode
def paper(
    model: str | Path | None = None,
    *,
    zsre: str | Path | None = None,
    counterfact: str | Path | None = None,
    settings: PaperSettings | None = None,
    config: GivenConfig = None,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
) -> PaperReport:
    """Reproduce the paper's tables and figures on a model, and return the report that `paper.json` holds.

    `model` is a folder or a hub id; `zsre` and `counterfact` are the files of facts. `config` changes settings of the
    recipe `paper`. What is finished in `output` is not done again, and a part may be added later with `resume`.

    Raises:
        ConfigError: a setting is invalid, a part needs a file that is not given, or the model does not fit.
        RunError: `output` exists and `resume` and `overwrite` are unset, or it was begun with another base, other
            facts or other settings.
    """
    request = prepare(model, zsre=zsre, counterfact=counterfact, settings=settings, config=config)
    path = Path(output)
    reads = (zsre, counterfact, *files_read(request.config))
    run_folder.check_output(path, resume=resume, overwrite=overwrite, inputs=reads)
    with only_writer(path):
        run = _begin(path, request, resume=resume, overwrite=overwrite)
        for workspace, parts in request.workspaces(path):
            measure(workspace, parts, request.job)
        report = report_of(path, request)
        report.save(path / FILE)
        paper_page.write_page(path, report, run.manifest)
        run.finish()
    return report


def _begin(path: Path, request: Request, *, resume: bool, overwrite: bool) -> run_folder.RunFolder:
    """Create the folder, and one in it for each data set; raise RunError if they were begun with other input."""
    config, outline = request.config, request.outline
    assert outline.encoder is not None, "prepare checked it"
    base = named_sha256(outline.name, outline.config)
    inputs = {"base_sha256": base, **outline.encoder.fingerprint(), **keeping.fingerprint(config.keep)}
    inputs |= moments.fingerprint(config.edit)
    own = config.model_dump(mode="json")
    for name in ("tasks", "task_limit", "task_folder"):  # a part that is asked for later may bring them
        del own["evaluate"][name]
    whole = {"run": own, "paper": request.settings.model_dump(exclude={"only", "methods"})}
    run = run_folder.RunFolder.create(path, whole, inputs, resume=resume, overwrite=overwrite)
    given = {data.name for data in request.data}
    if absent := [name for name in published.TITLES if name not in given and run_folder.is_run(path / name)]:
        raise RunError(
            f"{path} holds work on {', '.join(absent)}. Give --{absent[0]} again, so that its page shows it."
        )
    for data in request.data:
        of_data = {"facts_sha256": data.facts.sha256()}
        run_folder.RunFolder.create(
            path / data.name, {"paper": data.name}, of_data, resume=True, remove_leftovers=False
        )
    return run


def report_of(path: Path, request: Request) -> PaperReport:
    """Return the report on everything that is finished in the folder, whether or not it was asked for now."""
    settings = request.settings
    found: dict[tuple[PartName, DataName], Sequence[Workspace]] = {}
    for part in ORDER:
        for data in request.data:
            seeds = settings.seeds[: 1 if part in FIRST_SEED_ONLY else None]
            workspaces = [Workspace(path, data, seed) for seed in seeds if request.is_in(part, data, seed)]
            own_table = part == settings.score_table or part not in ("table1", "table2")
            if own_table and gather.is_measured(part, workspaces):
                found[part, data.name] = workspaces
    on_zsre = {part: own for (part, data), own in found.items() if data == "zsre"}
    tables = [
        gather.score_table(part, settings.like, own)
        for (part, _data), own in found.items()
        if part == settings.score_table
    ]
    tasks, task_signs = gather.ability(on_zsre["table5"][0]) if "table5" in on_zsre else ([], [])
    curves = {part: gather.curve(part, on_zsre[part]) for part in on_zsre if part in ("figure6", "figure7")}
    moved: dict[PartName, Sequence[Workspace]] = {
        part: on_zsre[part] for part in on_zsre if part in ("figure4", "figure5")
    }
    signs = [sign for _table, own in tables for sign in own] + task_signs
    signs += [
        *gather.distance_signs(moved),
        *gather.curve_signs({part: scored for part, (_curve, scored) in curves.items()}),
    ]
    return PaperReport(
        model=request.outline.name,
        like=published.MODELS[settings.like],
        seeds=list(settings.seeds),
        differs=list(differences(request, _measured_methods(found))),
        not_measured=list(_not_measured(settings, found)),
        signs=signs,
        scores=[table for table, _signs in tables],
        times=gather.times(on_zsre["table3"][0]) if "table3" in on_zsre else [],
        texts=gather.texts(on_zsre["table4"][0]) if "table4" in on_zsre else [],
        tasks=tasks,
        distances=[gather.distances(part, own) for part, own in moved.items()],
        curves=[curve for curve, _scored in curves.values()],
    )


def _not_measured(settings: PaperSettings, found: Found) -> Iterator[str]:
    """Yield what the paper has and the folder has not."""
    for part in (settings.score_table, *ORDER[2:]):
        for name in ("zsre", "counterfact") if part == "table1" else ("zsre",):
            where = paper_page.named(part) + (f" on {published.TITLES[name]}" if part == "table1" else "")
            if (part, name) not in found:
                yield where
            elif part == "table5":
                yield "Table 5: MATH, which needs the harness's extra `math`, and seven of MMLU's nine subjects"
            elif part in WITH_METHODS:
                own = found[part, name]
                measured = gather.methods_in(part, own)
                if missing := [method for method in own[0].data.configs if method not in measured]:
                    yield f"{where}: {', '.join(missing)}"


def _measured_methods(found: Found) -> set[MethodName]:
    """Return the methods that have a row in some table."""
    return {m for (part, _data), own in found.items() if part in WITH_METHODS for m in gather.methods_in(part, own)}


def differences(request: Request, measured: Collection[MethodName]) -> Iterator[str]:
    """Yield what is not as in the paper, or is not stated there, in words; `measured` are the methods with a row."""
    config, n_layers = request.config, request.n_layers
    yield f"The model is {request.outline.name}; the paper's is {published.MODELS[request.settings.like]}."
    for data in request.data:
        n_facts, n_paper = len(data.facts), published.FACTS[data.name]
        yield (
            f"{published.TITLES[data.name]}: {n_facts:,} facts, all updated at once, in {_steps(config, n_facts):,} "
            f"steps a stage; the paper has {n_paper:,}, which take {_steps(config, n_paper):,} such steps."
        )
    n = len(request.settings.seeds)
    yield f"{n} seed{'s, each' if n > 1 else ','} with its own taught base; the paper does not state its seeds."
    train = config.train
    yield (
        "The paper does not state optimiser, schedule, warm-up, precision, and which tokens count in the loss. Here: "
        f"{train.optim}, {train.lr_scheduler_type}, warm-up over {train.warmup_ratio:g} of the steps, {train.dtype}, "
        "those of the answer."
    )
    yield (
        f"A step has {config.learn.batch_size} facts; the paper's has 4 x 4 accumulated, or 64 if each of its four "
        "devices took as many."
    )
    template = config.model.prompt_template
    yield f"The paper does not print the text around an instruction; here it is the template {template}."
    targets = config.lora.target_modules
    names = targets if isinstance(targets, str) else ", ".join(targets)
    lora = f"r = {config.lora.r}, alpha = {config.lora.lora_alpha:g}"
    yield f"The paper does not state LoRA's rank and scale; here {lora}, on {names}."
    if "ft-c" in measured:
        yield (
            f"ft-c trains layer {same_depth(published.FT_C_LAYER, n_layers)} of {n_layers}, at the depth of layer "
            f"{published.FT_C_LAYER} of {published.LAYERS}. Its 5 steps are read as passes over the facts. The paper "
            f"does not state the bound on its change; here it is {config.learn.max_change:g}."
        )
    if edits := [method for method in ("rome", "memit") if method in measured]:
        source = f"tokens of {config.edit.moments}" if config.edit.moments else "text that the model samples"
        layers = {"rome": editing.rome_layers(n_layers, config.learning)}
        layers["memit"] = editing.memit_layers(n_layers, config.learning)
        edited = "; ".join(f"{method} {', '.join(map(str, layers[method]))}" for method in edits)
        yield f"Layers edited, of {n_layers}: {edited}. In the paper, of {published.LAYERS}: rome 5; memit 4 to 8."
        yield (
            f"The second moments of keys come from {source}, in the paper from 100,000 samples of Wikitext; "
            f"{config.edit.contexts} sampled openings are put before a prompt."
        )
    changed = {n: v for n, v in preflight.changed(config).items() if not preflight.is_within(n, SAID_ELSEWHERE)}
    if changed:
        yield f"Settings that were changed: {', '.join(f'{name} = {value}' for name, value in changed.items())}."


def _steps(config: RunConfig, n_facts: int) -> int:
    """Return the optimiser steps of learning this many facts."""
    return config.learn.epochs * -(-n_facts // config.learn.batch_size)
