"""Make checkpoint folders from others: subtract a change, save or apply a vector, merge an adapter.

Nothing is written until all names and shapes agree and the disk has room. The output gets its name last.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forgetlearn.errors import ConfigError, ModelError, RunError, some
from forgetlearn.storage.digests import copy_own, is_recorded, licences, model_files, sha256_of
from forgetlearn.storage.disk import atomic_folder, naming, read_json, remove_unfinished, write_json
from forgetlearn.storage.provenance import command_line, versions
from forgetlearn.storage.run_folder import ARITHMETIC, MANIFEST, check_output
from forgetlearn.weights.adapter_delta import Adapter
from forgetlearn.weights.agreement import check_coef
from forgetlearn.weights.checkpoint_folder import INDEX, WHOLE, WIDTHS, CheckpointFolder, header_bytes, read_object
from forgetlearn.weights.deltas import VECTOR, Change, Difference, SavedVector, refuse_quantised
from forgetlearn.weights.rounding import Survival, warning
from forgetlearn.weights.streaming import SPELLED, Numbers, VectorWork, Work, file_pieces, model_pieces

REMEDIES = (
    "--dtype float32, or a kept adapter instead of merged weights, or --rounding stochastic (with a little noise)"
)
# Files of training and other programs, which are not copied with the base. Nor is its card, which describes the base.
LEFT_BEHIND = (
    *("trainer_state.json", "adapter_config.json", "all_results.json", "train_results.json"),
    *("lab.json", MANIFEST, ARITHMETIC),
)
CHANGES: dict[str, Callable[[CheckpointFolder, str | Path], Change]] = {
    "tuned": Difference,
    "adapter": Adapter,
    "vector": SavedVector,
}


@dataclass
class Written:
    """A summary of what was written.

    `moved` counts the tensors with a nonzero change (for a vector, all of its tensors). `survival` measures on a sample
    how much of the intended change survived rounding.
    """

    output: Path
    tensors: int
    moved: int
    parameters: int
    seconds: float = 0.0
    seconds_to_sync: float = 0.0
    survival: Survival = field(default_factory=Survival)

    def counts(self) -> str:
        """Return the counts as a sentence."""
        moved = f"{self.moved} of {self.tensors} tensors moved" if self.moved else "nothing moved: the change is zero"
        return f"{self.output}: {self.parameters:,} numbers, {moved}"

    def warning(self) -> str | None:
        """Return a warning with remedies if rounding lost more than a tenth of the change, else None."""
        return warning(self.survival.as_dict(), REMEDIES)


def subtract_folders(  # noqa: PLR0913 (three of them are one choice)
    base: str | Path,
    output: str | Path,
    coef: float,
    *,
    tuned: str | Path | None = None,
    adapter: str | Path | None = None,
    vector: str | Path | None = None,
    factors: Mapping[str, float] | None = None,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    any_base: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write `base - coef * change` as a checkpoint folder with the shards, index, config and tokenizer of `base`.

    Exactly one of `tuned`, `adapter` and `vector` gives the change. Results are computed in float32 (float64 for
    float64 tensors of the base) and rounded once. Integers, infinite numbers and unmoved tensors are copied from the
    base; with `coef=0`, everything is. With `factors`, a tensor's coefficient is `coef` times its factor (for a tied
    tensor, the factor of either name), and a tensor without a factor is not changed. A run records the hash of the
    base on which its adapter was trained, and another base is refused unless `any_base`. A negative `coef` is refused;
    `apply_vector` adds.

    Raises:
        ConfigError: coef is negative or not finite, two folders are the same, or `factors` names a tensor that
            the base lacks, or none that the change moves.
        ModelError: a checkpoint or adapter is damaged, quantised, or not supported; or a result is not finite.
        WeightMismatchError: the change does not belong to the base.
        RunError: the output exists, or the disk is full. Nothing is left under the output's name.
    Source: Ni et al. 2023, arXiv:2311.08011, eq. 3.
    """
    check_coef(coef)
    sources = {"tuned": tuned, "adapter": adapter, "vector": vector}
    return _write(base, output, coef, sources, numbers, factors=factors, any_base=any_base, overwrite=overwrite)


def apply_vector(
    vector: str | Path,
    base: str | Path,
    output: str | Path,
    factor: float = 1.0,
    *,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> Written:
    """Write `base + factor * vector` as a checkpoint folder; see `subtract_folders`. A negative factor subtracts."""
    if not math.isfinite(factor):
        raise ConfigError(f"factor = {factor}: must be a finite number.")
    return _write(base, output, -factor, {"vector": vector}, numbers, any_base=True, overwrite=overwrite)


def merge_adapter(
    adapter: str | Path, base: str | Path, output: str | Path, *, numbers: Numbers, overwrite: bool = False
) -> Written:
    """Write the base with an adapter merged in; see `subtract_folders`. The caller checks that the base is right."""
    return _write(base, output, -1.0, {"adapter": adapter}, numbers, any_base=True, overwrite=overwrite)


def _write(
    base: str | Path,
    output: str | Path,
    coef: float,
    sources: Mapping[str, str | Path | None],
    numbers: Numbers,
    *,
    any_base: bool,
    overwrite: bool,
    factors: Mapping[str, float] | None = None,
) -> Written:
    began = time.perf_counter()
    output = Path(output)
    given = {name: source for name, source in sources.items() if source is not None}
    check_places(output, [base, *given.values()], overwrite)
    with CheckpointFolder(base) as weights:
        refuse_quantised(weights)
        with closing(open_change(weights, given)) as change:
            _check_numbers(weights, numbers)
            if not any_base and change.made_on is not None and not is_recorded(Path(base), change.made_on):
                raise ModelError(
                    f"{next(iter(given.values()))} was made from another base than {base}: the SHA-256 of its "
                    "files (of a base from the hub, its commit) is not the one that was recorded. Pass --any-base "
                    "to move this base all the same."
                )
            work = Work(weights, change, _coefs(weights, change, coef, factors), numbers)
            check_space(output, sum(e.n_entries * WIDTHS[numbers.stored(e)] for e in weights.entries.values()))
            remove_unfinished(output)
            with atomic_folder(output) as unfinished:
                _copy_companions(weights, unfinished, numbers)
                with ExitStack() as files:
                    work.run(model_pieces(weights, unfinished, numbers, files))
                seconds = time.perf_counter() - began
                _note(unfinished, "subtract", {"base": base, "coef": coef, **given}, numbers, work.survival, factors)
    parameters = sum(entry.n_entries for entry in weights.entries.values())
    to_sync = time.perf_counter() - began - seconds
    return Written(output, len(weights.entries), len(work.moved), parameters, seconds, to_sync, work.survival)


def open_change(base: CheckpointFolder, given: Mapping[str, str | Path]) -> Change:
    """Open the change given as `tuned`, `adapter` or `vector`; raise ConfigError unless exactly one is given."""
    if len(given) != 1:
        raise ConfigError(f"{len(given)} of --tuned, --adapter and --vector were given. Give exactly one of them.")
    ((kind, source),) = given.items()
    return CHANGES[kind](base, source)


def _coefs(
    base: CheckpointFolder, change: Change, coef: float, factors: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the coefficient of each tensor that the change moves."""
    if factors is None:
        return dict.fromkeys(change.moved, coef)
    if odd := [f"{name} = {factor}" for name, factor in factors.items() if not math.isfinite(factor)]:
        raise ConfigError(f"factors: {some(odd)}: must be finite.")
    if unknown := [name for name in factors if name not in base.entries]:
        raise ConfigError(f"{some(unknown)}: not stored in {base.folder} under that name. Name it by a pattern.")
    everywhere = {twin: factor for name, factor in factors.items() for twin in base.twins(name)} | dict(factors)
    found = {name: coef * everywhere[name] for name in change.moved if name in everywhere}
    if not found:
        raise ConfigError(
            f"The change moves none of {some(list(factors))}, but for example {some([*change.moved][:1])}."
        )
    return found


def _note(
    folder: Path,
    what: str,
    inputs: Mapping[str, object],
    numbers: Numbers | None = None,
    survival: Survival | None = None,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Record how the folder was made. The record also marks the folder as one that may be overwritten."""
    record: dict[str, object] = {"format": 1, "command": command_line(), "versions": versions(), "did": what}
    record |= {name: value if isinstance(value, (int, float)) else str(value) for name, value in inputs.items()}
    if numbers:
        record |= {name: value for name, value in asdict(numbers).items() if name != "threads"}
    if survival:
        record |= {"share_changed": survival.share_changed, "share_survived": survival.share_survived}
    if factors:
        record["factors"] = dict(factors)
    write_json(folder / ARITHMETIC, record)


def _copy_companions(base: CheckpointFolder, folder: Path, numbers: Numbers) -> None:
    """Copy config, tokenizer, generation config, chat templates and index; update the dtype where they state it."""
    for path in model_files(base.folder) + licences(base.folder):
        is_left = path.name in LEFT_BEHIND or path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not is_left and not path.name.startswith("."):
            copy_own(path, folder)
    templates = base.folder / "additional_chat_templates"
    if templates.is_dir():
        (folder / templates.name).mkdir()
        for path in filter(Path.is_file, sorted(templates.iterdir())):
            copy_own(path, folder / templates.name)
    if numbers.dtype != "keep" and (folder / "config.json").is_file():
        config = _with_dtype(base.config(), numbers.dtype)
        write_json(folder / "config.json", config if "dtype" in config else {**config, "dtype": numbers.dtype})
    if (base.folder / INDEX).is_file() and base.files != [WHOLE]:
        index = read_object(base.folder / INDEX)
        size = sum(entry.n_entries * WIDTHS[numbers.stored(entry)] for entry in base.entries.values())
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            index["metadata"] = {**metadata, "total_size": size}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, object], dtype: str) -> dict[str, object]:
    """Return a config with every dtype in it replaced, including those in nested configs."""
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in config.items()}
    return changed | {name: dtype for name in ("dtype", "torch_dtype") if isinstance(config.get(name), str)}


def _check_numbers(base: CheckpointFolder, numbers: Numbers) -> None:
    if numbers.dtype not in ("keep", *SPELLED) or numbers.rounding not in ("nearest", "stochastic"):
        raise ConfigError(f"dtype = {numbers.dtype}, rounding = {numbers.rounding}: see forgetlearn subtract --help.")
    if numbers.rounding == "stochastic" and not any(numbers.stored(e) == "BF16" for e in base.entries.values()):
        raise ConfigError("rounding = stochastic: nothing is rounded to bfloat16 here. Leave it out.")


def check_places(output: Path, inputs: list[str | Path], overwrite: bool) -> None:
    """Raise ConfigError unless inputs and output are separate folders, and RunError if the output exists."""
    paths = [Path(given).resolve() for given in inputs]
    for one, two in itertools.combinations(paths, 2):
        if one == two:
            raise ConfigError(f"{inputs[0]} is given twice: subtract needs two different checkpoints.")
    for path, given in zip(paths, inputs, strict=True):
        if output.resolve().is_relative_to(path) or path.is_relative_to(output.resolve()):
            raise ConfigError(
                f"The output {output} and the input {given} are the same folder, or one contains the other. "
                "Choose another output."
            )
    check_output(output, resume=False, overwrite=overwrite, inputs=inputs, can_resume=False)


def check_space(output: Path, n_bytes: int) -> None:
    """Raise RunError unless the output's disk has room for `n_bytes`."""
    there = next(parent for parent in output.absolute().parents if parent.exists())
    with naming(output):
        free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise RunError(f"{output}: needs {n_bytes / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB free.")


def save_vector(
    base: str | Path, tuned: str | Path, output: str | Path, *, overwrite: bool = False, threads: int | None = None
) -> Written:
    """Write `tuned - base` in float32 as `vector.safetensors`, its origin in the metadata; see `subtract_folders`."""
    began = time.perf_counter()
    output = Path(output)
    check_places(output, [base, tuned], overwrite)
    with CheckpointFolder(base) as weights:
        refuse_quantised(weights)
        with closing(Difference(weights, tuned)) as change:
            entries = [entry for entry in weights.entries.values() if entry.name in change.moved]
            n_entries = sum(entry.n_entries for entry in entries)
            check_space(output, 4 * n_entries)
            dtypes = {entry.name: "F32" for entry in entries}
            metadata = {"format": "pt", "forgetlearn": "task vector", "base": str(base), **_origin(base, tuned)}
            header = header_bytes(entries, metadata, dtypes)
            remove_unfinished(output)
            with atomic_folder(output) as unfinished:
                with ExitStack() as files:
                    work = VectorWork(weights, change, {}, Numbers(threads=threads))
                    work.run(file_pieces(entries, dtypes, header, unfinished / VECTOR, files))
                _note(unfinished, "vector", {"base": base, "tuned": tuned})
    return Written(output, len(weights.entries), len(entries), n_entries, time.perf_counter() - began)


def _origin(base: str | Path, tuned: str | Path) -> dict[str, str]:
    """Return the base's hash and, if a run made `tuned`, that run's method, coefficient and hash of the facts."""
    found = {"base_sha256": sha256_of(Path(base))}
    manifest = Path(tuned).resolve().parent / MANIFEST
    if not manifest.is_file():
        return found
    record = read_json(manifest)
    config, inputs = (part if isinstance(part := record.get(name), dict) else {} for name in ("config", "inputs"))
    known = {"method": config.get("method"), "facts_sha256": inputs.get("facts_sha256")}
    if isinstance(config.get("forget"), dict):
        known["coef"] = config["forget"].get("coef")
    return found | {name: str(value) for name, value in known.items() if value is not None}
