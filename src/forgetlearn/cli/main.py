"""The command: each function parses, validates and calls. Heavy imports sit inside the commands."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from forgetlearn._version import __version__
from forgetlearn.cli import weights
from forgetlearn.cli.terminal import PlainLines, nested, print_facts, print_scores, print_table, say
from forgetlearn.cli.weights import JsonOption, OutputOption, OverwriteOption
from forgetlearn.config import preflight
from forgetlearn.config.base import describe, parse_assignments, read_yaml, validate
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.errors import ConfigError, ForgetLearnError, is_out_of_memory, plain
from forgetlearn.models.module_names import parse
from forgetlearn.runtime import processes, signals

app = typer.Typer(
    name="forgetlearn",
    help="Forget, then learn: change the facts that a language model holds.",
    epilog="To see it work: forgetlearn demo. Every command answers --help; `forgetlearn settings` lists all settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(weights.app)

TOGETHER = ("update", "evaluate")  # commands that several processes share
INTERRUPTED = 130  # what a shell reports after Ctrl-C
# With the default, where there is one to tell; the command itself passes on only what is given.
HELP = {
    name: description if default in ("null", "[]", "{}", "false") else f"{description} Default: {default}."
    for name, _type, default, description in describe(RunConfig)
}
IN_CONFIG = " Needed, here or in --config."


ModelOption = Annotated[str | None, typer.Option("--model", help=HELP["model.name"] + IN_CONFIG)]
HoldsOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id of a causal language model, or folder of an adapter.")
]
FactsOption = Annotated[str | None, typer.Option("--facts", help=HELP["facts.source"] + IN_CONFIG)]
OldFromOption = Annotated[str | None, typer.Option("--old-from", help=HELP["facts.old_from"])]
LimitOption = Annotated[int | None, typer.Option("--limit", help=HELP["facts.limit"])]
StrictOption = Annotated[bool | None, typer.Option("--strict/--no-strict", help=HELP["facts.strict"])]
TemplateOption = Annotated[str | None, typer.Option("--prompt-template", help=HELP["model.prompt_template"])]
ColumnsOption = Annotated[str | None, typer.Option("--columns", help=HELP["facts.columns"])]
AliasesOption = Annotated[str | None, typer.Option("--aliases", help=HELP["facts.aliases"])]
ShardOption = Annotated[bool | None, typer.Option("--shard", help=HELP["model.shard"])]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Processes that the launcher should have started: others are an error."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags and --set win.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, NAME=VALUE; again for more. `forgetlearn settings` lists them."),
]
LabSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, NAME=VALUE; again for more. `forgetlearn settings --lab` lists them."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", help="The model before the update; locality is agreement with it.")
]
EngineOption = Annotated[str | None, typer.Option("--engine", help=HELP["evaluate.engine"])]
GeneralOption = Annotated[str | None, typer.Option("--general", help=HELP["evaluate.general"])]
TasksOption = Annotated[str | None, typer.Option("--tasks", help=HELP["evaluate.tasks"] + " With commas.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    _State.debug = debug
    handler = logging.StreamHandler()
    handler.setFormatter(PlainLines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("forgetlearn").setLevel(logging.WARNING if quiet else logging.INFO)
    if processes.launched() > 1 and context.invoked_subcommand not in TOGETHER:
        raise ConfigError(
            f"{context.invoked_subcommand} is for one process, and {processes.launched()} were started. "
            f"Start it without torchrun; {' and '.join(TOGETHER)} share their work out."
        )
    processes.silence_other_ranks()


class _State:
    """What the edge of the command needs after a command has failed."""

    debug = False


@app.command()
def facts(
    file: Annotated[str, typer.Argument(help=HELP["facts.source"])],
    old_from: OldFromOption = None,
    limit: LimitOption = None,
    strict: StrictOption = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a file of facts, say what is used and what is left out, and show the first three."""
    from forgetlearn.facts import read_facts

    flags = _reads(None, file, old_from, limit, strict, columns=columns, aliases=aliases)
    found = read_facts(file, **_config(None, flags).facts.model_dump(exclude={"source"}))
    if as_json:
        from dataclasses import asdict

        say(json.dumps({**asdict(found), "without_old_answer": found.without_old_answer}))
        return
    print_facts(found)


@app.command()
def lab(
    output: OutputOption,
    facts_file: Annotated[str | None, typer.Option("--facts", help=HELP["facts.source"])] = None,
    old_from: OldFromOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take the first N usable facts; without --facts: make up N.")
    ] = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the made-up world, the weights and the order.")] = 0,
    setting: LabSetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a small base model that holds given facts, or a made-up world, in about a minute."""
    from forgetlearn.facts import read_facts
    from forgetlearn.lab.build import LabSettings, build_lab
    from forgetlearn.storage.disk import read_json

    settings = validate(LabSettings, {"seed": seed, **parse_assignments(setting or [])})
    given = whole = None
    if facts_file:
        flags = _reads(None, facts_file, old_from, limit, columns=columns, aliases=aliases)
        wanted = _config(None, flags).facts.model_dump(exclude={"source"})
        given = read_facts(facts_file, **wanted)
        whole = read_facts(facts_file, **{**wanted, "limit": None})
    elif limit is not None:
        settings = validate(LabSettings, {**settings.model_dump(), "n_facts": limit})
    folder = build_lab(given, settings, vocabulary_from=whole, output=output, overwrite=overwrite)
    built = read_json(folder / "lab.json")
    held = ", ".join(f"{100 * share:.1f} % of {what}" for what, share in built["held"].items() if share is not None)
    say(f"{folder}: {built['parameters']:,} parameters; gives {held} exactly.")
    say(
        f"Next: forgetlearn update --model {folder} --facts {folder}/facts.jsonl "
        f"--config {folder}/update.yaml --method f-ft --coef 1 --output runs/first"
    )


@app.command(epilog="How long it learns: --set learn.epochs=10 (default 3). Few facts need more epochs.")
def update(
    output: OutputOption,
    model: ModelOption = None,
    facts_file: FactsOption = None,
    method: Annotated[str | None, typer.Option("--method", help=HELP["method"])] = None,
    coef: Annotated[str | None, typer.Option("--coef", help=HELP["forget.coef"])] = None,
    modules: Annotated[str | None, typer.Option("--modules", help=HELP["forget.modules"])] = None,
    keep: Annotated[str | None, typer.Option("--keep", help=HELP["forget.keep"])] = None,
    keep_by: Annotated[str | None, typer.Option("--keep-by", help=HELP["forget.keep_by"])] = None,
    validation: Annotated[float | None, typer.Option("--validation", help=HELP["forget.validation"])] = None,
    seed: Annotated[int | None, typer.Option("--seed", help=HELP["seed"])] = None,
    old_from: OldFromOption = None,
    limit: LimitOption = None,
    strict: StrictOption = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    teach_old: Annotated[int | None, typer.Option("--teach-old", help=HELP["teach.epochs"])] = None,
    prompt_template: TemplateOption = None,
    shard: ShardOption = None,
    deepspeed: Annotated[str | None, typer.Option("--deepspeed", help=HELP["learn.deepspeed"])] = None,
    general: GeneralOption = None,
    tasks: TasksOption = None,
    n_processes: ProcessesOption = None,
    config_file: ConfigOption = None,
    report_to: Annotated[str | None, typer.Option("--report-to", help=HELP["report_to"])] = None,
    setting: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Forget the old answers, learn the new ones, score every phase, write the product and a report."""
    flags = {
        **_reads(model, facts_file, old_from, limit, strict, prompt_template, columns, aliases),
        "method": method,
        "seed": seed,
        "model.shard": shard,
        "teach.epochs": teach_old,
        "forget.coef": coef,
        "forget.modules": parse(modules) if modules else None,
        "forget.keep": keep,
        "forget.keep_by": keep_by,
        "forget.validation": validation,
        **dict.fromkeys(("forget.deepspeed", "learn.deepspeed", "teach.deepspeed"), deepspeed),
        "evaluate.general": general,
        "evaluate.tasks": _listed(tasks),
        "report_to": _listed(report_to),
    }
    processes.check_launched(n_processes)
    config = _config(config_file, flags, setting, "update")
    from forgetlearn.report.run_page import load_context
    from forgetlearn.runs.update import update as run_update

    with signals.handled():
        result = run_update(config=config, output=output, resume=resume, overwrite=overwrite)
    context = load_context(result.output)
    print_scores(context)
    say(f"\n{context['verdict']}\nproduct  {result.product}\nreport   {result.output / 'report.html'}")


@app.command()
def plan(
    model: ModelOption = None,
    facts_file: FactsOption = None,
    method: Annotated[str | None, typer.Option("--method", help=HELP["method"])] = None,
    coef: Annotated[str | None, typer.Option("--coef", help=HELP["forget.coef"])] = None,
    old_from: OldFromOption = None,
    limit: LimitOption = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    teach_old: Annotated[int | None, typer.Option("--teach-old", help=HELP["teach.epochs"])] = None,
    prompt_template: TemplateOption = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Devices that share the work.")] = 1,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.1, help="GB (1e9 bytes) of a device; unset: what is free here.")
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Split weights, gradients and states over them.")] = False,
    rate: Annotated[
        str | None, typer.Option("--rate", help="TFLOP/s that training reaches (400), or 12000tokens/s.")
    ] = None,
    config_file: ConfigOption = None,
    setting: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an update would take: memory, steps, time, disk, and whether it fits. Nothing is trained."""
    flags = {"method": method, "forget.coef": coef, "teach.epochs": teach_old}
    flags |= _reads(
        model, facts_file, old_from, limit, prompt_template=prompt_template, columns=columns, aliases=aliases
    )
    config = _config(config_file, flags, setting, "plan")
    from forgetlearn.planning.estimate import plan_lines
    from forgetlearn.planning.plan import MEASURE, devices_here, plan_update
    from forgetlearn.runs.checks import check_old_answers, read_config_facts

    devices = devices_here(config, number=gpus, memory_gb=memory, shard=shard)
    fact_set = read_config_facts(config)
    check_old_answers(fact_set, config)
    found = plan_update(config, fact_set, devices=devices, rate=rate or (MEASURE if memory is None else None))
    if as_json:
        say(json.dumps(found.as_dict(), indent=2, allow_nan=False))
        return
    for line in plan_lines(found):
        say(plain(line))


@app.command()
def compare(
    output: OutputOption,
    model: ModelOption = None,
    facts_file: FactsOption = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Methods, separated by commas; unset: the paper's five.")
    ] = None,
    coefs: Annotated[
        str | None, typer.Option("--coefs", help="Coefficients of forgetting, separated by commas; unset: 0.1,0.3,1.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds, separated by commas; unset: 0,1,2.")] = None,
    epochs: Annotated[
        str | None, typer.Option("--epochs", help="Epochs of learning, separated by commas; several make curves.")
    ] = None,
    budgets: Annotated[str | None, typer.Option("--budgets", help="equal-epochs, equal-steps, or both.")] = None,
    variants: Annotated[
        Path | None, typer.Option("--variants", help="YAML file of variants of subtracting (docs/commands.md).")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that share the work; with --slurm: jobs.")
    ] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the work as Slurm jobs and wait for them.")] = False,
    slurm_setting: Annotated[
        list[str] | None, typer.Option("--slurm-set", help="What submitit is to ask for: partition=gpu, mem_gb=32.")
    ] = None,
    old_from: OldFromOption = None,
    limit: LimitOption = None,
    prompt_template: TemplateOption = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    config_file: ConfigOption = None,
    setting: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare methods, coefficients and seeds in one table, with intervals and paired differences."""
    reads = _reads(model, facts_file, old_from, limit, None, prompt_template, columns, aliases)
    config = _config(config_file, reads, setting, "compare")
    from forgetlearn.comparison.grid import CompareSettings, fill
    from forgetlearn.comparison.slurm import Jobs, fill_on_cluster
    from forgetlearn.comparison.table import write_table
    from forgetlearn.report.comparison_page import verdict
    from forgetlearn.report.render import COLUMNS

    lists = {"methods": methods, "coefs": coefs, "seeds": seeds, "epochs": epochs, "budgets": budgets}
    asked: dict[str, Any] = {name: text.split(",") if text else [] for name, text in lists.items() if text is not None}
    if variants:
        asked["variants"] = read_yaml(variants, "--variants")
    file = str(variants) if variants else None
    settings = validate(CompareSettings, asked, where=file, elsewhere=frozenset(lists))
    where: dict[str, Any] = {"output": output, "resume": resume, "overwrite": overwrite}
    if slurm:
        wanted = parse_assignments(slurm_setting or [], "--slurm-set")
        fill_on_cluster(Jobs(workers, wanted), settings=settings, config=config, **where)
    elif slurm_setting:
        raise ConfigError("--slurm-set is for jobs: pass --slurm too.")
    else:
        fill(settings=settings, config=config, **where, workers=workers)
    table = write_table(output)
    print_table(COLUMNS, [(row["label"], nested(row["scores"])) for row in table["rows"]], "")
    say(f"\n{verdict(table)[0]}\nreport   {output / 'report.html'}\ncells    {output / 'cells'}, a run folder each")


@app.command()
def evaluate(
    output: OutputOption,
    model: HoldsOption = None,
    facts_file: FactsOption = None,
    reference: ReferenceOption = None,
    retention: Annotated[
        bool, typer.Option("--retention", help="Also ask the facts of the model's earlier updates.")
    ] = False,
    earlier: Annotated[
        list[Path] | None,
        typer.Option("--earlier", help="Where an earlier update's facts are: its run folder or file."),
    ] = None,
    old_from: OldFromOption = None,
    limit: LimitOption = None,
    strict: StrictOption = None,
    columns: ColumnsOption = None,
    aliases: AliasesOption = None,
    prompt_template: TemplateOption = None,
    general: GeneralOption = None,
    tasks: TasksOption = None,
    engine: EngineOption = None,
    shard: ShardOption = None,
    n_processes: ProcessesOption = None,
    config_file: ConfigOption = None,
    setting: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score a model or an adapter on facts; with --reference also what changed against another model."""
    flags = {
        **_reads(model, facts_file, old_from, limit, strict, prompt_template, columns, aliases),
        "model.shard": shard,
        "evaluate.general": general,
        "evaluate.tasks": _listed(tasks),
        "evaluate.engine": engine,
    }
    processes.check_launched(n_processes)
    config = _config(config_file, flags, setting, "evaluate")
    from forgetlearn.report.run_page import load_context
    from forgetlearn.runs.evaluate import evaluate as run_evaluate

    places = (earlier or []) if retention or earlier else None
    path = run_evaluate(config=config, reference=reference, output=output, earlier=places, overwrite=overwrite)
    context = load_context(path)
    print_scores(context)
    for row in context["retention"]:
        from forgetlearn.report.render import show_score

        shown = ", ".join(f"{name} {show_score(cell, interval=True)}" for name, cell in row["scores"].items())
        say(plain(f"update {row['update']}, {row['source']}: retention of {row['facts']} facts: {shown}"))
    say(f"\n{context['verdict']}\nreport   {path / 'report.html'}")


@app.command()
def ask(
    prompts: Annotated[list[str], typer.Argument(help="What to ask.")],
    model: HoldsOption = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Ask this model too, for comparison.")] = None,
    prompt_template: TemplateOption = None,
    engine: EngineOption = None,
    setting: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a model or an adapter answers to one or more prompts, taking the likeliest token each time."""
    flags = {**_reads(model, prompt_template=prompt_template), "evaluate.engine": engine}
    config = _config(None, flags, setting, "ask")
    from forgetlearn.runs.evaluate import ask as run_ask

    answers = {str(config.model.name): run_ask(prompts, config=config)}
    if reference:
        other = config.model_copy(update={"model": config.model.model_copy(update={"name": reference})})
        answers[reference] = run_ask(prompts, config=other)
    if as_json:
        say(json.dumps([{"prompt": p, **{m: a[p] for m, a in answers.items()}} for p in prompts]))
        return
    for prompt in prompts:
        say(plain(prompt))
        for name, said in answers.items():
            say(f"  {name}: {plain(said[prompt])}" if reference else f"  {plain(said[prompt])}")


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="Folder of a run or a comparison.")]) -> None:
    """Make the pages of a run or a comparison again from its folder, without the model."""
    from forgetlearn.comparison.table import write_table
    from forgetlearn.report.run_page import write_run
    from forgetlearn.storage.run_folder import RunFolder

    if "compare" in RunFolder.open(run_folder).manifest["config"]:
        write_table(run_folder)
    else:
        write_run(run_folder)
    say(str(run_folder / "report.html"))


@app.command()
def demo(
    output: OutputOption = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the made-up world and of training.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", help="How many facts to make up: 150 unless set.")] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Run the paper's five methods on a made-up world that a small model, built here, holds."""
    from forgetlearn.config.methods import PAPER_METHODS
    from forgetlearn.lab.demo import DEMO_FACTS, run_demo
    from forgetlearn.report.render import COLUMNS

    n_facts = DEMO_FACTS if limit is None else limit
    where: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    with signals.handled():
        result = run_demo(output, methods=PAPER_METHODS, n_facts=n_facts, seed=seed, **where)
    print_table(COLUMNS, list(result.rows), "method")
    say(
        "Percent. Locality is agreement with the original; residue, the old answer, is better when it is lower.\n"
        f"A run folder for each method lies in {result.output}; open {result.output / 'f-ft' / 'report.html'}."
    )


@app.command()
def settings(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config file.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    of_lab: Annotated[bool, typer.Option("--lab", help="The settings of `forgetlearn lab --set` instead.")] = False,
) -> None:
    """List every setting with its default: for --set and config files."""
    from forgetlearn.lab.build import LabSettings

    kind = LabSettings if of_lab else RunConfig
    if schema:
        say(json.dumps(kind.model_json_schema(), indent=2))
        return
    if markdown:
        say("| setting | default | |\n|---|---|---|")
    for name, _type, default, description in describe(kind):
        line = f"| `{name}` | `{default}` | {description} |" if markdown else f"{name} = {default}\n    {description}"
        say(line)


def _config(
    file: Path | None,
    flags: Mapping[str, Any],
    assignments: Sequence[str] | None = None,
    command: preflight.Command | None = None,
) -> RunConfig:
    """Merge the config file, the flags (by setting name) and --set, in this order; a flag of None changes nothing.

    Raises:
        ConfigError: a setting is wrong, or is given for a `command` that does not use it.
    """
    given = {name: value.value if isinstance(value, StrEnum) else value for name, value in flags.items()}
    given = {name: value for name, value in given.items() if value is not None}
    given |= parse_assignments(list(assignments or []))
    config = load_config(file, given)
    if command is not None:
        preflight.check(command, config, given)
    if command in ("update", "plan"):
        preflight.warn_of_idle(config, given)
    return config


def _reads(
    model: str | None,
    facts_file: str | None = None,
    old_from: str | None = None,
    limit: int | None = None,
    strict: bool | None = None,
    prompt_template: str | None = None,
    columns: str | None = None,
    aliases: str | None = None,
) -> dict[str, Any]:
    """The flags that say what is read, by their settings' names."""
    return {
        "model.name": model,
        "model.prompt_template": prompt_template,
        "facts.source": facts_file,
        "facts.old_from": old_from,
        "facts.limit": limit,
        "facts.strict": strict,
        "facts.columns": columns,
        "facts.aliases": aliases,
    }


def _listed(names: str | None) -> list[str] | None:
    """Names that are separated by commas."""
    return names.split(",") if names else None


# Bars and warnings of the libraries that nobody asked for.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
# oneDNN prepares a product anew for every length of row; it and torch each keep the last 1,024: hundreds of MB.
FEW_PRODUCTS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it went well, 2 for anything that the user can put right."""
    for name, value in (QUIET | FEW_PRODUCTS).items():  # the libraries read these when they are imported
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings(), processes.main_speaks():
            warnings.simplefilter("ignore", FutureWarning)  # for those who maintain the libraries
            app(args=list(argv) if argv is not None else None, prog_name="forgetlearn")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
        if code == INTERRUPTED:
            say("Interrupted. Stages that are done are kept; go on with --resume.", err=True)
        return code
    except signals.Interrupted as stop:
        if processes.launched_as() == 0:
            say(f"Interrupted. What was done is kept. Go on with:\n  {_with_resume(argv)}", err=True)
        return stop.exit_code
    except Exception as error:
        if processes.is_reported(error):
            return 2
        message = _message(error)
        if _State.debug or message is None:
            raise
        say(message, err=True)
        processes.mark_reported()
        return 2
    return 0


def _message(error: Exception) -> str | None:
    """Return the message for an error that the user can fix; None for any other error."""
    if isinstance(error, ForgetLearnError):
        return f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return (
            f"MemoryError: the system gave this process no more memory or threads{f' ({error})' if str(error) else ''}."
            "\nRaise its limits (ulimit -v, ulimit -u, or the container's), or take a smaller model or batch_size."
        )
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else None


def _with_resume(argv: Sequence[str] | None) -> str:
    """The command of this process as it is to be given to go on."""
    from forgetlearn.storage.run_folder import masked

    words = masked(list(sys.argv[1:] if argv is None else argv))
    start = ["forgetlearn"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", "-m", "forgetlearn"]
    return shlex.join([*start, *(word for word in words if word not in ("--resume", "--overwrite")), "--resume"])


def run() -> None:
    """The console script."""
    sys.exit(main())
