"""Rebuild a run's product from its base, or its base from the product; the result is verified by hash.

    change = base XOR product

Exclusive or is its own inverse, so one file turns the base into the product and back exactly. Adding and subtracting
rounded numbers would not. A tensor that the other side lacks in the same dtype and shape is stored in full.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from forgetlearn.errors import ConfigError, ModelError, RunError
from forgetlearn.models import gguf, hub
from forgetlearn.products.chain import Base, carry_over, check_product, product_of
from forgetlearn.storage.digests import HISTORY, copy_own, is_recorded, licences, model_files, sha256_of
from forgetlearn.storage.disk import atomic_folder, write_json
from forgetlearn.storage.records import Stream, Summary
from forgetlearn.storage.run_folder import STREAM, SUMMARY, RunFolder, is_finished
from forgetlearn.weights.checkpoint_folder import CheckpointFolder, Entry, header_bytes, read_header, read_object
from forgetlearn.weights.folder_arithmetic import Written, check_places, check_space, merge_adapter
from forgetlearn.weights.rounding import in_words
from forgetlearn.weights.streaming import Numbers

CHANGE = "change"  # folder in a run; its `base/` and `product/` hold all files except weights
FILE = "change.safetensors"
BLOCK_BYTES = 1 << 22

Side = Literal["base", "product"]
Part = tuple[Entry, Entry | None, Entry | None]  # its entries in the change, the base and the product


def apply_run(
    run: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> str:
    """Write the product of a finished run to `output` again, and return a sentence that says how.

    `base` is a folder, a GGUF file or a hub id. A hub id is loaded at the commit that the run recorded.

    An adapter is copied, with `base` named as its base; with `merge` it is added to the base's weights instead, and
    the sentence also says how much of the change survived rounding. A whole model is rebuilt from the base and the
    change that the run kept; if the run kept none, its product is copied.

    Raises:
        ConfigError: `merge` is set, but the product is not an adapter.
        ModelError: `base` does not have the hash of the run's base, or the result differs from the product.
        RunError: the run is not finished, or has neither product nor change; or the output exists.
    """
    folder = finished_run(run)
    named, output = gguf.resolved(str(base)), Path(output)
    base = hub.folder_of(named, Base.of(folder).commit)
    check_places(output, [folder.path, base], overwrite)
    name = Summary.load(folder.path / SUMMARY).product or ""
    if merge and name != "adapter":
        raise ConfigError(f"--merge: the product of {run} is a whole model, not an adapter. Leave it out.")
    if name != "adapter" and (folder.path / CHANGE).is_dir():
        folder.check_stage(CHANGE)
        _rebuild(folder.path / CHANGE, "product", base, output)
        return f"{output}: the product, made from {base} and the kept change; verified by hash"
    product = product_of(folder.path)
    if merge:
        written = merge_product(folder, base, output, numbers=numbers, overwrite=overwrite)
        return merged_in_words(written, product, base)
    check_product(product)
    check_base(folder, base, taught=name == "adapter")
    with atomic_folder(output) as unfinished:
        if name == "adapter":
            copy_adapter(product, unfinished, named if base != Path(named) else str(base.resolve()))
        else:
            shutil.copytree(product, unfinished, dirs_exist_ok=True)
    return f"{output}: {product} copied" + (f", on the base {base}" if name == "adapter" else "")


def merged_in_words(written: Written, product: Path, base: Path) -> str:
    """Return what was merged, how much of the change survived rounding, and a warning if too little did."""
    lines = [f"{written.counts()}: {product} added to {base}", in_words(written.survival.as_dict())]
    return "\n".join(line for line in (*lines, written.warning()) if line)


def copy_adapter(product: Path, to: Path, base: str) -> None:
    """Copy an adapter's folder into `to`, with `base` named as its base, there and in its chain."""
    shutil.copytree(product, to, dirs_exist_ok=True)
    config = read_object(to / "adapter_config.json")
    write_json(to / "adapter_config.json", config | {"base_model_name_or_path": base})
    carry_over(product, to, "adapter")


def undo_run(run: str | Path, output: str | Path | None = None) -> str:
    """Find the exact base of a run, or write it to `output`; return a sentence that says where it is.

    Raises:
        RunError: the base is gone and cannot be rebuilt from what the run kept, or can be, but needs `output`.
        ModelError: the rebuilt model differs from the base.
    """
    folder = finished_run(run)
    base, output = Base.of(folder), None if output is None else Path(output)
    if base.adapter:
        return _adapter_before(folder, base, Path(base.adapter), output)
    place, name, recorded = base.folder(), str(base.name), base.base_sha256
    if base.commit and (place or hub.is_reachable()):
        if output is not None:
            place = hub.snapshot(name, recorded)  # the cache may hold only some of the files
        elif place is None:
            return f"{name} on the hub, commit {recorded}, is the base. --output DIR downloads it."
    if output is not None:
        check_places(output, [folder.path, *([place] if place else [])], overwrite=False)
    if place is not None and base.is_in(place):
        if output is None:
            return (
                f"{place} is the base, as it was before the run (hash {recorded}).\nTo go back, load it without {run}."
            )
        CheckpointFolder(place).close()  # raises ModelError if the hub's cache lacks the weights
        with atomic_folder(output) as unfinished:
            _copy_files(place, unfinished, [])
            _verify(unfinished, sha256_of(place))
        return f"{output}: a copy of the base {place}, verified by hash"
    gone = f"{name} does not exist any more" if place is None else f"{name} has changed since: its hash differs"
    if recorded is None:
        gone = f"its base was {_in_memory(base)}"
    if not (folder.path / CHANGE).is_dir():
        kept = "It kept no change to go back by (keep_change was false)"
        if (folder.path / "adapter").is_dir():
            kept = "Its product is an adapter, which holds nothing of the base"
        raise RunError(f"{run} cannot be undone: {gone}. {kept}. Download or copy the base again from its source.")
    if output is None:
        raise RunError(f"{gone}. It can be made from the product and the kept change: pass --output DIR.")
    folder.check_stage(CHANGE)
    _rebuild(folder.path / CHANGE, "base", product_of(folder.path), output)
    return f"{output}: the base, made from the product and the kept change; verified by hash"


def _adapter_before(run: RunFolder, base: Base, adapter: Path, output: Path | None) -> str:
    """Find the adapter that a run began on, or copy it to `output`; return a sentence that says where it is."""
    if not adapter.is_dir() or not is_recorded(adapter, base.adapter_sha256):
        gone = "has changed since: its hash differs" if adapter.is_dir() else "does not exist any more"
        raise RunError(
            f"{run.path} cannot be undone: the adapter {adapter}, which it began on, {gone}. The model under it, as it "
            f"was before all updates of the adapter, is {base.name} (hash {base.base_sha256})."
        )
    if output is None:
        return (
            f"{adapter} is what the run began on, as it was (hash {base.adapter_sha256}): an adapter of {base.name}. "
            "Load that instead of the product."
        )
    check_places(output, [run.path, adapter], overwrite=False)
    with atomic_folder(output) as unfinished:
        _copy_files(adapter, unfinished, [])
        _verify(unfinished, str(base.adapter_sha256))
    return f"{output}: a copy of the adapter {adapter}, verified by hash; its base is {base.name}"


def _in_memory(base: Base) -> str:
    found = base.weights_sha256
    hashed = f"the hash of its weights is {found}" if found else "its hash is not known"
    return f"a model in memory ({hashed}), which no folder is known to hold"


def merge_product(
    run: RunFolder,
    base: Path,
    output: Path,
    *,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> Written:
    """Write the adapter that a run made, added to the weights that it belongs on; raise as `apply_run` does."""
    product = product_of(run.path)
    check_product(product)
    check_base(run, base, taught=True)
    written = merge_adapter(product, base, output, numbers=numbers, overwrite=overwrite)
    carry_over(product, output, "merged")
    return written


def place_of_base(run: RunFolder, given: str | Path | None) -> Path:
    """Return the folder or GGUF file of the model that a run began on, unverified; with teaching, of the taught model.

    `given` is what --base says: a folder, a GGUF file or a hub id. Else it is what the run recorded.

    Raises:
        RunError: the base that the run recorded is gone.
    """
    base = Base.of(run)
    if given is not None:
        return hub.folder_of(gguf.resolved(str(given)), base.commit)
    place = run.path / "taught" if run.settings.teach.epochs > 0 else base.folder()
    if place is None:
        raise RunError(
            f"{run.path}: its base, {base.name or 'in memory'}, is gone. Pass the folder of a copy as --base."
        )
    return place


def check_base(run: RunFolder, folder: Path, *, taught: bool) -> None:
    """Raise ModelError unless a folder holds the run's base or, with `taught`, the taught model if there is one."""
    own = run.path / "taught"
    if taught and run.settings.teach.epochs > 0:
        if not own.is_dir():
            raise RunError(f"{run.path}: the adapter belongs on the taught model in taught/, which is missing.")
        if sha256_of(folder) != sha256_of(own):
            raise ModelError(f"{folder}: the adapter belongs on the taught model. Pass --base {own}.")
        return
    base = Base.of(run)
    if not base.is_in(folder):
        wanted = f"{base.name} with the hash {base.base_sha256}" if base.base_sha256 else _in_memory(base)
        raise ModelError(
            f"{folder} is not the base of {run.path}, which was {wanted}. Of a base from the hub, give the folder of "
            "that commit in the hub's cache."
        )


def finished_run(run: str | Path) -> RunFolder:
    """Return a finished update's run folder; raise RunError if it holds no update, is unfinished or was changed."""
    folder = RunFolder.open(run)
    if not folder.manifest.finished:
        raise RunError(f"{run}: the run is not finished. Continue with --resume.")
    folder.check_results()
    if not Summary.load(folder.path / SUMMARY).product:
        raise RunError(f"{run} holds scores, not an update.")
    return folder


def runs_of(folder: str | Path) -> list[Path]:
    """Return the folders of a stream's runs, in order, or that of a single run.

    Raises:
        RunError: the stream is not finished.
    """
    file = Path(folder) / STREAM
    if not file.is_file():
        return [Path(folder)]
    if not is_finished(folder):
        raise RunError(f"{folder}: the stream is not finished. Continue with --resume.")
    return [Path(folder) / batch.folder for batch in Stream.load(file).batches]


# The exact change ---------------------------------------------------------------------------------


def check_keeping(base: Base) -> None:
    """Raise ConfigError unless the base is in a folder of safetensors, which keeping the exact change requires."""
    if base.adapter:
        raise ConfigError(
            f"keep_change = True: the update begins on an adapter, {base.adapter}, and the change is between two whole "
            "models. Merge the adapter first (forgetlearn apply RUN --base BASE --merge --output DIR) and update DIR, "
            "or leave keep_change out."
        )
    folder = base.folder()
    if folder is None:
        why = "is not in a folder, nor in the hub's cache"
        if not base.base_sha256:
            why = "is a model in memory, with other weights than any folder that it is named after"
        raise ConfigError(
            f"keep_change = True: the base {base.name} {why}. Save it with its save(folder) and update that "
            "folder, or leave keep_change out."
        )
    CheckpointFolder(folder).close()


def keep_change(run: RunFolder, product: Path, folder: Path) -> dict[str, int]:
    """Write the change that turns the base into the product and back, bit for bit; return its size in bytes.

    Raise RunError if the base is gone or was changed since the run began, or the disk is full.
    """
    base = Base.of(run)
    place = base.folder()
    if place is None or not base.is_in(place):
        raise RunError(f"{run.path}: its base is gone or was changed during the run, so the change cannot be kept.")
    with CheckpointFolder(place) as old, CheckpointFolder(product) as new:
        parts = list(_parts(old, new))
        n_bytes = sum(entry.n_bytes for entry, _old, _new in parts)
        check_space(folder, n_bytes)
        metadata = {"format": "pt", "forgetlearn": "exact change"}
        for side, weights in (("base", old), ("product", new)):
            headers = {file: weights.header_of(file)[8:].decode() for file in weights.files}
            metadata |= {f"{side}_headers": json.dumps(headers), f"{side}_sha256": sha256_of(weights.folder)}
            (folder / side).mkdir()
            _copy_files(weights.folder, folder / side, weights.files)
        entries = [entry for entry, _old, _new in parts]
        with (folder / FILE).open("xb") as file:
            file.write(header_bytes(entries, metadata, {entry.name: "U8" for entry in entries}))
            for _entry, before, after in parts:
                _write_xor(file, (old, before), (new, after))
    return {"bytes": n_bytes}


def _parts(old: CheckpointFolder, new: CheckpointFolder) -> Iterator[Part]:
    """Yield the tensors of the change: those with the same dtype and shape on both sides, then the others."""
    forms = [{name: (entry.dtype, entry.shape) for name, entry in side.entries.items()} for side in (old, new)]
    shared = {name for name in forms[0] if forms[0][name] == forms[1].get(name)}
    for name, before in old.entries.items():
        yield _part("xor" if name in shared else "base", before), before, new.entries[name] if name in shared else None
    for name, after in new.entries.items():
        if name not in shared:
            yield _part("product", after), None, after


def _part(kind: str, entry: Entry) -> Entry:
    return Entry(f"{kind}:{entry.name}", "U8", (entry.n_bytes,), FILE, 0, entry.n_bytes)


def _write_xor(file: BinaryIO, *sources: tuple[CheckpointFolder, Entry | None]) -> None:
    """Write the exclusive or of two tensors' bytes, or the bytes of one tensor if the other is None."""
    given = [(folder, entry) for folder, entry in sources if entry is not None]
    n_bytes = given[0][1].n_bytes
    for start in range(0, n_bytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, n_bytes - start)
        found = np.zeros(length, np.uint8)
        for folder, entry in given:
            found ^= np.frombuffer(folder.read_bytes(entry, start, length), np.uint8)
        file.write(found.data)


def _rebuild(kept: Path, side: Side, other: Path, output: Path) -> None:
    """Write one side to `output`, made from the other side and the kept change; verify its hash."""
    with closing(CheckpointFolder.of_file(kept / FILE)) as change, CheckpointFolder(other) as source:
        metadata = change.metadata[FILE]
        if metadata.get("forgetlearn") != "exact change":
            raise ModelError(f"{kept / FILE}: was not written by a run of forgetlearn.")
        other_side = "base" if side == "product" else "product"
        if sha256_of(other) != metadata[f"{other_side}_sha256"]:
            raise ModelError(
                f"{other} is not the {other_side} that the change in {kept.parent} was kept for: another hash."
            )
        headers: dict[str, str] = json.loads(metadata[f"{side}_headers"])
        with atomic_folder(output) as unfinished:
            _copy_files(kept / side, unfinished, [])
            for name, header in headers.items():
                _write_weights(unfinished / Path(name).name, header.encode(), side, change, source)
            _verify(unfinished, metadata[f"{side}_sha256"])


def _write_weights(path: Path, header: bytes, side: Side, change: CheckpointFolder, source: CheckpointFolder) -> None:
    """Write one file of weights: the original header, then the tensors in their original order."""
    entries = json.loads(header)
    end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    check_space(path, end)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        data_start = file.tell()
        file.truncate(data_start + end)
        for entry in read_header(path)[1]:
            both = change.entries.get(f"xor:{entry.name}")
            kept = both or change.entries[f"{side}:{entry.name}"]
            _write_xor(file, (change, kept), (source, source.entries[entry.name] if both else None))


def _copy_files(folder: Path, to: Path, left_out: list[str]) -> None:
    """Copy a model's files except `left_out`, together with its licence, card and chain."""
    for path in [*model_files(folder), *licences(folder), folder / HISTORY, *sorted(folder.glob("*.md"))]:
        if path.is_file() and path.name not in left_out:
            copy_own(path, to)


def _verify(folder: Path, wanted: str) -> None:
    if sha256_of(folder) != wanted:
        raise ModelError(f"{folder}: the hash of the result is not {wanted}. Nothing was written. Is the disk damaged?")
