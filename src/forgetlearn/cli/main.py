"""The command line: each command checks its options and calls the package. Heavy imports are inside the commands."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from forgetlearn._version import __version__
from forgetlearn.cli import chat, weights
from forgetlearn.cli.options import (
    HELP,
    INPUTS,
    READING,
    TRAINED_ON,
    Given,
    JsonOption,
    OutputOption,
    OverwriteOption,
    ProcessesOption,
    ResumeOption,
    takes,
)
from forgetlearn.cli.terminal import (
    PlainLines,
    print_facts,
    print_paper,
    print_result,
    print_scores,
    print_stream,
    print_table,
    say,
)
from forgetlearn.config import preflight
from forgetlearn.config.base import describe, parse_assignments, read_yaml, validate
from forgetlearn.config.recipes import FORGET
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.errors import ConfigError, ForgetLearnError, is_out_of_memory, plain
from forgetlearn.runtime import processes, signals

app = typer.Typer(
    name="forgetlearn",
    help="Forget, then learn: change the facts that a language model holds.",
    epilog="To see it work: forgetlearn demo. Every command answers --help; `forgetlearn settings` lists all settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as everything else that --help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(weights.app)
app.add_typer(chat.app)

EarlierOption = Annotated[
    list[Path] | None,
    typer.Option("--earlier", help="Where an earlier update's facts are: its run folder or file; again for more."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
TOGETHER = ("update", "forget", "evaluate")  # commands that several processes share
INTERRUPTED = 130  # what a shell reports after Ctrl-C


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
            f"Start it without torchrun; {', '.join(TOGETHER)} can share the work among several."
        )
    if processes.launched_rank() > 0:  # only rank 0 logs
        logging.getLogger("forgetlearn").setLevel(logging.CRITICAL)


class _State:
    """Flags that are needed after a command has failed."""

    debug = False


@app.command()
@takes(*READING, "facts.strict", files=False)
def facts(
    given: Given, file: Annotated[str, typer.Argument(help=HELP["facts.source"])], as_json: JsonOption = False
) -> None:
    """Read a file of facts, list what is used and what is left out, and show the first three."""
    from forgetlearn.facts import read_facts

    found = read_facts(file, **load_config(None, given.values).facts.model_dump(exclude={"source"}), purpose="score")
    if as_json:
        without = {f"without_{which}_answer": getattr(found, f"without_{which}_answer") for which in ("old", "new")}
        say(json.dumps({**asdict(found), **without}))
    else:
        print_facts(found)


@app.command()
@takes("facts.source", "facts.old_from", "facts.columns", "facts.aliases", files=False)
def lab(
    given: Given,
    output: OutputOption,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take the first N usable facts; without --facts: make up N.")
    ] = None,
    seed: SeedOption = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, NAME=VALUE; again for more. `forgetlearn settings --lab` lists them."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a small base model that holds given facts, or a made-up world, in about a minute."""
    from forgetlearn.facts import read_facts
    from forgetlearn.lab.build import LabSettings, build_lab
    from forgetlearn.storage.disk import read_json

    asked = {"seed": seed, **parse_assignments(setting or [])}
    used = whole = None
    if "facts.source" in given.values:
        if "n_facts" in asked:
            raise ConfigError("n_facts: not used by lab with --facts: no facts are made up. Give --limit.")
        reading = load_config(None, {**given.values, "facts.limit": limit}).facts.model_dump()
        source = reading.pop("source")
        used, whole = read_facts(source, **reading), read_facts(source, **{**reading, "limit": None})
    elif given.values:
        raise ConfigError(f"{', '.join(given.values)}: not used by lab without --facts: facts are made up.")
    elif limit is not None:
        asked["n_facts"] = limit
    settings = validate(LabSettings, asked)
    folder = build_lab(used, settings, vocabulary_from=whole, output=output, overwrite=overwrite)
    built = read_json(folder / "lab.json")
    held = ", ".join(f"{100 * share:.1f} % of {what}" for what, share in built["held"].items() if share is not None)
    say(f"{folder}: {built['parameters']:,} parameters; gives {held} exactly.")
    say(
        f"Next: forgetlearn update --model {folder} --facts {folder}/facts.jsonl "
        f"--config {folder}/update.yaml --method f-ft --coef 1 --output runs/first"
    )


@app.command(epilog="It learns until the model predicts every new answer; --set learn.epochs=10 sets how long instead.")
@takes(
    *(*INPUTS, *TRAINED_ON),
    *("facts.strict", "method", "forget.coef", "forget.modules", "forget.validation", "seed", "teach.epochs"),
    *("model.shard", "train.deepspeed", "report_to"),
    *("evaluate.probes", "evaluate.max_damage", "evaluate.general", "evaluate.tasks"),
)
def update(
    given: Given,
    output: OutputOption,
    failed_only: Annotated[
        Path | None,
        typer.Option("--failed-only", help="Update this run's product on the facts that it got wrong, as it did."),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option("--batches", min=1, help="Run the facts as N updates, each on the product of the one before."),
    ] = None,
    earlier: EarlierOption = None,
    n_processes: ProcessesOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Teach a model new answers (methods f-...: after forgetting the old ones), score it, write product and report."""
    processes.check_launched(n_processes)
    from forgetlearn.report import stream_page
    from forgetlearn.report.run_page import overview
    from forgetlearn.runs.failed_only import config_for_failed
    from forgetlearn.runs.stream import stream
    from forgetlearn.runs.update import update as run_update

    if earlier:
        given = replace(given, values={**given.values, "keep.earlier": tuple(map(str, earlier))})
    if failed_only:
        model, facts = given.flag("model.name"), given.flag("facts.source")
        config = given.checked("update", config_for_failed(failed_only, given.settings, model, facts))
    else:
        config = given.config("update")
    with signals.handled():
        if batches is not None:
            made = stream(config=config, output=output, batches=batches, resume=resume, overwrite=overwrite)
            print_stream(made.stream)
            say(f"\n{stream_page.verdict(made.stream)}\nproduct  {made.product}\nreport   {output / 'report.html'}")
            return
        result = run_update(config=config, output=output, resume=resume, overwrite=overwrite)
    print_result(overview(result.summary), result.output, result.product)


@app.command(epilog="Unless set, the recipe is forget: --method npo --coef 1, whether or not an answer is held.")
@takes(
    *(*INPUTS, "facts.strict", "recipe", "train.answers", "keep.source", "method", "forget.coef", "forget.modules"),
    *("seed", "model.shard", "train.deepspeed", "unlearn.relearn_steps", "report_to"),
    *("evaluate.probes", "evaluate.max_damage", "evaluate.general", "evaluate.tasks"),
)
def forget(
    given: Given,
    output: OutputOption,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", help="Instead of --facts: a text, or JSONL with the field text, to forget."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="A model that never knew the facts, to compare with.")
    ] = None,
    n_processes: ProcessesOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a model forget facts or texts and learn nothing instead; test what is left, write product and report."""
    processes.check_launched(n_processes)
    given = given.or_recipe(FORGET)
    texts = None
    if documents:
        from forgetlearn.facts.documents import read_documents

        read_as = load_config(given.file, given.values).facts
        if read_as.source:
            raise ConfigError("--documents: facts or documents are forgotten, not both. Leave facts.source out.")
        texts = read_documents(documents, read_as.limit, strict=read_as.strict)
    config = given.config("forget")
    if documents:
        config = config.model_copy(update={"facts": config.facts.model_copy(update={"limit": None})})  # has been read
    from forgetlearn.report.run_page import overview
    from forgetlearn.runs.forget import forget_facts

    with signals.handled():
        result = forget_facts(
            None, texts, config, output=output, reference=reference, resume=resume, overwrite=overwrite
        )
    print_result(overview(result.summary), result.output, result.product)


@app.command()
@takes(*INPUTS, *TRAINED_ON, "method", "forget.coef", "teach.epochs")
def plan(
    given: Given,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Devices that share the work.")] = 1,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.1, help="GB (1e9 bytes) of a device; unset: what is free here.")
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Split weights, gradients and states over them.")] = False,
    rate: Annotated[
        str | None, typer.Option("--rate", help="TFLOP/s that training reaches (400), or 12000tokens/s.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate what an update would take: memory, steps, time, disk, and whether it fits. Nothing is trained."""
    config = given.config("plan")
    from forgetlearn.planning.estimate import plan_lines
    from forgetlearn.planning.plan import MEASURE, devices_here, plan_update
    from forgetlearn.runs.checks import check_old_answers, read_config_facts

    devices = devices_here(config, number=gpus, memory_gb=memory, shard=shard)
    fact_set = read_config_facts(config)
    check_old_answers(fact_set, config)
    speed = rate or (MEASURE if memory is None else None)
    found = plan_update(config, fact_set, devices=devices, rate=speed, compare=True)
    if as_json:
        say(json.dumps(found.as_dict(), indent=2, allow_nan=False))
        return
    for line in plan_lines(found):
        say(plain(line))


@app.command()
@takes(*INPUTS, *TRAINED_ON)
def compare(
    given: Given,
    output: OutputOption,
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
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Experimental: submit the work as Slurm jobs and wait for them.")
    ] = False,
    slurm_setting: Annotated[
        list[str] | None, typer.Option("--slurm-set", help="What submitit asks for: partition=gpu, mem_gb=32.")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare methods, coefficients and seeds in one table, with intervals and paired differences."""
    config = given.config("compare")
    if epochs is not None and "learn.epochs" in given.values:
        raise ConfigError("learn.epochs: not used by compare with --epochs. Leave one of them out.")
    if slurm_setting and not slurm:
        raise ConfigError("--slurm-set needs --slurm: it configures the submitted jobs.")
    from forgetlearn.comparison.cells import CompareSettings, cell_config, cells_of, without_teaching
    from forgetlearn.comparison.grid import fill
    from forgetlearn.comparison.slurm import Jobs, fill_on_cluster
    from forgetlearn.comparison.table import write_table
    from forgetlearn.report.comparison_page import verdict
    from forgetlearn.report.render import leading_columns

    lists = {"methods": methods, "coefs": coefs, "seeds": seeds, "epochs": epochs, "budgets": budgets}
    asked: dict[str, object] = {
        name: text.split(",") if text else [] for name, text in lists.items() if text is not None
    }
    if variants:
        asked["variants"] = read_yaml(variants, "--variants")
    file = str(variants) if variants else None
    settings = validate(CompareSettings, asked, where=file, elsewhere=frozenset(lists))
    untaught = without_teaching(config)
    cells = [cell_config(untaught, cell, settings.variants) for cell in cells_of(settings, untaught)]
    preflight.warn_of_idle(cells, given.values)
    if slurm:
        jobs = Jobs(workers, parse_assignments(slurm_setting or [], "--slurm-set"))
        fill_on_cluster(jobs, settings=settings, config=config, output=output, resume=resume, overwrite=overwrite)
    else:
        fill(settings=settings, config=config, output=output, resume=resume, overwrite=overwrite, workers=workers)
    table = write_table(output)
    columns = leading_columns(table.protocols)
    print_table([(row.label, [row.scores.get(f"{q}.{p}") for q, p in columns]) for row in table.rows], "", columns)
    for row in table.rows:
        if row.added_tokens is not None:
            say(f"{row.label}: {row.added_tokens:.1f} tokens more in each question, on average")
    say(f"\n{verdict(table)[0]}\nreport   {output / 'report.html'}\ncells    {output / 'cells'}, a run folder each")


@app.command()
@takes("model.name", "facts.limit", "model.prompt_template", "evaluate.tasks")
def paper(
    given: Given,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to write; not needed with --plan.")] = None,
    zsre: Annotated[Path | None, typer.Option("--zsre", help="File of ZsRE's facts.")] = None,
    counterfact: Annotated[Path | None, typer.Option("--counterfact", help="File of COUNTERFACT's facts.")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            help="The paper's model whose coefficients and figures are used: llama-2-7b "
            "(unless set), llama-7b, or bloom-7b, which is table 2.",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds, separated by commas; unset: 0,1,2.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Parts, separated by commas: table1 to table5, figure4 to figure7.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Rows of tables 1 to 3, separated by commas; unset: all.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it takes on this machine, and start nothing.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.1, help="With --plan: GB (1e9 bytes) of the device.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="With --plan: TFLOP/s that training reaches (400), or 12000tokens/s.")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Reproduce the paper's tables and figures on a model, and set each of its figures beside yours."""
    config = given.or_recipe("paper").config("paper")
    if not plan_only and (memory is not None or rate is not None):
        raise ConfigError("--memory and --rate need --plan: they say what is planned for.")
    from forgetlearn.reproduction.settings import PaperSettings

    lists = {"seeds": seeds, "only": only, "methods": methods}
    asked: dict[str, object] = {name: text.split(",") for name, text in lists.items() if text is not None}
    asked |= {"like": like} if like is not None else {}
    settings = validate(PaperSettings, asked, elsewhere=frozenset(asked))
    if plan_only:
        from forgetlearn.reproduction.plan import plan_lines, plan_paper

        given_facts = {"zsre": zsre, "counterfact": counterfact}
        found = plan_paper(**given_facts, settings=settings, config=config, memory_gb=memory, rate=rate)
        for line in plan_lines(found):
            say(plain(line))
        return
    if output is None:
        raise ConfigError("--output is not set. Give the folder to write, or --plan to only see what it would take.")
    from forgetlearn.report.paper_page import PAGE, verdict
    from forgetlearn.reproduction.paper import paper as run_paper

    report = run_paper(
        zsre=zsre,
        counterfact=counterfact,
        settings=settings,
        config=config,
        output=output,
        resume=resume,
        overwrite=overwrite,
    )
    print_paper(report)
    say(f"\n{verdict(report)}\nreport   {output / PAGE}")


@app.command()
@takes(
    *INPUTS, "facts.strict", "evaluate.probes", "evaluate.general", "evaluate.tasks", "evaluate.engine", "model.shard"
)
def evaluate(
    given: Given,
    output: OutputOption,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The model before the update; locality is agreement with it.")
    ] = None,
    retention: Annotated[
        bool, typer.Option("--retention", help="Also ask the facts of the model's earlier updates.")
    ] = False,
    earlier: EarlierOption = None,
    n_processes: ProcessesOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score a model or an adapter on facts; with --reference, also compare it with another model."""
    processes.check_launched(n_processes)
    config = given.config("evaluate")
    from forgetlearn.report.run_page import overview
    from forgetlearn.runs.evaluate import evaluate as run_evaluate
    from forgetlearn.storage.records import Summary

    places = (earlier or []) if retention or earlier else None
    path = run_evaluate(config=config, reference=reference, output=output, earlier=places, overwrite=overwrite)
    print_result(overview(Summary.load(path / "summary.json")), path)


@app.command()
@takes("model.name", "model.prompt_template", "evaluate.engine")
def ask(
    given: Given,
    prompts: Annotated[list[str], typer.Argument(help="What to ask.")],
    reference: Annotated[str | None, typer.Option("--reference", help="Ask this model too, for comparison.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a model or an adapter answers to one or more prompts, taking the likeliest token each time."""
    config = given.config("ask")
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
        for name, answered in answers.items():
            say(f"  {name}: {plain(answered[prompt])}" if reference else f"  {plain(answered[prompt])}")


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, a stream, a comparison or a paper.")],
) -> None:
    """Write the pages of a run, a stream, a comparison or a reproduction again from its folder, without the model."""
    from forgetlearn.comparison.compare import write_report

    say(str(write_report(run_folder)))


@app.command()
def demo(
    output: OutputOption = Path("demo"),
    seed: SeedOption = 0,
    limit: Annotated[int, typer.Option("--limit", help="How many facts to make up.")] = 150,
    model: Annotated[
        str | None, typer.Option("--model", help="A chat model, to update with a dozen facts that went stale.")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a small model that knows a made-up world, and run the paper's five methods on it; update a chat model."""
    from forgetlearn.lab.demo import conversation, run_demo
    from forgetlearn.report.run_page import overview

    with signals.handled():
        result = run_demo(output, n_facts=limit, seed=seed, chat_model=model, resume=resume, overwrite=overwrite)
    print_table(result.rows, "method", result.columns)
    say(
        "Percent. Locality is agreement with the original; residue, the old answer, is better when it is lower.\n"
        f"A run folder for each method lies in {result.output}; open {result.output / 'f-ft' / 'report.html'}."
    )
    if result.chat is None:
        say("No chat model was updated: give one with --model. `make models` fetches a small one.")
        return
    say(f"\n{model}, updated with a dozen facts that went stale:")
    for fact, before, after in conversation(result.chat):
        say(f"  {fact}\n    before  {before}\n    after   {after}")
    print_scores(overview(result.chat.summary))
    say(f"Open {result.chat.output / 'report.html'}.")


@app.command()
def settings(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config file.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    of_lab: Annotated[bool, typer.Option("--lab", help="The settings of `forgetlearn lab --set` instead.")] = False,
) -> None:
    """List every setting of --set and config files, with its default."""
    if of_lab:
        from forgetlearn.lab.build import LabSettings
    kind = LabSettings if of_lab else RunConfig
    if schema:
        say(json.dumps(kind.model_json_schema(), indent=2))
        return
    if markdown:
        say("| setting | default | |\n|---|---|---|")
    for name, default, description in describe(kind):
        line = f"| `{name}` | `{default}` | {description} |" if markdown else f"{name} = {default}\n    {description}"
        say(line)


# Silences the libraries' progress bars and warnings.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
# oneDNN prepares a matrix product for each row length. It and torch each cache the last 1,024: hundreds of MB. With 64,
# each change of the row length prepared a step's thirty anew in bfloat16, 1.4 ms each.
FEW_PRODUCTS = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raise an error that the user cannot fix.

    The code is 0 on success, 2 for an error that the user can fix, and 128 + n after signal n.
    """
    for name, value in (QUIET | FEW_PRODUCTS).items():  # the libraries read these when they are imported
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings(), processes.main_speaks():
            warnings.simplefilter("ignore", FutureWarning)  # meant for the libraries' maintainers
            app(args=list(argv) if argv is not None else None, prog_name="forgetlearn")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
        if code == INTERRUPTED:
            say("Interrupted. Finished stages are kept; continue with --resume.", err=True)
        return code
    except signals.Interrupted as stop:
        if processes.launched_rank() == 0:
            say(f"Interrupted. What was done is kept. Continue with:\n  {_with_resume(argv)}", err=True)
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
    """Return the command of this process with --resume."""
    from forgetlearn.storage.provenance import masked

    words = masked(list(sys.argv[1:] if argv is None else argv))
    start = ["forgetlearn"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", "-m", "forgetlearn"]
    return shlex.join([*start, *(word for word in words if word not in ("--resume", "--overwrite")), "--resume"])


def run() -> None:
    """Run the console script `forgetlearn`."""
    sys.exit(main())
