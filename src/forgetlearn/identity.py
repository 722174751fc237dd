"""Which base a run starts from: that of a folder, of a commit on the hub, or weights in memory that nobody else has.

A model in memory carries the name of the folder that it was loaded from, whatever was done to it since. It is taken for
that folder only if its weights are those that the folder gives when it is loaded again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetlearn import digests, processes, sharding
from forgetlearn.errors import ForgetLearnError
from forgetlearn.models import LanguageModel, load_weights

Identity = dict[str, str | None]
NAMES = ("base_sha256", "weights_sha256")  # of a run's inputs, and of an update in a chain


def base_of(lm: LanguageModel, *, in_memory: bool) -> Identity:
    """What a run's inputs record of its base; every process calls it, with the same result.

    `base_sha256` is the hash of the base's folder (`digests.sha256_of`) or its commit on the hub. A model that was
    passed in memory, and has other weights than what it is named after, has None there, and `weights_sha256` beside it.
    """
    named = processes.on_main(lambda: _named(lm))
    if not in_memory:
        return {"base_sha256": named}
    holds = named is not None and not lm.is_sharded and processes.on_main(lambda: _holds_what_it_is_named_after(lm))
    return {"base_sha256": named} if holds else {"base_sha256": None, "weights_sha256": weights_sha256(lm)}


def _named(lm: LanguageModel) -> str | None:
    """The hash of the folder that a model is named after, or its commit on the hub; None if it is neither."""
    folder = Path(lm.name)
    if folder.is_dir():
        return digests.sha256_of(folder)
    return getattr(getattr(lm.model, "config", None), "_commit_hash", None)


def _holds_what_it_is_named_after(lm: LanguageModel) -> bool:
    """True if the model, loaded again by its name, has the same weights in the dtypes of the one in memory."""
    try:
        again = load_weights(lm.settings.model_copy(update={"name": lm.name}))
    except ForgetLearnError:
        return False
    pairs = itertools.zip_longest(_tensors(again, lm.dtypes), _tensors(lm.model, lm.dtypes), fillvalue=None)
    return all(stored and held and stored[0] == held[0] and _same(stored[1], held[1]) for stored, held in pairs)


def weights_sha256(lm: LanguageModel) -> str:
    """SHA-256 of all weights and stored buffers: names, dtypes, shapes, bits. Tied weights count once.

    Taken in the dtypes that the model was loaded in, on whatever device it is, so that `to_float32` for training and a
    move to a GPU change nothing. Of a model that is split over processes each hashes its part. Takes 0.8 s per GB.
    """
    whole = hashlib.sha256()
    for name, tensor in _tensors(lm.model, lm.dtypes):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(_bytes(tensor).numpy().data)
    own = whole.hexdigest()
    return digests.hash_of(processes.gather(own)) if lm.is_sharded else own


def _tensors(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, sorted, one at a time on the CPU and in their own dtypes; of a split model the own part."""
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


def _same(one: Tensor, two: Tensor) -> bool:
    """True if two tensors have the same bits."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    left, right = _bytes(one), _bytes(two)
    whole = len(left) // 8 * 8
    if left.storage_offset() % 8 or right.storage_offset() % 8:
        whole = 0
    # Eight bytes at a time: torch compares single bytes six times as slowly.
    return torch.equal(left[:whole].view(torch.int64), right[:whole].view(torch.int64)) and torch.equal(
        left[whole:], right[whole:]
    )


def _bytes(tensor: Tensor) -> Tensor:
    """The bits of a tensor, so that NaN is itself, and 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
