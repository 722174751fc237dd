"""Identify the base of a run: a folder, a commit on the hub, or weights that exist only in memory.

A model in memory keeps the name of the folder that it was loaded from, even if its weights have changed since. It
counts as that folder only if loading the folder again gives the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ForgetLearnError
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.loading import adapter_base, load_base
from forgetlearn.runtime import processes, sharding
from forgetlearn.storage import digests

Identity = dict[str, str | None]
NAMES = ("base_sha256", "weights_sha256", "adapter_sha256")  # entries in a run's inputs, and in each update of a chain


def identity_of(lm: LanguageModel, *, in_memory: bool) -> Identity:
    """Return the entries for the base in a run's inputs. Every process must call this, and all get the same result.

    `base_sha256` is the hash of the base's folder or GGUF file (`digests.sha256_of`) or its commit on the hub. It is
    None for a model in memory whose weights differ from those that its name loads; `weights_sha256` then identifies
    them. For an adapter in a folder, `base_sha256` is that of its own base, and `adapter_sha256` is the folder's.
    """
    if (under := adapter_base(lm.settings)) is not None:
        own = processes.on_main(lambda: digests.sha256_of(Path(lm.name)))
        base = processes.on_main(lambda: named_sha256(under, getattr(lm.model, "config", None)))
        return {"base_sha256": base, "adapter_sha256": own}
    named = processes.on_main(lambda: named_sha256(lm.name, getattr(lm.model, "config", None)))
    if not in_memory:
        return {"base_sha256": named}
    own = weights_sha256(lm)
    is_named = named is not None and not lm.is_sharded and processes.on_main(lambda: _stored_sha256(lm)) == own
    return {"base_sha256": named} if is_named else {"base_sha256": None, "weights_sha256": own}


def found_again(settings: ModelSettings) -> Identity:
    """Return the entries for the base in a run's inputs, from its folders as they are now; without those that are gone.

    The hash of a base on the hub is not looked up.
    """
    names = {"base_sha256": adapter_base(settings) or str(settings.name)}
    if adapter_base(settings) is not None:
        names["adapter_sha256"] = str(settings.name)
    return {entry: digests.sha256_of(Path(name)) for entry, name in names.items() if Path(name).exists()}


def named_sha256(name: str, config: object) -> str | None:
    """Return the hash of a model's folder or file, or its commit on the hub; None if it has neither."""
    place = Path(name)
    if place.exists():
        return digests.sha256_of(place)
    return getattr(config, "_commit_hash", None)


def _stored_sha256(lm: LanguageModel) -> str | None:
    """Load the model again by its name, and return the hash of its weights; None if it cannot be loaded.

    The weights are hashed in the dtypes of those in memory.
    """
    try:
        return _sha256(load_base(lm.settings.model_copy(update={"dtype": "auto"}), lm.name), lm.dtypes)
    except ForgetLearnError:
        return None


def weights_sha256(lm: LanguageModel) -> str:
    """Return the SHA-256 of all weights and stored buffers: names, dtypes, shapes, bits. Tied weights count once.

    Weights are hashed in the dtypes in which they were loaded, so that `to_float32` or a move to a GPU does not change
    the result. In a model split over processes, each process hashes its part. Takes 0.8 s per GB.
    """
    own = _sha256(lm.model, lm.dtypes)
    return digests.hash_of(processes.gather(own)) if lm.is_sharded else own


def _sha256(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> str:
    whole = hashlib.sha256()
    for name, tensor in _tensors(model, dtypes):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _tensors(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), sorted by name, on the CPU, in the dtype it was loaded in.

    For a sharded model, yield only this process's part.
    """
    own = {sharding.local(p).data_ptr(): dtypes[name] for name, p in model.named_parameters() if name in dtypes}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        tensor = sharding.local(value)
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        yield name, tensor.to("cpu", own.get(tensor.data_ptr(), tensor.dtype))
