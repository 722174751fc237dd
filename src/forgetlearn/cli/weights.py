"""The commands on weights and products: subtract, vector, apply, undo, export, inspect, save, push, log.

Except for export, they import neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from forgetlearn.cli.options import JsonOption, OutputOption, OverwriteOption, RunArgument
from forgetlearn.cli.terminal import print_tallies, say
from forgetlearn.errors import ConfigError, plain

if TYPE_CHECKING:
    from forgetlearn.weights.folder_arithmetic import Written
    from forgetlearn.weights.streaming import Numbers

app = typer.Typer()


StoredAs = Literal["keep", "float32", "bfloat16"]
StoredInGguf = Literal["f32", "f16", "bf16", "q8_0"]
Target = Literal["gguf", "ollama", "merged", "adapter"]
Rounding = Literal["nearest", "stochastic"]
BaseOption = Annotated[str, typer.Option("--base", help="Folder or hub id of the base model; it is only read.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a base that is on the hub.")
]
DtypeOption = Annotated[StoredAs, typer.Option("--dtype", help="Precision of the result; keep: the base's.")]
RoundingOption = Annotated[
    Rounding, typer.Option("--rounding", help="stochastic keeps small changes in bfloat16, with a little noise.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of stochastic rounding.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; unset: the cores, up to 4.")]
BaseIdOption = Annotated[str | None, typer.Option("--base-model-id", help="The base's id on the hub, for the card.")]
MergedOption = Annotated[bool, typer.Option("--merged", help="The merged weights instead of the adapter.")]


@app.command()
def subtract(
    base: BaseOption,
    output: OutputOption,
    coef: Annotated[float, typer.Option("--coef", help="How much of the change is subtracted, for example 0.3.")],
    tuned: Annotated[
        Path | None, typer.Option("--tuned", help="Subtract what fine-tuning added: its model's folder.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Or subtract a LoRA adapter: its folder.")] = None,
    vector: Annotated[
        Path | None, typer.Option("--vector", help="Or subtract what `forgetlearn vector` wrote.")
    ] = None,
    modules: Annotated[
        str | None, typer.Option("--modules", help="Which weights, as in forget.modules: mlp,layers.0-3 or head=0.5.")
    ] = None,
    dtype: DtypeOption = "keep",
    rounding: RoundingOption = "nearest",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base that the adapter was not trained on.")
    ] = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write base - coef * (tuned - base), whatever the size of the model, in little memory."""
    numbers = _numbers(dtype, rounding, seed, threads)
    from forgetlearn.weights.folder_arithmetic import subtract_folders

    folder = _folder_of(base, revision)
    written = subtract_folders(
        folder,
        output,
        coef,
        tuned=tuned,
        adapter=adapter,
        vector=vector,
        factors=_factors(folder, modules) if modules else None,
        numbers=numbers,
        any_base=any_base,
        overwrite=overwrite,
    )
    _say(written, as_json)


@app.command()
def vector(
    base: BaseOption,
    tuned: Annotated[Path, typer.Option("--tuned", help="Folder of the fine-tuned model.")],
    output: OutputOption,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Save tuned - base in float32, to be subtracted, added or looked at later."""
    _few_threads()
    from forgetlearn.weights.folder_arithmetic import save_vector

    written = save_vector(_folder_of(base, revision), tuned, output, overwrite=overwrite, threads=threads)
    say(f"{output}: {written.moved} tensors, {written.parameters:,} numbers in float32, {written.seconds:.1f} s")


@app.command()
def apply(
    what: Annotated[Path, typer.Argument(help="Folder that `forgetlearn vector` wrote, or of a finished run.")],
    base: BaseOption,
    output: OutputOption,
    merge: Annotated[bool, typer.Option("--merge", help="Of a run's adapter: add it to the base's weights.")] = False,
    factor: Annotated[float, typer.Option("--factor", help="base + factor * vector; negative subtracts.")] = 1.0,
    dtype: DtypeOption = "keep",
    rounding: RoundingOption = "nearest",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write base + factor * vector, or make the product of a run again from its base."""
    numbers = _numbers(dtype, rounding, seed, threads)
    from forgetlearn.storage.run_folder import is_run

    if is_run(what):
        if factor != 1 or ((dtype, rounding) != ("keep", "nearest") and not merge):
            raise ConfigError(
                "--factor applies only to a vector; --dtype and --rounding apply only to a vector or with --merge."
            )
        if revision is not None:
            raise ConfigError(
                "--revision applies only to a vector: for a run, forgetlearn uses the base commit that the run "
                "recorded."
            )
        from forgetlearn.products.restore import apply_run

        say(apply_run(what, base, output, merge=merge, numbers=numbers, overwrite=overwrite))
        return
    if merge:
        raise ConfigError(f"--merge needs a run folder; {what} is not one.")
    from forgetlearn.weights.folder_arithmetic import apply_vector

    written = apply_vector(what, _folder_of(base, revision), output, factor, numbers=numbers, overwrite=overwrite)
    _say(written, as_json)


@app.command()
def undo(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder to write the base to; unset: it only says where the base is."),
    ] = None,
) -> None:
    """Restore the exact base of a run, verified by its hash, or explain why it cannot be restored."""
    _few_threads()
    from forgetlearn.products.restore import undo_run

    say(undo_run(run, output))


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Target, typer.Option("--to", help="gguf (llama.cpp), ollama, merged (transformers) or adapter.")],
    output: OutputOption,
    base: Annotated[
        str | None, typer.Option("--base", help="Base of the run's adapter; unset: the one that the run recorded.")
    ] = None,
    dtype: Annotated[
        StoredInGguf | None, typer.Option("--dtype", help="Precision of GGUF; unset: the base's, or the adapter's own.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a run's product for other programs: as GGUF, for Ollama, as a merged model, or as an adapter."""
    _few_threads()
    from forgetlearn.products.export import export as write

    say(write(run, output, to=to, base=base, dtype=dtype, overwrite=overwrite))


@app.command()
def save(
    run: RunArgument,
    output: OutputOption,
    base_model_id: BaseIdOption = None,
    merged: MergedOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the files that push would publish: the product's own files and a card without local paths."""
    from forgetlearn.products import publish

    publish.save(run, output, base_model_id=base_model_id, merged=merged, overwrite=overwrite)
    say(f"{output}: ready to be looked at. Confirm the licence of the base and name it in {output / 'README.md'}.")


@app.command()
def push(
    run: RunArgument,
    to: Annotated[str, typer.Option("--to", help="USER/NAME on the hub.")],
    base_model_id: BaseIdOption = None,
    merged: MergedOption = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to write to; created if missing.")] = None,
) -> None:
    """Publish a run's product on the hub, with the token of HF_TOKEN or `hf auth login`."""
    from forgetlearn.products import publish

    address = publish.push(run, to, base_model_id=base_model_id, merged=merged, private=private, revision=revision)
    say(f"{address}\nConfirm that the licence of the base allows this, and name it in the card.")


@app.command()
def inspect(
    what: Annotated[Path, typer.Argument(help="Folder of a vector, a run, an adapter or a fine-tuned model.")],
    base: Annotated[str | None, typer.Option("--base", help="The model that it changes; a run names its own.")] = None,
    coef: Annotated[float | None, typer.Option("--coef", help="Count what rounding leaves of this much.")] = None,
    other: Annotated[Path | None, typer.Option("--other", help="Another change: the cosine between the two.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="SVG file to write: the change over the layers.")] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how large a change of weights is, per layer and kind of module, and what rounding leaves of it."""
    _few_threads()
    from forgetlearn.products.inspect import inspect_change, plot_change

    if revision is not None and base is None:
        raise ConfigError(f"--revision {revision} needs a base on the hub. Pass its id with --base.")
    found = inspect_change(what, other=other, base=_folder_of(base, revision) if base else None, coef=coef)
    if plot:
        plot_change(found, plot)
    if as_json:
        say(json.dumps(found.as_dict()))
        return
    for name, value in found.metadata.items():
        say(f"{name}: {value}")
    rows = [("all", found.total), *found.by_kind().items()]
    layers = sorted(found.by_layer().items(), key=lambda item: -1 if item[0] is None else item[0])
    rows += [(f"layer {layer}" if layer is not None else "in no layer", tally) for layer, tally in layers]
    print_tallies(rows)
    from forgetlearn.weights.folder_arithmetic import REMEDIES
    from forgetlearn.weights.rounding import warning

    if text := warning(found.total.survival.as_dict(), REMEDIES):
        say(text, err=True)


@app.command("log")
def show_log(
    model: Annotated[str, typer.Argument(help="Folder of a model or a run, or a hub id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also hash the files of the last update's product.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the chain of updates that made a model: when, which facts, method, scores, hashes."""
    from forgetlearn.products.chain import chain_of, check_files, describe

    chain = chain_of(model)
    if verify:
        check_files(model, chain)
    if as_json:
        say(json.dumps([update.as_json() for update in chain]))
        return
    for number, update in enumerate(chain, 1):
        first, *others = map(plain, describe(update))
        say("\n".join([f"{number:>2}  {first}", *(f"    {line}" for line in others)]))
    if not chain:
        say(f"{model}: no update of forgetlearn is recorded for this model.")
    elif verify:
        say("verified: the files are those that the last update wrote")


def _factors(base: Path, modules: str) -> dict[str, float]:
    """Return the factor of each weight that --modules names. Parts such as `mlp` need the model's structure (torch)."""
    from forgetlearn.models import module_names
    from forgetlearn.weights.checkpoint_folder import CheckpointFolder

    wanted = module_names.parse(modules)
    if module_names.needs_structure(wanted):
        from forgetlearn.models.modules import groups_of_folder

        return module_names.factors_among(groups_of_folder(base), wanted, "--modules")
    sizes = {name: entry.n_entries for name, entry in CheckpointFolder(base).entries.items()}
    return module_names.factors_among(module_names.stored_groups(sizes), wanted, "--modules")


def _folder_of(base: str, revision: str | None) -> Path:
    """Return the folder of a base, downloaded into the hub's cache if it is named by a hub id."""
    if Path(base).exists() or base.count("/") != 1:  # the hub's client takes a while to import
        if revision is not None:
            raise ConfigError(f"--revision {revision}: {base} is a path, and only the hub has revisions. Leave it out.")
        return Path(base)
    from forgetlearn.models.hub import folder_of

    return folder_of(base, revision)


def _few_threads() -> None:
    """Use one BLAS thread, because weights are already processed in parallel. Call this before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _numbers(dtype: StoredAs, rounding: Rounding, seed: int, threads: int | None) -> Numbers:
    _few_threads()
    from forgetlearn.weights.streaming import Numbers

    return Numbers(dtype, rounding, seed, threads)


def _say(written: Written, as_json: bool) -> None:
    survival = written.survival
    if as_json:
        names = ("tensors", "moved", "parameters")
        counts = {"output": str(written.output), **{name: getattr(written, name) for name in names}}
        seconds = {name: round(getattr(written, name), 3) for name in ("seconds", "seconds_to_sync")}
        say(json.dumps({**counts, **survival.as_dict(), **seconds}))
        return
    say(f"{written.counts()}; {written.seconds:.1f} s, and {written.seconds_to_sync:.1f} s until it was on the disk")
    from forgetlearn.weights.rounding import in_words

    if text := in_words(survival.as_dict()):
        say(text)
    if warning := written.warning():
        say(warning, err=True)
