"""Checkpoint folders without torch: which files hold the model, what their headers say, tensors by their bytes.

Everything that a header claims is checked against the file before any of it is used, so that a cut, forged or
mixed-up checkpoint is an error and never a wrong model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from forgetlearn.errors import ModelError, WeightMismatchError, plain, some
from forgetlearn.storage.disk import DEEPEST, is_deep
from forgetlearn.weights.rounding import Array, Scratch, odd_numbers

WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = f"{WHOLE}.index.json"
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
MOST_JSON_BYTES = 50_000_000  # the index of a model with 100,000 tensors has 10 MB
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS = FLOATS | OTHERS
# Numbers of quantised weights, in bits: read by no arithmetic here, but transformers may load them.
QUANTISED = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6}
BITS = {dtype: 8 * width for dtype, width in WIDTHS.items()} | QUANTISED | {"F4": 4, "C64": 64}
BLOCK_BYTES = 1 << 20
HOLDS_NAN = "holds NaN (not a number). Did the training diverge, or is the file damaged?"

Shape = tuple[int, ...]


class Named(Protocol):
    """Tensors that have names, shapes and, where they are tied, more than one name."""

    def shapes(self) -> dict[str, Shape]:
        """Name to shape, without reading any data."""

    def twins(self, name: str) -> tuple[str, ...]:
        """The other names of this tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `dtype` as the header spells it, `start` in bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: Shape
    file: str
    start: int
    n_bytes: int

    @property
    def n_entries(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


class CheckpointFolder:
    """The tensors of a folder of safetensors, sharded or not; nothing but headers is read until it is asked for.

    Read is what transformers reads: `model.safetensors`, else the files of the index; a folder with neither may
    hold one other file of weights. `any_dtype` also admits the dtypes of quantised weights, which no arithmetic here
    can read.

    Raises:
        ModelError: there are no safetensors, several without an index, index and shards disagree, a name is in two
            shards, or a header does not fit its file.
    """

    def __init__(self, folder: str | Path, *, any_dtype: bool = False) -> None:
        self._read_headers(Path(folder), *weight_files(Path(folder)), any_dtype=any_dtype)

    @classmethod
    def of_file(cls, path: Path) -> CheckpointFolder:
        """The tensors of one file, whatever else is in its folder."""
        found = cls.__new__(cls)
        found._read_headers(path.parent, [path.name], {})
        return found

    def _read_headers(
        self, folder: Path, files: list[str], index: Mapping[str, str], *, any_dtype: bool = False
    ) -> None:
        self.folder, self.files = folder, files
        self._open_files: dict[str, int] = {}
        self._firsts: dict[str, bytes] = {}
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self.files:
            self.metadata[file], entries = read_header(self.folder / file)
            for entry in entries:
                self._check_entry(entry, any_dtype=any_dtype)
                self.entries[entry.name] = entry
        if index:
            self._check_index(index)

    def _check_entry(self, entry: Entry, *, any_dtype: bool) -> None:
        if entry.name in self.entries:  # which of the two counts, libraries disagree about
            both = f"{self.entries[entry.name].file} and {entry.file}"
            raise ModelError(
                f"{self.folder}: {entry.name} is in two shards, {both}. Are the shards of another model among them? "
                "Download the model again."
            )
        if entry.dtype not in WIDTHS and not any_dtype:
            raise ModelError(
                f"{self.folder / entry.file}: {entry.name} is stored as {entry.dtype}. Quantised weights are not "
                "moved: take the checkpoint in bfloat16, float16 or float32 that this one was made from."
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        lacking = [name for name in index if name not in self.entries]
        unnamed = [name for name in self.entries if name not in index]
        elsewhere = [name for name, file in index.items() if name in self.entries and self.entries[name].file != file]
        if lacking or unnamed or elsewhere:
            said = f"names {some(lacking)}, not in the files" if lacking else f"does not name {some(unnamed)}"
            if elsewhere and not lacking:
                said = f"places {some([f'{name} in {index[name]}' for name in elsewhere])}, where it is not"
            raise ModelError(f"{self.folder}: {INDEX} {said}. Are the shards of another model among them?")

    def shapes(self) -> dict[str, Shape]:
        """Name to shape, from the headers."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtypes(self) -> dict[str, str]:
        """Name to dtype, from the headers."""
        return {name: entry.dtype for name, entry in self.entries.items()}

    def twins(self, name: str) -> tuple[str, ...]:
        """Other matrices with the same bits, as a head that is tied to the embedding and was stored as well.

        None where the config says that nothing is tied.
        """
        entry = self.entries[name]
        if len(entry.shape) < 2 or says_untied(self.config()):
            return ()
        alike = [
            e for e in self.entries.values() if (e.dtype, e.shape) == (entry.dtype, entry.shape) and e is not entry
        ]
        alike = [other for other in alike if self._first_bytes(other) == self._first_bytes(entry)]
        return tuple(other.name for other in alike if self._same_bits(entry, other))

    def _first_bytes(self, entry: Entry) -> bytes:
        if entry.name not in self._firsts:
            self._firsts[entry.name] = bytes(self.read_bytes(entry, 0, min(256, entry.n_bytes)))
        return self._firsts[entry.name]

    def _same_bits(self, one: Entry, two: Entry) -> bool:
        """Whether two tensors are equal, and more than a constant: two fresh matrices of zeros are not tied."""
        varied = False
        for start in range(0, one.n_bytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, one.n_bytes - start)
            left = self.read_bytes(one, start, length)
            if left != self.read_bytes(two, start, length):
                return False
            width = WIDTHS[one.dtype]
            varied = varied or left != left[:width] * (length // width)
        return varied

    def config(self) -> dict[str, Any]:
        """`config.json`; empty where there is none.

        Raises:
            ModelError: it is no JSON object.
        """
        file = self.folder / "config.json"
        return read_object(file) if file.is_file() else {}

    def header_of(self, file: str) -> bytes:
        """The bytes of a file before its tensors, as they are."""
        with (self.folder / file).open("rb") as stream:
            length = stream.read(8)
            return length + stream.read(int.from_bytes(length, "little"))

    def read_into(self, entry: Entry, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a tensor from its byte `start` on; several threads may do so at once.

        Raises:
            ModelError: the file ends before, since it was cut after its header was read.
        """
        descriptor = self._descriptor(entry.file)
        done = 0
        while done < len(into):
            got = os.preadv(descriptor, [into[done:]], entry.start + start + done)
            if got == 0:
                raise ModelError(f"{self.folder / entry.file}: ended inside {entry.name}. Did something change it?")
            done += got

    def read_bytes(self, entry: Entry, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes of a tensor, all of them by default."""
        found = bytearray(entry.n_bytes - start if length is None else length)
        self.read_into(entry, start, memoryview(found))
        return found

    def read_numbers(self, entry: Entry, start: int, raw: Array, scratch: Scratch) -> None:
        """Fill `raw` with the bytes of a tensor's numbers from number `start` on, and check them for NaN.

        Raises:
            ModelError: a number is NaN, or the file is too short. Infinite numbers are allowed: masks hold them.
        """
        self.read_into(entry, start * WIDTHS[entry.dtype], raw.data)
        if entry.dtype in FLOATS and odd_numbers(raw, entry.dtype, scratch) == "NaN":
            raise ModelError(f"{self.folder / entry.file}: {entry.name} {HOLDS_NAN}")

    def check_finite(self) -> None:
        """Raise ModelError if a number of any tensor is NaN or infinite; all of the file is read."""
        scratch = Scratch()
        for entry in filter(lambda entry: entry.dtype in FLOATS, self.entries.values()):
            for start in range(0, entry.n_bytes, BLOCK_BYTES):
                raw = scratch.array("raw", min(BLOCK_BYTES, entry.n_bytes - start), np.uint8)
                self.read_into(entry, start, raw.data)
                if odd := odd_numbers(raw, entry.dtype, scratch):
                    holds = HOLDS_NAN if odd == "NaN" else "holds an infinite number. Did the training diverge?"
                    raise ModelError(f"{self.folder / entry.file}: {entry.name} {holds}")

    def _descriptor(self, file: str) -> int:
        if file not in self._open_files:
            self._open_files[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._open_files[file]

    def open_all(self) -> CheckpointFolder:
        """Itself, every file open; needed before threads read."""
        for file in self.files:
            self._descriptor(file)
        return self

    def close(self) -> None:
        """Close the files; they open again when they are read."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __enter__(self) -> CheckpointFolder:
        return self.open_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_open_files"):
            self.close()


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the files that hold the model of a folder, and the index (empty where there is none).

    Raises:
        ModelError: see `CheckpointFolder`.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ModelError(f"{folder}: {what}. Give the folder of a saved model (a hub model has to be downloaded).")
    if (folder / WHOLE).is_file():
        return [WHOLE], {}
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        return _indexed(folder, found)
    names = [name for name in found if name != ADAPTER]
    if len(names) > 1:
        raise ModelError(
            f"{folder}: {len(names)} .safetensors files and no index: {some(names)}. Which hold the model is not "
            "known: save it with save_pretrained."
        )
    if not names and found:
        raise ModelError(f"{folder}: holds an adapter, not a whole model. Pass it as --adapter, or merge it first.")
    if not names:
        raise ModelError(
            f"{folder}: holds no .safetensors file. Pickled weights are not read: save with save_pretrained."
        )
    return names, {}


def _indexed(folder: Path, found: list[str]) -> tuple[list[str], dict[str, str]]:
    index = read_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ModelError(f"{folder / INDEX}: has no weight_map from names to files.")
    names = sorted(set(index.values()))
    if missing := [name for name in names if name not in found]:
        raise ModelError(f"{folder}: {INDEX} names {some(missing)}, not there. Is the download complete?")
    return names, index


def read_header(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """Metadata and entries of a safetensors file, in the order of their bytes; all of it fits the file.

    Raises:
        ModelError: the file is cut short or is no safetensors file, or its header lies about sizes or places.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ModelError(
                f"{path}: {size} bytes, and a header of {length}: it is cut short, or no safetensors file. "
                "Is the download complete?"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its header is no JSON: {error}. Is it a safetensors file?") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: its header is no JSON object. Is it a safetensors file?")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: the metadata of its header are no texts.")
    entries = [_entry(path, name, told, 8 + length) for name, told in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.n_bytes))
    _check_places(path, entries, 8 + length, size)
    return metadata, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(path: Path, name: str, told: object, data_start: int) -> Entry:
    """One tensor as its header tells it, if that agrees with itself."""
    if not isinstance(told, dict) or not {"dtype", "shape", "data_offsets"} <= told.keys():
        raise ModelError(f"{path}: its header has no dtype, shape and data_offsets for {name}.")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ModelError(f"{path}: {name} has the dtype {plain(str(dtype)[:40])}, which safetensors does not know.")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ModelError(f"{path}: its header has shape {shape} and data_offsets {offsets} for {name}.")
    needed = math.prod(shape) * BITS[dtype] // 8
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise ModelError(
            f"{path}: its header gives {name}, {dtype} of shape {tuple(shape)}, the bytes {offsets}: "
            f"that needs {needed}. The file is damaged."
        )
    return Entry(name, dtype, tuple(shape), path.name, data_start + offsets[0], offsets[1] - offsets[0])


def _check_places(path: Path, entries: list[Entry], data_start: int, size: int) -> None:
    """Refuse tensors that overlap, leave gaps, or lie outside the file."""
    place, before = data_start, "the header"
    for entry in entries:
        if entry.start != place:
            what = "overlaps" if entry.start < place else "leaves a gap after"
            raise ModelError(f"{path}: {entry.name} {what} {before}. The file is damaged.")
        place, before = entry.start + entry.n_bytes, entry.name
    if place != size:
        raise ModelError(
            f"{path}: {size} bytes, but its header tells of {place}: it is cut short, or something was added. "
            "Is the download complete?"
        )


def header_bytes(entries: list[Entry], metadata: Mapping[str, str], widths: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file with these tensors in this order, `widths` giving the dtypes."""
    told: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for entry in entries:
        dtype = widths[entry.name]
        end = place + entry.n_entries * WIDTHS[dtype]
        told[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model or an adapter; every such file is read here.

    Raises:
        ModelError: it is no JSON object, is larger than 50 MB, or nests deeper than 100 levels. Libraries that go
            through it afterwards would take minutes, or end in a RecursionError.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: {'is no file' if os.path.lexists(path) else 'there is no such file'}.")
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise ModelError(f"{path}: {size:,} bytes, expected at most {MOST_JSON_BYTES:,}. Is it another file?")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(_too_deep(path)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no JSON object.")
    if is_deep(found):
        raise ModelError(_too_deep(path))
    return found


def _too_deep(path: Path) -> str:
    return f"{path}: nests lists and objects deeper than {DEEPEST} levels. Is it damaged?"


def says_untied(config: Mapping[str, Any]) -> bool:
    """Whether a config says that embedding and head are two tensors; False where it does not say."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner) is False


def partners(base: Named, other: Named, sides: tuple[str, str] = ("base", "tuned")) -> dict[str, str]:
    """Each name of `base` with the name of the same tensor in `other`, which may be another one where it is tied.

    Raises:
        WeightMismatchError: a name is missing on one side, or two shapes differ.
    """
    ours, theirs = base.shapes(), other.shapes()
    found = named_in(theirs, base)
    seen = {name: theirs[partner] for name, partner in found.items()}
    seen |= {name: theirs[name] for name in theirs if name not in ours and not ours.keys() & set(other.twins(name))}
    check_same(ours, seen, sides)
    return found


def named_in(names: Mapping[str, object], weights: Named) -> dict[str, str]:
    """The names of `weights` that are among `names`, by themselves or by another name of the same tensor."""
    found = ((name, _first_in(names, name, weights)) for name in weights.shapes())
    return {name: first for name, first in found if first is not None}


def _first_in(names: Mapping[str, object], name: str, weights: Named) -> str | None:
    return name if name in names else next((twin for twin in weights.twins(name) if twin in names), None)


def check_same(base: Mapping[str, Shape], tuned: Mapping[str, Shape], sides: tuple[str, str]) -> None:
    """Raise WeightMismatchError unless both sides have the same names and shapes.

    Raises:
        WeightMismatchError: how many differ, and the first five.
    """
    only_base = [name for name in base if name not in tuned]
    only_tuned = [name for name in tuned if name not in base]
    if only_base or only_tuned:
        sentences = [
            f"{len(names)} of {len(whole)} tensors are only in {side}: {some(names)}"
            for names, whole, side in ((only_base, base, sides[0]), (only_tuned, tuned, sides[1]))
            if names
        ]
        raise WeightMismatchError(f"{'; '.join(sentences)}. Are both of the same architecture?")
    differ = [name for name in base if base[name] != tuned[name]]
    if differ:
        listed = some([f"{name} {base[name]} and {tuned[name]}" for name in differ])
        raise WeightMismatchError(
            f"{len(differ)} of {len(base)} tensors differ in shape between {sides[0]} and {sides[1]}: {listed}. "
            "Was a token added before fine-tuning?"
        )


def in_order(folder: CheckpointFolder) -> Iterator[tuple[str, list[Entry]]]:
    """Files and their entries in the order of the bytes."""
    for file in folder.files:
        entries = [entry for entry in folder.entries.values() if entry.file == file]
        yield file, sorted(entries, key=lambda entry: (entry.start, entry.n_bytes))
