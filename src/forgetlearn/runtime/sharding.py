"""Shard models: split every weight over the processes (FSDP2, by transformers' own loading).

Between computations, each process holds a part of every weight, as a `DTensor`. Differences and sums of weights are
computed on the parts. Adapters are added after loading and are whole in every process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.runtime import processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def loading_options() -> dict[str, object]:
    """Return the arguments with which `from_pretrained` shards a model; raise ConfigError in a single process."""
    if processes.world_size() == 1:
        raise ConfigError(
            "model.shard: sharding needs several processes, but there is only one. Start them with "
            f"{processes.HOW_TO_START}"
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes.world_size())}


def check_sharded(model: nn.Module) -> None:
    """Raise ModelError unless a loaded model is sharded: the libraries silently fall back to whole copies."""
    parameters = dict(model.named_parameters())
    whole = [name for name, weight in parameters.items() if not isinstance(weight, DTensor)]
    if whole or not is_sharded(model):
        raise ModelError(f"model.shard: {len(whole)} of {len(parameters)} weights were not split, such as {whole[0]}.")
    over = {weight.device_mesh.size() for weight in parameters.values() if isinstance(weight, DTensor)}
    if over != {processes.world_size()}:
        raise ModelError(f"model.shard: split over {sorted(over)} processes, expected {processes.world_size()}.")


def is_sharded(model: nn.Module) -> bool:
    """Return True if the model's weights are split over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Return this process's part of each parameter, by name. Writing to a part changes the model."""
    to_parts(model)
    return {name: local(weight) for name, weight in model.named_parameters()}


def local(weight: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    inner = weight.detach()
    return inner.to_local() if isinstance(inner, DTensor) else inner


def like(whole: Tensor, weight: Tensor) -> Tensor:
    """Return the part of `whole` (which all processes hold) that matches this process's part of `weight`."""
    if not isinstance(weight, DTensor):
        return whole.to(weight.device)
    mesh = weight.device_mesh
    return distribute_tensor(whole.to(weight.device), mesh, weight.placements, src_data_rank=None).to_local()


def no_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Disable gradients, by inference mode unless the model is sharded.

    After inference mode, FSDP2 could not train a sharded model.
    """
    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def check_float32(model: nn.Module) -> None:
    """Raise ModelError if a sharded model is in half precision: FSDP2 cannot change a dtype after a forward pass."""
    half = [name for name, weight in parts(model).items() if weight.is_floating_point() and weight.itemsize < 4]
    if half:
        raise ModelError(
            f"{len(half)} weights of a model that is split over processes are in half precision, such as {half[0]}. "
            "Load it in float32 to train all weights: --set model.dtype=float32."
        )


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round each weight to the precision of its dtype in `dtypes`, without changing the dtype it is stored in."""
    for name, weight in parts(model).items():
        weight.copy_(weight.to(dtypes[name]))


def to_parts(model: nn.Module) -> None:
    """Replace weights that the last computation left whole with their parts.

    After a forward pass, FSDP2 keeps the last module's weights whole. An optimiser made then would train these copies
    and leave the parts, which count, unchanged.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def ready_to_train(model: nn.Module) -> None:
    """Make the parts the model's parameters, and tell FSDP2 which of them are trained.

    From the first forward pass on, FSDP2 keeps a whole copy of each weight, with its own `requires_grad`. Without
    this call, a base that was scored and then frozen under an adapter would get gradients, and they would be clipped
    together with the adapter's.
    """
    to_parts(model)
    # Keep all their names: a tied head and its embedding are two parameters while they are whole.
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters(remove_duplicate=False)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for name, weight in model.named_parameters(remove_duplicate=False):
        weight.requires_grad_(wanted[name])
    to_parts(model)


def without_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Return a model of the same class on the meta device, not sharded: its modules, names, shapes and ties."""
    inner: Any = model
    config = copy.deepcopy(inner.config)
    if hasattr(config, "distributed_config"):
        del config.distributed_config
    plain: Any = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        made: Any = plain._from_config(config, dtype=dtype or inner.dtype)
    made.generation_config = inner.generation_config
    return made


def save_whole(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtypes: Mapping[str, torch.dtype], folder: Path
) -> None:
    """Write a sharded model as one process would, in the given dtypes: rank 0 gathers the weights in main memory."""
    from transformers.distributed import gather_full_state_dict

    to_parts(model)
    whole = gather_full_state_dict(model)
    if not processes.is_main():
        return
    plain = without_weights(model, next(iter(dtypes.values())))
    tied = set(plain.all_tied_weights_keys)  # a tied head comes back as a second tensor
    state = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in whole.items() if name not in tied}
    plain.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def save_parts(tensors: Mapping[str, Tensor], model: nn.Module, file: Path) -> None:
    """Write the result of `parts`: one file per process if the model is sharded, else one file by rank 0."""
    if is_sharded(model):
        save_file(dict(tensors), _own_file(file))
    elif processes.is_main():
        save_file(dict(tensors), file)


def load_parts(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """Read the tensors that `save_parts` wrote."""
    found: dict[str, Tensor] = load_file(_own_file(file) if is_sharded(model) else file)
    return found


def _own_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}-{processes.rank() + 1:05d}-of-{processes.world_size():05d}{file.suffix}")
