"""Start a LoRA adapter where it does not react to what the model usually reads.

An adapter changes a layer's output by B A x. If the rows of A are orthogonal to the inputs x that the layer gets from
ordinary texts, the output for those hardly changes, whatever B learns. So A is projected onto the complement of the
directions that carry most of these inputs, and only B is trained: A would drift back, since Adam scales each number by
itself.

Adam moves B by its learning rate, however large the layer's inputs and weights are, and in this models differ. So A is
scaled until it reacts to the facts by a fixed share of the layer's own output. Then one learning rate fits all models,
and a model whose weights are rescaled without changing what it computes learns the same. The whole A is scaled so,
layer by layer, and what remains of it by one more factor for all layers: where facts differ more from kept texts, more
is learned.

Sources: Saha et al., "Gradient Projection Memory", ICLR 2021, arXiv:2103.09762 (directions by their share of the
energy); Fang et al., "AlphaEdit", ICLR 2025, arXiv:2410.02355 (the null space of kept knowledge in editing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor

from forgetlearn.models import attention
from forgetlearn.models.batches import (
    Layout,
    answer_logits,
    choose_layout,
    computing,
    divided,
    pad_left,
    share,
    shared_inputs,
)
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.lora_layers import adapted_layers

MOST_TOKENS = 16384  # of the texts that are read, which are drawn by one fixed seed
ROOM = 2 << 30  # bytes that are held at once; more layers take more passes over the texts
AT_ONCE = 32  # texts in a forward pass
SEED = 0
STRENGTH = 0.1  # of A's reaction to the facts, relative to the layer's output (bench/results/recipe.md)

Watcher = Callable[[Tensor, Tensor], None]  # gets what a layer reads and what it writes


class _Inputs:
    """What a layer reads: inputs (N, D) or, if the texts have more tokens than that, their moments (D, D)."""

    def __init__(self, width: int, n_tokens: int) -> None:
        self.width, self.bytes = width, 4 * width * min(width, n_tokens)
        self.moments = width <= n_tokens
        self.parts: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Add inputs (N, D)."""
        inputs = inputs.float()
        if not self.moments:
            self.parts.append(inputs)
        elif self.parts:
            self.parts[0].addmm_(inputs.T, inputs)
        else:
            self.parts.append(inputs.T @ inputs)

    def main_directions(self, share: float) -> Tensor:
        """Return the directions (D, K) that carry this share of the energy of the inputs; K is less than D."""
        found = torch.cat(self.parts)
        if self.moments:
            energies, directions = torch.linalg.eigh(found)
        else:  # the smaller of the two Gram matrices has the same energies
            energies, mixtures = torch.linalg.eigh(found @ found.T)
            directions = found.T @ mixtures / energies.clamp(min=torch.finfo(energies.dtype).tiny).sqrt()
        energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
        before = torch.cumsum(energies, 0) - energies  # of the directions with more energy than this one
        main: Tensor = directions[:, (before < share * energies.sum()) & (energies > 0)]
        return main[:, : self.width - 1]


@torch.no_grad()
def turn_away(
    model: PeftModel,
    name: str,
    kept: Sequence[Encoded],
    facts: Sequence[Encoded],
    share: float,
    pad_id: int,
    device: torch.device,
) -> float:
    """Project an adapter's A off the directions that carry this share of the energy of its inputs; freeze A.

    The inputs are those that the layers get from the texts `kept`. A is scaled to react to the texts of `facts` by
    `STRENGTH` of the layer's output. Return the mean share of directions that remain.
    """
    layers = [
        layer
        for _path, layer in adapted_layers(model)
        if name in layer.lora_A and not isinstance(layer, ParamWrapper)  # fused experts: one A for all of them
    ]
    factors: dict[LoraLayer, tuple[Tensor, Tensor]] = {}  # A before and after
    remaining: list[float] = []
    for group in _read(model, layers, _drawn(kept), pad_id, device):
        for members, inputs in group:
            if not inputs.parts:  # an expert may have read nothing
                continue
            main = inputs.main_directions(share)
            for layer in members:
                a = layer.lora_A[name].weight.requires_grad_(False)
                factors[layer] = a.clone(), a
                _project(a, main)
                remaining.append(1 - main.shape[1] / inputs.width)
    if not factors:
        return 1.0
    _strengthen(factors, model, facts, pad_id, device)
    return sum(remaining) / len(remaining)


def _project(a: Tensor, main: Tensor) -> None:
    """Project the rows of A (r, D) off the directions (D, K), in place, and keep their total length."""
    main, length = main.to(a.dtype), a.norm()
    a.sub_((a @ main) @ main.T)
    a.mul_(length / a.norm().clamp(min=torch.finfo(a.dtype).tiny))


def _strengthen(
    factors: Mapping[LoraLayer, tuple[Tensor, Tensor]],
    model: PeftModel,
    texts: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
) -> None:
    """Scale all projected A, in place, by what brings each whole A to `STRENGTH` and by one factor for the projection.

    The whole A's strength is the mean over tokens of log(rms(A x) / rms(W x)). What the projection leaves is the mean
    over layers and tokens of |A x|^2, relative to the whole A's. Both are ratios at each token: a few tokens, the first
    above all, have inputs so long that they would outweigh all others.
    """
    found: dict[LoraLayer, list[Tensor]] = {layer: [] for layer in factors}

    def watch(layer: LoraLayer, counts: Tensor, read: Tensor, written: Tensor) -> None:
        rows, weights = _real(read, counts)
        whole, projected = ((rows @ a.float().T).square().mean(1) for a in factors[layer])
        own = _real(_without_bias(layer, written), counts)[0].square().mean(1)
        tiny = torch.finfo(whole.dtype).tiny
        logs = (whole.clamp(min=tiny) / own.clamp(min=tiny)).log() / 2
        heard = torch.where(own > 0, weights, 0)  # not where the layer writes nothing, as in blocks that were added
        of_tokens = weights, weights * projected / whole.clamp(min=tiny), heard, torch.where(own > 0, weights * logs, 0)
        found[layer].append(torch.stack(of_tokens).sum(1))

    model.eval()
    with attention.by_text(model), computing(model, device):
        drawn = _drawn(texts)
        for each in _passes(model, drawn, choose_layout(model, drawn, pad_id, device, "shared"), pad_id, device):
            _run(model, {layer: partial(watch, layer, each.counts) for layer in factors}, each)
    sums = {layer: torch.stack(own).sum(0) for layer, own in found.items() if own}
    n_tokens, kept, n_heard, _logs = torch.stack(list(sums.values())).sum(0)
    if not kept > 0 or not n_heard > 0:
        return
    strengths = {layer: logs / heard for layer, (_tokens, _kept, heard, logs) in sums.items() if heard > 0}
    usual = torch.stack(list(strengths.values())).mean()  # for layers that read none of the facts, or write nothing
    for layer, (_whole, projected) in factors.items():
        factor = STRENGTH * torch.exp(-strengths.get(layer, usual)) * (n_tokens / kept).sqrt()
        projected.mul_(factor.to(projected.dtype))


def _without_bias(layer: LoraLayer, written: Tensor) -> Tensor:
    """Return what a layer writes without its bias, which may be far larger than all that depends on the input."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    return written if bias is None else written - bias


@dataclass(frozen=True)
class _Pass:
    """Inputs of a forward pass; `counts` (T,) tells how many texts each token of it belongs to, 0 for padding."""

    inputs: dict[str, Tensor]
    counts: Tensor


def _read(
    model: PeftModel, layers: Sequence[LoraLayer], texts: Sequence[Encoded], pad_id: int, device: torch.device
) -> Iterator[list[tuple[list[LoraLayer], _Inputs]]]:
    """Let the model read the texts; yield layers that read alike, with what they read, group by group."""
    model.eval()
    with attention.by_text(model), computing(model, device):
        layout = choose_layout(model, texts, pad_id, device, "shared")
        passes = list(_passes(model, texts, layout, pad_id, device))
        alike = _reading_alike(model, layers, min(texts, key=lambda text: len(text.ids)), pad_id, device)
        for group in _groups(alike, sum(len(text.ids) for text in texts)):
            for each in passes:
                _run(model, {members[0]: partial(_add, inputs, each.counts) for members, inputs in group}, each)
            yield group


def _passes(
    model: PeftModel, texts: Sequence[Encoded], layout: Layout, pad_id: int, device: torch.device
) -> Iterator[_Pass]:
    """Yield the forward passes that read the texts; if the model allows it, equal beginnings are read once."""
    for numbers in divided(dict(enumerate(texts)), layout, AT_ONCE, device):
        together = [texts[number] for number in numbers]
        if layout in ("shared", "shared_by_text"):
            row = share(together)
            counts = torch.zeros(row.input_ids.shape[1])
            for path in row.paths:
                counts[path] += 1
            yield _Pass(shared_inputs(model, row, layout, device), counts.to(device))
        else:
            inputs = {key: value.to(device) for key, value in pad_left(together, pad_id).inputs.items()}
            yield _Pass(inputs, inputs["attention_mask"].flatten().float())


def _reading_alike(
    model: PeftModel, layers: Iterable[LoraLayer], text: Encoded, pad_id: int, device: torch.device
) -> list[list[LoraLayer]]:
    """Return the layers in groups that read the same tensor, as queries, keys and values do."""
    read: dict[LoraLayer, Tensor] = {}  # holds the tensors, so that each has its own address

    def watch(layer: LoraLayer, given: Tensor, _written: Tensor) -> None:
        read[layer] = given

    watchers = {layer: partial(watch, layer) for layer in layers}
    (alone,) = _passes(model, [text], "padded", pad_id, device)
    _run(model, watchers, alone)
    alike: dict[object, list[LoraLayer]] = {}
    for layer in layers:
        found = read.get(layer)
        is_idle = found is None or not found.numel()  # an expert; empty tensors share an address
        alike.setdefault(layer if found is None or is_idle else (found.data_ptr(), found.shape), []).append(layer)
    return list(alike.values())


def _groups(alike: Iterable[list[LoraLayer]], n_tokens: int) -> Iterator[list[tuple[list[LoraLayer], _Inputs]]]:
    """Yield layers that read alike, with room for their inputs, as many at once as fit into `ROOM`."""
    group: list[tuple[list[LoraLayer], _Inputs]] = []
    for members in alike:
        own = _Inputs(int(members[0].in_features), n_tokens)
        if group and own.bytes + sum(other.bytes for _members, other in group) > ROOM:
            yield group
            group = []
        group.append((members, own))
    if group:
        yield group


def _drawn(texts: Sequence[Encoded]) -> list[Encoded]:
    """Return texts of at most `MOST_TOKENS` tokens in all, and at least one text."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SEED)).tolist()
    sizes = accumulate(len(texts[index].ids) for index in order)
    return [texts[index] for index, size in zip(order, sizes, strict=True) if size <= MOST_TOKENS or index == order[0]]


def _add(found: _Inputs, counts: Tensor, read: Tensor, _written: Tensor) -> None:
    """Add what a layer read in a forward pass; a token counts as often as there are texts that it belongs to."""
    rows, counts = _real(read, counts)
    found.add(rows * counts.sqrt().unsqueeze(1))


def _real(read: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs (N, D) of the tokens that are not padding, in float32, and their counts (N,)."""
    rows = read.flatten(0, -2)
    if len(rows) != len(counts):  # an expert gets only the tokens that are routed to it
        return rows.float(), counts.new_ones(len(rows))
    return rows[counts > 0].float(), counts[counts > 0]


def _run(model: PeftModel, watchers: Mapping[LoraLayer, Watcher], each: _Pass) -> None:
    """Run a forward pass, and give each watcher what its layer reads and writes."""

    def hook(layer: LoraLayer, inputs: tuple[Tensor, ...], written: Tensor) -> None:
        watchers[layer](inputs[0], written)

    handles = [layer.register_forward_hook(hook) for layer in watchers]
    try:
        answer_logits(model, each.inputs, torch.tensor([0], device=each.counts.device))
    finally:
        for handle in handles:
            handle.remove()
