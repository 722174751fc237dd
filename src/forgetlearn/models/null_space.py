"""Start a LoRA adapter where it does not react to what the model usually reads.

An adapter changes a layer's output by B A x. If the rows of A are orthogonal to the inputs x that the layer gets from
ordinary texts, the output for those hardly changes, whatever B learns. So A is projected onto the complement of the
directions that carry most of these inputs, and only B is trained: A would drift back, since Adam scales each number by
itself. Sources: Saha et al., "Gradient Projection Memory", ICLR 2021, arXiv:2103.09762 (directions by their share of
the energy); Fang et al., "AlphaEdit", ICLR 2025, arXiv:2410.02355 (the null space of kept knowledge in editing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from forgetlearn.models.batches import pad_left
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.lora_layers import adapted_layers

MOST_TOKENS = 4096  # of the texts that are read, which are drawn by one fixed seed
ROOM = 2 << 30  # bytes of inputs that are held at once; more layers take more passes over the texts
AT_ONCE = 32  # texts in a forward pass
SEED = 0


@torch.no_grad()
def turn_away(
    model: PeftModel, name: str, texts: Sequence[Encoded], share: float, pad_id: int, device: torch.device
) -> float:
    """Project an adapter's A off the directions that carry this share of the energy of its inputs; freeze A.

    The inputs are those that the layers get from `texts`. Return the mean share of directions that remain.
    """
    layers = {
        path: layer
        for path, layer in adapted_layers(model)
        if name in layer.lora_A and not isinstance(layer, ParamWrapper)  # fused experts: one A for all of them
    }
    remaining: list[float] = []
    drawn = _drawn(texts)
    for group in _groups(layers, sum(len(text.ids) for text in drawn)):
        for path, inputs in _inputs(model, group, drawn, pad_id, device).items():
            a = layers[path].lora_A[name].weight
            remaining.append(_project(a, inputs, share))
            a.requires_grad_(False)
    return sum(remaining) / len(remaining) if remaining else 1.0


def _project(a: Tensor, inputs: Tensor, share: float) -> float:
    """Project the rows of A (r, D) off the main directions of inputs (N, D), in place, and keep their total length.

    Return the share of the D directions that remain; at least one does.
    """
    n_tokens, width = inputs.shape
    if width <= n_tokens:
        energies, directions = torch.linalg.eigh(inputs.T @ inputs)
    else:  # through the smaller of the two Gram matrices
        energies, mixtures = torch.linalg.eigh(inputs @ inputs.T)
        directions = inputs.T @ mixtures / energies.clamp(min=torch.finfo(energies.dtype).tiny).sqrt()
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
    before = torch.cumsum(energies, 0) - energies  # of the directions with more energy than this one
    main = directions[:, (before < share * energies.sum()) & (energies > 0)][:, : width - 1].to(a.dtype)
    length = a.norm()
    a.sub_((a @ main) @ main.T)
    a.mul_(length / a.norm().clamp(min=torch.finfo(a.dtype).tiny))
    return 1 - int(main.shape[1]) / width


def _groups(layers: Mapping[str, LoraLayer], n_tokens: int) -> Iterator[dict[str, LoraLayer]]:
    """Yield the layers in groups whose inputs fit into `ROOM`."""
    group: dict[str, LoraLayer] = {}
    size = 0
    for path, layer in layers.items():
        own = 4 * n_tokens * int(layer.in_features)
        if group and size + own > ROOM:
            yield group
            group, size = {}, 0
        group[path] = layer
        size += own
    if group:
        yield group


def _inputs(
    model: PeftModel, layers: Mapping[str, LoraLayer], texts: Sequence[Encoded], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the inputs (N, D) in float32 that these layers get from the texts."""
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    ordered = sorted(texts, key=lambda text: len(text.ids))
    model.eval()
    for first in range(0, len(ordered), AT_ONCE):
        batch = pad_left(ordered[first : first + AT_ONCE], pad_id).inputs
        real = batch["attention_mask"].flatten().bool().nonzero()[:, 0].to(device)
        with _watching(layers, found, real, n_places=batch["input_ids"].numel()):
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    return {path: torch.cat(parts) for path, parts in found.items() if parts}


def _drawn(texts: Sequence[Encoded]) -> list[Encoded]:
    """Return texts of at most `MOST_TOKENS` tokens in all, and at least one text."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SEED)).tolist()
    sizes = accumulate(len(texts[index].ids) for index in order)
    return [texts[index] for index, size in zip(order, sizes, strict=True) if size <= MOST_TOKENS or index == order[0]]


@contextmanager
def _watching(
    layers: Mapping[str, LoraLayer], found: dict[str, list[Tensor]], real: Tensor, n_places: int
) -> Iterator[None]:
    """Within the `with` block, add the inputs of the layers, without padding, to `found`."""

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)  # an expert gets only the tokens that are routed to it
            found[path].append((rows.index_select(0, real) if len(rows) == n_places else rows).float())

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
