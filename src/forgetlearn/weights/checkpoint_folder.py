"""Read the files, headers and tensor bytes of checkpoint folders, without torch.

Every header is checked against its file and the index before it is used, so a truncated, forged or mixed-up checkpoint
raises an error and never gives a wrong model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from forgetlearn.errors import ModelError, some
from forgetlearn.storage.disk import DEEPEST, is_deep
from forgetlearn.weights.agreement import Shape
from forgetlearn.weights.rounding import Array, Scratch, odd_numbers

WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = f"{WHOLE}.index.json"
MOST_JSON_BYTES = 50_000_000  # the index of a model with 100,000 tensors has 10 MB
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
WIDTHS = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BLOCK_BYTES = 1 << 20
# What to do where only safetensors will do.
SAVE_FIRST = (
    "Save it as a folder first: python -c \"import forgetlearn; forgetlearn.load_model('FILE').save('FOLDER')\""
)
HOLDS_NAN = "holds NaN (not a number). Did the training diverge, or is the file damaged?"


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of one tensor: `dtype` is spelled as in the header, `start` is the first byte's offset in the file."""

    name: str
    dtype: str
    shape: Shape
    file: str
    start: int
    n_bytes: int

    @property
    def n_entries(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)


class CheckpointFolder:
    """The tensors of a folder of safetensors files. Opening it reads only the headers; the files stay open.

    It reads the files that transformers would: `model.safetensors`, or else the files in the index. A folder with
    neither may hold one other file of weights. With `file`, only that file is read. `any_dtype` also admits the dtypes
    of quantised weights, which can be read but not computed with.

    Raises:
        ModelError: the folder has no safetensors file, or several without an index; or index and shards disagree, a
            name is in two shards, or a header does not fit its file.
    """

    def __init__(self, folder: str | Path, *, file: str | None = None, any_dtype: bool = False) -> None:
        self._open_files: dict[str, int] = {}
        self.folder = Path(folder)
        self.files, index = weight_files(self.folder) if file is None else ([file], {})
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for name in self.files:
            self.metadata[name], entries = read_header(self.folder / name)
            self._open_files[name] = os.open(self.folder / name, os.O_RDONLY)
            for entry in entries:
                if (twice := self.entries.get(entry.name)) is not None:  # libraries disagree about which one counts
                    raise ModelError(
                        f"{self.folder}: {entry.name} is in two shards, {twice.file} and {name}. Are the shards of "
                        "another model among them? Download the model again."
                    )
                if entry.dtype not in WIDTHS and not any_dtype:
                    raise ModelError(
                        f"{self.folder / name}: {entry.name} is stored as {entry.dtype}. Quantised weights cannot be "
                        "moved: use the checkpoint in bfloat16, float16 or float32 that this one was made from."
                    )
                self.entries[entry.name] = entry
        if index:
            self._check_index(index)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Open one file, and ignore the rest of its folder."""
        return cls(path.parent, file=path.name)

    def _check_index(self, index: Mapping[str, str]) -> None:
        problem = ""
        if lacking := [name for name in index if name not in self.entries]:
            problem = f"names {some(lacking)}, not in the files"
        elif elsewhere := [f"{name} in {file}" for name, file in index.items() if self.entries[name].file != file]:
            problem = f"places {some(elsewhere)}, where it is not"
        elif unnamed := [name for name in self.entries if name not in index]:
            problem = f"does not name {some(unnamed)}"
        if problem:
            raise ModelError(f"{self.folder}: {INDEX} {problem}. Are there shards of another model in the folder?")

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def twins(self, name: str) -> tuple[str, ...]:
        """Return the names of other matrices with the same bits, such as a tied head that is stored too.

        Return () if the config says that the head is not tied.
        """
        entry = self.entries[name]
        if len(entry.shape) < 2 or _says_untied(self.config()):
            return ()
        kind = (entry.dtype, entry.shape)
        alike = [e for e in self.entries.values() if (e.dtype, e.shape) == kind and e is not entry]
        return tuple(other.name for other in alike if self._same_bits(entry, other))

    def _same_bits(self, one: Entry, two: Entry) -> bool:
        """Return True if two tensors are equal and not constant: two fresh matrices of zeros do not count as tied."""
        start, varied, width = 0, False, WIDTHS[one.dtype]
        first = self.read_bytes(one, 0, min(width, one.n_bytes))
        while start < one.n_bytes:
            length = min(BLOCK_BYTES if start else 256, one.n_bytes - start)  # most matrices differ in the first bytes
            left = self.read_bytes(one, start, length)
            if left != self.read_bytes(two, start, length):
                return False
            varied = varied or left != first * (length // width)
            start += length
        return varied

    def config(self) -> dict[str, object]:
        """Return the contents of `config.json`, or {} if there is no such file."""
        file = self.folder / "config.json"
        return read_object(file) if file.is_file() else {}

    def header_of(self, file: str) -> bytes:
        """Return the bytes that precede the tensors in a file."""
        with (self.folder / file).open("rb") as stream:
            length = stream.read(8)
            return length + stream.read(int.from_bytes(length, "little"))

    def read_into(self, entry: Entry, start: int, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes from byte `start` on. Several threads may call this at once.

        Raises:
            ModelError: the file has been truncated since its header was read.
        """
        done = 0
        while done < len(into):
            got = os.preadv(self._open_files[entry.file], [into[done:]], entry.start + start + done)
            if got == 0:
                raise ModelError(
                    f"{self.folder / entry.file}: ended inside {entry.name}. Did another process change it?"
                )
            done += got

    def read_bytes(self, entry: Entry, start: int, length: int) -> bytearray:
        """Return bytes of a tensor; see `read_into`."""
        found = bytearray(length)
        self.read_into(entry, start, memoryview(found))
        return found

    def read_numbers(self, entry: Entry, start: int, raw: Array, scratch: Scratch) -> None:
        """Fill `raw` with a tensor's elements from `start` on; raise ModelError for NaN, but allow infinity (masks)."""
        self.read_into(entry, start * WIDTHS[entry.dtype], raw.data)
        if entry.dtype in FLOATS and odd_numbers(raw, entry.dtype, scratch) == "NaN":
            raise ModelError(f"{self.folder / entry.file}: {entry.name} {HOLDS_NAN}")

    def check_finite(self) -> None:
        """Raise ModelError if an element of any tensor is NaN or infinite. This reads all files."""
        scratch = Scratch()
        for entry in filter(lambda entry: entry.dtype in FLOATS, self.entries.values()):
            for start in range(0, entry.n_bytes, BLOCK_BYTES):
                raw = scratch.array("raw", min(BLOCK_BYTES, entry.n_bytes - start), np.uint8)
                self.read_into(entry, start, raw.data)
                if odd := odd_numbers(raw, entry.dtype, scratch):
                    holds = HOLDS_NAN if odd == "NaN" else "holds an infinite number. Did the training diverge?"
                    raise ModelError(f"{self.folder / entry.file}: {entry.name} {holds}")

    def close(self) -> None:
        """Close the files."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files that hold a folder's model, and the index (empty if there is none)."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise ModelError(f"{folder}: is a GGUF file, and safetensors are needed. {SAVE_FIRST}")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ModelError(f"{folder}: {what}. Give the folder of a saved model (a hub model has to be downloaded).")
    if (folder / WHOLE).is_file():
        return [WHOLE], {}
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ModelError(f"{folder / INDEX}: has no weight_map from names to files.")
        names = sorted(set(index.values()))
        if missing := [name for name in names if name not in found]:
            raise ModelError(f"{folder}: {INDEX} names missing files: {some(missing)}. Is the download complete?")
        return names, index
    names = [name for name in found if name != ADAPTER]
    if len(names) == 1:
        return names, {}
    if names:
        problem = f"{len(names)} .safetensors files and no index: {some(names)}. Save the model with save_pretrained."
    elif found:
        problem = "is an adapter, not a whole model. Pass it as --adapter, or merge it first."
    elif any(folder.glob("*.gguf")):
        problem = f"holds GGUF, and safetensors are needed. {SAVE_FIRST}"
    else:
        problem = "holds no .safetensors file. Pickled weights are not read: save with save_pretrained."
    raise ModelError(f"{folder}: {problem}")


def read_header(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """Return a safetensors file's metadata, and its entries in the order of their bytes.

    Raises:
        ModelError: the file is truncated or not a safetensors file, or its header does not fit it (safetensors checks
            names, dtypes, shapes, offsets and size).
    """
    try:
        with safe_open(path, "numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: {error}. The file is damaged, truncated or no safetensors file. Is the download complete?"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    entries = []
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        entries.append(Entry(name, tensor["dtype"], tuple(tensor["shape"]), path.name, 8 + length + start, end - start))
    return metadata, sorted(entries, key=lambda entry: (entry.start, entry.n_bytes))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header repeats a name")
    return found


def header_bytes(entries: list[Entry], metadata: Mapping[str, str], dtypes: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file that holds these tensors in this order, with these dtypes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in entries:
        dtype = dtypes[entry.name]
        end = start + entry.n_entries * WIDTHS[dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model or an adapter.

    Raises:
        ModelError: the file is not a JSON object, is larger than 50 MB, or nests deeper than 100 levels. Libraries that
            process it afterwards would take minutes, or raise a RecursionError.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'is not a file' if os.path.lexists(path) else 'does not exist'}.")
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise ModelError(f"{path}: {size:,} bytes, expected at most {MOST_JSON_BYTES:,}. Is it another file?")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if is_deep(found):
            raise RecursionError
    except RecursionError:
        raise ModelError(f"{path}: nests lists and objects deeper than {DEEPEST} levels. Is it damaged?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no JSON object.")
    return found


def _says_untied(config: Mapping[str, object]) -> bool:
    """Return True if a config says that embedding and head are not tied."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner) is False
