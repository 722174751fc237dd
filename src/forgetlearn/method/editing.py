"""Write facts into the last projections of MLPs by a formula: ROME, MEMIT and AlphaEdit.

Each projection W is seen as a memory with W k = v for keys k. The key of a fact is what W reads at the subject's last
token, and `targets` finds the value that makes the model say the new answer. With C, the second moments of the keys of
other texts (`moments`):

    ROME        W + (v - W k) u^T / (u^T k),  u = C^-1 k                      (eq. 2 of arXiv:2202.05262)
    MEMIT       W + R K^T (c C + K K^T)^-1,  R: the rest up to the values     (eq. 14 of arXiv:2210.07229)
    AlphaEdit   W + R K^T P (K K^T P + b I)^-1,  P: projection onto what other keys hardly use  (arXiv:2410.02355)

Shapes: N facts, I inputs and O outputs of a projection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetlearn.config.schema import StageSettings
from forgetlearn.errors import ConfigError
from forgetlearn.facts import Fact
from forgetlearn.method import targets
from forgetlearn.method.moments import SecondMoments, second_moments
from forgetlearn.method.reading import at_last_token, hooked
from forgetlearn.method.targets import Request
from forgetlearn.models.language_model import LanguageModel, layer_list
from forgetlearn.models.modules import mlp_output
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import SavedParts, StageIO

log = logging.getLogger("forgetlearn")
# For Llama-2-7B, which has 32 layers, ROME is used in layer 5 and MEMIT in 4 to 8 (arXiv:2311.08011, EasyEdit).
DEPTH, ROME_LAYER, MEMIT_LAYERS = 32, 5, (4, 8)
ROME_CLAMP, MEMIT_CLAMP = 4.0, 0.75  # of their authors
USUAL_L2 = 0.1  # of the energy of a usual key in the null space
Layers = Callable[[int, StageSettings], list[int]]
Write = Callable[[LanguageModel, Sequence[Fact], StageSettings, int, StageIO], StageLog]


def rome_layers(n_layers: int, settings: StageSettings) -> list[int]:
    """Return the layer that ROME edits; raise ConfigError if the model does not have the chosen one."""
    chosen = settings.rome.layer
    return [_usual(ROME_LAYER, n_layers) if chosen is None else _existing(chosen, n_layers, "rome.layer")]


def memit_layers(n_layers: int, settings: StageSettings) -> list[int]:
    """Return the layers that MEMIT edits, in order; raise ConfigError if the model does not have a chosen one."""
    chosen = settings.memit.layers
    if chosen is None:
        first, last = (_usual(layer, n_layers) for layer in MEMIT_LAYERS)
        return list(range(first, last + 1))
    return [_existing(layer, n_layers, "memit.layers") for layer in sorted(set(chosen))]


def _usual(layer: int, n_layers: int) -> int:
    """Return the layer at the same depth as this one of 32; not the last, whose output at the subject is not read."""
    return min(round(layer / DEPTH * n_layers), max(0, n_layers - 2))


def _existing(layer: int, n_layers: int, setting: str) -> int:
    if layer >= n_layers:
        raise ConfigError(f"{setting} = {layer}: the model has {n_layers} layers, 0 to {n_layers - 1}.")
    return layer


def rome(lm: LanguageModel, facts: Sequence[Fact], settings: StageSettings, seed: int, stage_io: StageIO) -> StageLog:
    """Write facts one after the other into one layer, in place; return the log, with each new answer's loss."""
    own = settings.edit
    (layer,) = rome_layers(len(layer_list(lm.model)[1]), settings)
    path = mlp_output(lm.model, layer)
    moments = second_moments(lm, [path], settings.edit, seed)
    wanted = targets.requests(lm.encoder, facts, targets.contexts(lm, own.contexts, seed))
    weight = lm.model.get_parameter(f"{path}.weight").data
    search = targets.Search(lm, path, own, own.clamp_norm_factor or ROME_CLAMP)
    factor = torch.linalg.cholesky(moments.of[path])
    saved = SavedParts(stage_io)
    losses = saved.found.get("losses", torch.empty(0))
    if saved.found:
        weight.copy_(saved.found["weight"])
    for part in saved.parts(len(wanted), 1, "fact"):
        request = wanted[part.start]
        found = search.together([request])
        keys = at_last_token(lm, [text.up_to_subject for text in request.trained], [path])[path][0]
        direction = torch.cholesky_solve(keys.double().mean(0).unsqueeze(1), factor).squeeze(1)
        add(
            lm.model.get_submodule(path),
            torch.outer(found.deltas[0].double(), direction) / (direction @ keys[0].double()),
        )
        losses = torch.cat([losses, found.losses.cpu()])
        saved.save(part, {"losses": losses, "weight": weight})
    return _log(losses, moments)


def memit(lm: LanguageModel, facts: Sequence[Fact], settings: StageSettings, seed: int, stage_io: StageIO) -> StageLog:
    """Write all facts at once into several layers, in place; return the log, with each new answer's loss."""

    def solve(keys: Tensor, moments: Tensor) -> Tensor:
        weight = settings.memit.moment_weight or len(moments)
        found: Tensor = torch.linalg.solve(weight * moments + keys.T @ keys, keys.T)
        return found

    return _in_layers(lm, facts, settings, seed, stage_io, solve)


def alphaedit(
    lm: LanguageModel, facts: Sequence[Fact], settings: StageSettings, seed: int, stage_io: StageIO
) -> StageLog:
    """Write all facts at once, in the null space of other keys, in place; return the log, as `memit` does."""

    def solve(keys: Tensor, moments: Tensor) -> Tensor:
        projection = null_space(moments, settings.alphaedit.null_space_threshold)
        weight = settings.alphaedit.l2 or USUAL_L2 * (projection * moments).sum()
        identity = torch.eye(len(moments), dtype=keys.dtype, device=keys.device)
        found: Tensor = torch.linalg.solve(projection @ keys.T @ keys + weight * identity, projection @ keys.T)
        return found

    return _in_layers(lm, facts, settings, seed, stage_io, solve)


def _in_layers(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: StageSettings,
    seed: int,
    stage_io: StageIO,
    solve: Callable[[Tensor, Tensor], Tensor],
) -> StageLog:
    """Spread the changes over the layers: each takes its share of the way that is left to the values.

    `solve` returns, from keys (N, I) and moments (I, I), what each fact's residual is multiplied with (I, N).
    """
    own, layers = settings.edit, memit_layers(len(layer_list(lm.model)[1]), settings)
    paths = [mlp_output(lm.model, layer) for layer in layers]
    wanted = targets.requests(lm.encoder, facts, targets.contexts(lm, own.contexts, seed))
    bare = [request.bare.up_to_subject for request in wanted]
    last = f"{layer_list(lm.model)[0]}.{layers[-1]}"
    if not passes_on(lm, bare[0], paths[-1], last):
        log.info("a norm or a factor follows the MLPs of this model, so only layer %d is edited", layers[-1])
        paths, last = paths[-1:], paths[-1]
    moments = second_moments(lm, paths, own, seed)
    search = targets.Search(lm, last, own, own.clamp_norm_factor or MEMIT_CLAMP)
    found = search.all(wanted, SavedParts(stage_io))
    outputs = at_last_token(lm, bare, [last])[last][1]
    values = outputs + found.deltas
    for number, path in enumerate(paths):
        if number:  # the earlier layers have changed them
            outputs = at_last_token(lm, bare, [last])[last][1]
        residual = (values - outputs) / (len(paths) - number)
        add(lm.model.get_submodule(path), residual.double().T @ solve(keys_of(lm, wanted, path), moments.of[path]).T)
    return _log(found.losses, moments)


def _log(losses: Tensor, moments: SecondMoments) -> StageLog:
    """Return a log with a row for each fact: the loss of its answer when its value was found, in nats."""
    rows = ({"step": number, "loss": loss} for number, loss in enumerate(losses.tolist(), 1))
    return StageLog(tuple(rows), second_moments=moments.text)


def passes_on(lm: LanguageModel, ids: Sequence[int], path: str, layer: str) -> bool:
    """Return True if what is added to the output of a projection is added to the output of its layer.

    It is not if a norm, a gate or a factor stands between them, as in Gemma 2 and Granite.
    """
    before = at_last_token(lm, [ids], [layer])[layer][1]
    small = torch.linspace(-1, 1, before.shape[1], device=before.device) * before.abs().mean()

    def push(_module: nn.Module, _read: object, returned: Tensor) -> Tensor:
        return returned + small.to(returned.dtype)

    with hooked(lm.model, {path: push}):
        after = at_last_token(lm, [ids], [layer])[layer][1]
    return bool((after - before - small).norm() < 0.01 * small.norm())


def keys_of(lm: LanguageModel, wanted: Sequence[Request], path: str) -> Tensor:
    """Return the key (N, I) of each fact, in float64: the mean of the bare prompt's and of those after contexts."""
    read = at_last_token(lm, [text.up_to_subject for request in wanted for text in request.trained], [path])[path][0]
    parts = iter(read.double().split([size for request in wanted for size in (1, len(request.after_contexts))]))
    means = [torch.stack([part.mean(0) for part in both if len(part)]) for both in zip(parts, parts, strict=True)]
    return torch.stack([mean.mean(0) for mean in means])


def null_space(moments: Tensor, threshold: float | None) -> Tensor:
    """Return the projection (I, I) onto the directions whose energy is below the threshold, or below the mean.

    Raises:
        ConfigError: there is none below the threshold.
    """
    energies, directions = torch.linalg.eigh(moments)
    rest: Tensor = directions[:, energies < (threshold or energies.mean())]
    if not rest.numel():
        highest = threshold or energies.mean().item()
        raise ConfigError(
            f"alphaedit.null_space_threshold = {highest:.3g}: no direction has less energy, the lowest is "
            f"{energies[0].item():.3g}. Raise it."
        )
    return rest @ rest.T


@torch.no_grad()
def add(module: nn.Module, change: Tensor) -> None:
    """Add a change (O, I) to a projection's weight, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.add_((change.T if isinstance(module, Conv1D) else change).to(weight.dtype))
