"""Write GGUF, the format of llama.cpp: a whole model with its tokenizer, or a LoRA adapter, a tensor at a time.

All names, shapes and settings are checked before anything is written. What is written here, transformers reads back
(`models/gguf.py`) with the same names and numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ModelError, check_installed, some
from forgetlearn.models.gguf_architectures import Architecture, architecture_of, rope_factors
from forgetlearn.models.gguf_tokenizer import tokenizer_fields
from forgetlearn.models.loading import load_tokenizer, read_config
from forgetlearn.weights.adapter_delta import Adapter
from forgetlearn.weights.checkpoint_folder import FLOATS, CheckpointFolder, Entry
from forgetlearn.weights.deltas import read_wide, refuse_quantised
from forgetlearn.weights.folder_arithmetic import check_space
from forgetlearn.weights.rounding import Array, Scratch
from forgetlearn.weights.structure import Structure

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
STORED: Mapping[str, Dtype] = {"F16": "f16", "BF16": "bf16"}  # a checkpoint's dtype -> its own; others are f32
FILE_TYPES: Mapping[Dtype, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's general.file_type
BLOCK = 32  # numbers that share a scale in q8_0


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name in GGUF, where its numbers come from, its shape and the dtype it is stored in."""

    name: str
    source: Entry | Array
    shape: tuple[int, ...]
    dtype: Dtype
    is_transposed: bool = False


class ModelFile:
    """A model folder that can be written as GGUF: every tensor has a name there, and the tokenizer is known.

    Matrices are stored in `dtype` (None: the one that most of the folder's numbers have), all else in float32.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ModelError: llama.cpp does not know the model, a setting of it, or its tokenizer; a tensor is missing or has no
            name in GGUF; or the rows of a matrix cannot be stored in `dtype`.
    """

    def __init__(self, folder: Path, dtype: Dtype | None = None) -> None:
        check_installed("gguf", f"{folder} as GGUF", "gguf")
        self.weights = CheckpointFolder(folder)
        refuse_quantised(self.weights)
        self.dtype = dtype or stored_dtype(self.weights)
        settings = ModelSettings(name=str(folder))
        self.config = read_config(settings, str(folder))
        self.architecture = architecture_of(str(folder), self.config)
        self.structure = Structure(folder, self.weights.entries)
        self.tensors = list(self._planned())
        self._check_rows()
        n_rows = next(tensor.shape[0] for tensor in self.tensors if tensor.name == "token_embd.weight")
        self.fields = _fields(self.architecture, self.config)
        self.fields |= tokenizer_fields(load_tokenizer(settings, str(folder)), n_rows, str(folder))

    def _planned(self) -> Iterator[Planned]:
        names, stored = _TensorNames(self.architecture, self.config), self.structure.stored
        tied = set(getattr(self.structure.model, "_tied_weights_keys", None) or ())
        is_tied = bool(getattr(self.config, "tie_word_embeddings", False))
        wanted = [own for own in self.structure.model.state_dict() if not (is_tied and own in tied)]
        if missing := [own for own in wanted if own not in stored]:
            raise ModelError(f"{self.weights.folder}: {len(missing)} tensors are not in its files: {some(missing)}.")
        for own in wanted:
            entry = self.weights.entries[stored[own]]
            transposed = len(entry.shape) > 1 and self.structure.is_transposed(own.rpartition(".")[0])
            shape = entry.shape[::-1] if transposed else entry.shape
            name = names.of(own, self.weights.folder)
            is_matrix = len(shape) > 1 and name != "position_embd.weight"
            yield Planned(name, entry, shape, self.dtype if is_matrix else "f32", transposed)
        if (factors := rope_factors(self.config)) is not None:
            yield Planned("rope_freqs.weight", factors, factors.shape, "f32")

    def _check_rows(self) -> None:
        odd = [f"{t.name} {t.shape}" for t in self.tensors if t.dtype == "q8_0" and t.shape[-1] % BLOCK]
        if odd:
            raise ModelError(
                f"{self.weights.folder}: {some(odd)}: q8_0 needs rows of a multiple of {BLOCK} numbers. Take f16."
            )

    def write(self, file: Path) -> None:
        """Write the file; raise ModelError if a number is too large for its dtype, RunError if the disk is full."""
        from gguf import GGUFType

        fields = {"general.type": GGUFType.MODEL, **self.fields, "general.file_type": FILE_TYPES[self.dtype]}
        if self.dtype == "q8_0":
            fields["general.quantization_version"] = 2
        _write(file, self.architecture, fields, self.tensors, self._values)

    def _values(self, tensor: Planned) -> Array:
        """Return a tensor's numbers in float32, in the order in which llama.cpp stores them."""
        if not isinstance(tensor.source, Entry):
            return tensor.source
        values = read_whole(self.weights, tensor.source)
        values = values.T if tensor.is_transposed else values
        return self.architecture.as_stored(tensor.name, values, self.config)

    def close(self) -> None:
        """Close the files."""
        self.weights.close()


def write_adapter(base: Path, adapter: Path, file: Path, dtype: Dtype | None = None) -> Dtype:
    """Write a LoRA adapter of `base` as llama.cpp reads it (`--lora`), and return the dtype of its factors.

    llama.cpp multiplies by lora_alpha / r with the r of each module; what else scales a module is in its factor B.

    Raises:
        ConfigError: dtype is q8_0.
        MissingExtraError, ModelError, WeightMismatchError: as `ModelFile` and `Adapter`.
    """
    if dtype == "q8_0":
        raise ConfigError("--dtype q8_0: a LoRA adapter is small, and its change too. Take f32, f16 or bf16.")
    check_installed("gguf", f"{adapter} as GGUF", "gguf")
    from gguf import GGUFType

    config = read_config(ModelSettings(name=str(base)), str(base))
    architecture = architecture_of(str(base), config)
    names = _TensorNames(architecture, config)
    with CheckpointFolder(base) as weights:
        change = Adapter(weights, adapter)
        dtype = dtype or stored_dtype(change.source)
        alpha = change.config.lora_alpha or 1.0  # llama.cpp takes 0 for no scaling
        tensors = []
        for path in change.paths.values():
            name = names.of(f"{path}.weight", adapter)
            left, right = change.factors(path)
            left *= np.float32(change.scaling(path) * len(right) / alpha)
            left = architecture.as_stored(name, left, config)
            tensors += [
                Planned(f"{name}.lora_{letter}", each, each.shape, dtype)
                for letter, each in (("a", right), ("b", left))
            ]
        change.close()
    fields = {"general.type": GGUFType.ADAPTER, "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    fields["general.file_type"] = FILE_TYPES[dtype]
    _write(file, architecture, fields, tensors, lambda tensor: tensor.source)
    return dtype


def stored_dtype(weights: CheckpointFolder) -> Dtype:
    """Return the dtype that most of a checkpoint's numbers are stored in, as GGUF spells it; f32 for float64."""
    counts: Counter[str] = Counter()
    for entry in weights.entries.values():
        counts[entry.dtype] += entry.n_entries if entry.dtype in FLOATS else 0
    return STORED.get(counts.most_common(1)[0][0], "f32")


def read_whole(weights: CheckpointFolder, entry: Entry) -> Array:
    """Return a tensor's numbers in float32; raise ModelError for NaN."""
    values = np.empty(entry.n_entries, np.float32)
    read_wide(weights, entry, 0, values, Scratch())
    return values.reshape(entry.shape)


class _TensorNames:
    """llama.cpp's names of the tensors of a model."""

    def __init__(self, architecture: Architecture, config: PreTrainedConfig) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._names = get_tensor_name_map(kind, config.num_hidden_layers)

    def of(self, own: str, where: Path) -> str:
        """Return the name in GGUF of the weight that transformers calls `own`; raise ModelError if it has none."""
        path, _dot, suffix = own.rpartition(".")
        if (found := self._names.get_name(path)) is None or suffix not in ("weight", "bias"):
            raise ModelError(f"{where}: {own} has no name in GGUF. Write the merged model instead (--to merged).")
        return f"{found}.{suffix}"


def _fields(architecture: Architecture, config: PreTrainedConfig) -> dict[str, object]:
    return {f"{architecture.name}.{key}": value for key, value in architecture.fields(config).items()}


def _write(
    file: Path,
    architecture: Architecture,
    fields: Mapping[str, object],
    tensors: Sequence[Planned],
    values: Any,
) -> None:
    """Write the header, then a tensor at a time, so that no more than one is in memory."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    kinds = {tensor.name: GGMLQuantizationType[tensor.dtype.upper()] for tensor in tensors}
    check_space(file, sum(_n_bytes(tensor) for tensor in tensors))
    writer = GGUFWriter(file, architecture.name)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for tensor in tensors:
            shape, n_bytes = tensor.shape, _n_bytes(tensor)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kinds[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            numbers = np.ascontiguousarray(values(tensor), np.float32)
            with np.errstate(over="ignore"):
                stored = quantize(numbers, kinds[tensor.name])
            if tensor.dtype in ("f16", "q8_0") and np.abs(numbers).max(initial=0) > _largest(tensor.dtype):
                raise ModelError(f"{tensor.name}: holds a number too large for {tensor.dtype}. Take bf16 or f32.")
            writer.write_tensor_data(stored)
    finally:
        writer.close()


def _largest(dtype: Dtype) -> float:
    """Return the largest number that a dtype holds; q8_0 holds 127 times its scale, a float16."""
    return 65504.0 * (127 if dtype == "q8_0" else 1)


def _n_bytes(tensor: Planned) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    in_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.dtype.upper()]]
    return math.prod(tensor.shape) // int(in_block) * int(block_bytes)


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    """Add a field of metadata, as the type that llama.cpp reads it as: whole numbers are uint32, others float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
