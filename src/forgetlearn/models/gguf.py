"""Read GGUF, the format of llama.cpp: find the file that a name means, check it, and help transformers to unpack it.

The weights become ordinary ones when they are loaded, so the product of an update is a normal transformers folder.
"""

from __future__ import annotations

import functools
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgetlearn.errors import ConfigError, ModelError, check_installed, plain, some
from forgetlearn.weights.checkpoint_folder import SAVE_FIRST

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from forgetlearn.config.schema import ModelSettings

MAGIC = b"GGUF"
SUFFIX = ".gguf"
LINK = f"model{SUFFIX}"  # the file's name in the folder that transformers sees
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: `metadata` has only the length of a list of strings, such as the vocabulary."""

    file: Path
    metadata: Mapping[str, object]
    tensors: tuple[str, ...]  # their names in GGUF
    stored: Mapping[str, int]  # type of a tensor, as llama.cpp spells it (Q4_K, F16) -> count of numbers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a file that holds only floats, which is the half one if its norms are float32; else float32.

        Quantised numbers have more digits than bfloat16, and the steps of an update would be rounded away in it.
        """
        import torch

        quantised = set(self.stored) - set(FLOATS)
        half = next((name for name in ("BF16", "F16") if name in self.stored), "F32")
        found: torch.dtype = getattr(torch, FLOATS["F32" if quantised else half])
        return found


def file_of(name: str | Path) -> Path | None:
    """Return the GGUF file that a model's name means: any file, or the only one in a folder without safetensors.

    Return None for other folders and for hub ids. Raise ModelError if the folder holds several.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise ModelError(f"{path}: holds {len(found)} GGUF files: {some([file.name for file in found])}. Name one.")
    return found[0]


def resolved(name: str) -> str:
    """Return the path of the GGUF file that a model's name means, or the name itself if it means none."""
    return str(file_of(name) or name)


def read_header(file: Path) -> Header:
    """Return a file's header, read without the tensors.

    Raises:
        ModelError: the file is not GGUF, is damaged, truncated, one of several parts, or holds no tokenizer.
        MissingExtraError: the package gguf is not installed.
    """
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                f"{file}: is a file, but not a GGUF file. Give the folder of a saved model, a GGUF file, or a hub id."
            )
    check_installed("gguf", f"{file}, a GGUF file", "gguf")
    try:
        header, n_bytes = _parsed(file)
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: cannot be read as GGUF: {plain(str(error))[:200]}. Is it damaged?") from error
    if (size := file.stat().st_size) < n_bytes:
        raise ModelError(f"{file}: is truncated: {size:,} bytes, expected {n_bytes:,}. Is the download complete?")
    if isinstance(parts := header.metadata.get("split.count"), int) and parts > 1:
        raise ModelError(f"{file}: is one of {parts} parts. Join them first, with llama-gguf-split --merge.")
    if not header.metadata.get("tokenizer.ggml.tokens"):
        raise ModelError(f"{file}: holds no tokenizer (tokenizer.ggml.tokens). Take a file of the whole model.")
    return header


def _parsed(file: Path) -> tuple[Header, int]:
    """Return a file's header, and the bytes that the file must have."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from transformers.integrations.gguf import reader  # gguf's own reader takes 5 s for 50,000 tokens

    data = reader._mapped(str(file))
    metadata, n_tensors, position = reader._read_metadata(data, str(file))
    table, position = reader._read_tensor_table(data, n_tensors, position)
    alignment = metadata.get("general.alignment", 32)
    start = end = -(-position // alignment) * alignment
    stored: Counter[str] = Counter()
    for _name, shape, code, offset in table:
        kind, n_numbers = GGMLQuantizationType(code), 1
        for side in shape:
            n_numbers *= side
        in_block, block_bytes = GGML_QUANT_SIZES[kind]
        stored[kind.name] += n_numbers
        end = max(end, start + offset + n_numbers // in_block * block_bytes)
    return Header(file, metadata, tuple(name for name, *_ in table), dict(stored)), end


def check_settings(settings: ModelSettings) -> None:
    """Raise ConfigError for settings that transformers does not combine with a GGUF file."""
    asked = {"model.quantization = 4bit": settings.quantization == "4bit", "model.shard": settings.shard}
    if refused := [setting for setting, is_set in asked.items() if is_set]:
        raise ConfigError(f"{refused[0]}: not available for a GGUF file. {SAVE_FIRST}")


@contextmanager
def alone(file: Path) -> Iterator[str]:
    """Yield a folder that holds nothing but a link to a file: transformers also reads a tokenizer that lies beside it.

    So the model is what the file says, and the file's hash identifies it.
    """
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as folder:
        (Path(folder) / LINK).symlink_to(file.absolute())
        yield folder


@contextmanager
def one_table() -> Iterator[None]:
    """Let gguf make its table of tensor names only once: transformers asks for it again for every module of a model.

    For SmolLM2-135M that would take most of a minute.
    """
    import gguf

    make = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(make)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = make


def unused_tensors(header: Header, model: PreTrainedModel) -> list[str]:
    """Return the names of the tensors that transformers ignores in silence, such as the factors of a long context."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.integrations.gguf import GGUF_ARCHS

    architecture = header.metadata["general.architecture"]
    if architecture in GGUF_ARCHS:  # from_pretrained reports them
        return []
    processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)()
    used = legacy.get_gguf_hf_weights_map(model, processor)  # fused experts are in it without their suffix
    return [name for name in header.tensors if name not in used and name.removesuffix(".weight") not in used]
