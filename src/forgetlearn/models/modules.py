"""Find the weights that names such as `embeddings` or `layers.0-3` stand for, from the model's structure.

Nothing here depends on a model's name. The layers are the entries of the list of modules that holds the most weights.
In a layer, modules with "attention" in their class's name are attention, modules with "norm" are norms, and the rest is
the MLP (or whatever else the layer contains).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetlearn.config.schema import Rows
from forgetlearn.errors import ModelError, some
from forgetlearn.models import attention
from forgetlearn.models.language_model import LINEAR, layer_list, linear_shape, width
from forgetlearn.models.lora_layers import own_layer, plain_modules
from forgetlearn.models.module_names import ALL, Modules, factors_among, own_name
from forgetlearn.weights.structure import skeleton
from forgetlearn.weights.task_vector import StateDict


def factors_of(model: nn.Module, modules: Modules, setting: str = "forget.modules") -> dict[str, float]:
    """Return the factor of every parameter that `modules` selects from `groups(model)`; see `factors_among`."""
    return factors_among(groups(model), modules, setting)


def groups_of_folder(folder: Path) -> dict[str, list[str]]:
    """Return `groups` for the model of a folder, reading its config but no weights."""
    try:
        return groups(skeleton(folder))
    except ModelError as error:
        raise ModelError(f"{error} Give layers or patterns instead of parts.") from error


def groups(model: nn.Module) -> dict[str, list[str]]:
    """Map the name of each part of the model to the names of its parameters; omit empty parts.

    `embeddings` are the input embeddings and `head` is the output head; if they are tied, both are the same parameter.
    `vocabulary` is both. A tied parameter appears under its first name.
    """
    names = {id(weight): own_name(name) for name, weight in model.named_parameters() if ".lora_" not in name}
    found: dict[str, list[str]] = {ALL: list(names.values())}
    for name, getter in (("embeddings", "get_input_embeddings"), ("head", "get_output_embeddings")):
        module = getattr(model, getter, lambda: None)()
        weights = module.parameters() if module is not None else ()
        found[name] = [names[id(weight)] for weight in weights if id(weight) in names]  # the others are an adapter's
    found["vocabulary"] = list(dict.fromkeys([*found["embeddings"], *found["head"]]))
    for kind in ("attention", "mlp", "norms"):
        found[kind] = []
    for index, layer in enumerate(layer_list(model)[1]):
        own = {name: names[id(weight)] for name, weight in layer.named_parameters() if id(weight) in names}
        found[f"layers.{index}"] = list(own.values())
        for name, full in own.items():
            found[_kind(layer, name)].append(full)
    return {name: parameters for name, parameters in found.items() if parameters}


def mlp_output(model: nn.Module, layer: int) -> str:
    """Return the path of the last projection of a layer's MLP, which ROME and MEMIT edit.

    It is the linear module outside attention whose output is as wide as the model and that has the most inputs.

    Raises:
        ModelError: the layer has no such module, or several, as a mixture of experts does.
    """
    path, layers = layer_list(model)
    inputs = {
        name: linear_shape(own)[0]
        for name, module in plain_modules(layers[layer])
        if isinstance(own := own_layer(module), LINEAR)
        and linear_shape(own)[1] == width(model)
        and _kind(layers[layer], f"{name}.weight") == "mlp"
    }
    widest = [name for name, n_in in inputs.items() if n_in == max(inputs.values())]
    if len(widest) != 1:
        held = f"has {len(widest)} of them, as a mixture of experts does" if widest else "has none"
        raise ModelError(
            f"{attention.plain(model).config.model_type}: ROME, MEMIT and AlphaEdit edit the last projection of the "
            f"MLP, and layer {layer} {held}. Choose other layers, or another method."
        )
    return f"{path}.{layer}.{widest[0]}"


def out_of_reach(model: nn.Module, reached: Collection[str]) -> str | None:
    """Return a sentence about the layers' matrices that are not among `reached`; None if all of them are.

    Matrices that differ only in the number of their layer (or expert) count once. Shares are of the layers' parameters.
    """
    layered = {name for group, names in groups(model).items() if group.startswith("layers.") for name in names}
    weights = {own_name(name): weight for name, weight in model.named_parameters()}
    weights = {name: weights[name] for name in weights if name in layered}
    matrices = [name for name, weight in weights.items() if weight.dim() > 1]
    unreached = [name for name in matrices if name not in reached]
    kinds, missing = (
        list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)) for names in (matrices, unreached)
    )
    if not missing:
        return None
    share = sum(weights[name].numel() for name in unreached) / sum(weight.numel() for weight in weights.values())
    return (
        f"LoRA does not reach {len(missing)} of {len(kinds)} matrices, {share:.1%} of the parameters of the layers: "
        f"{some(missing)}"
    )


def only_rows(
    base: StateDict, forgotten: Iterable[tuple[str, Tensor]], names: Collection[str], tokens: Iterable[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `forgotten`, but in the matrices `names` let only the rows of `tokens` differ from `base`.

    All other rows of those matrices keep the bits of `base`.
    """
    chosen = sorted(set(tokens))
    for name, moved in forgotten:
        if name in names:
            moved = torch.where(_mask(moved, chosen), moved, base[name].to(moved.device, moved.dtype))
        yield name, moved


@contextmanager
def only_rows_train(model: nn.Module, tokens: Iterable[int], rows: Rows) -> Iterator[None]:
    """Within the `with` block, give gradients only to the rows of `tokens` in the vocabulary's matrices.

    With `rows` = `all`, every row gets gradients. A row without gradients does not change if the optimiser decays no
    weights.
    """
    if rows == "all":
        yield
        return
    names, chosen = groups(model).get("vocabulary", ()), sorted(set(tokens))
    with ExitStack() as stack:
        for name, weight in model.named_parameters():
            if name in names and weight.requires_grad:
                mask = _mask(weight, chosen)
                hook = weight.register_hook(lambda gradient, mask=mask: gradient * mask)
                stack.callback(hook.remove)
        yield


def _mask(matrix: Tensor, chosen: list[int]) -> Tensor:
    """Return a mask over the rows of a matrix (V, D) or bias (V,): True for `chosen` tokens."""
    mask = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device)
    mask[chosen] = True
    return mask.view(-1, *[1] * (matrix.dim() - 1))


def _kind(layer: nn.Module, parameter: str) -> str:
    """Return the part of a layer to which a parameter belongs, by the classes of the modules that hold it."""
    module, classes = layer, []
    for part in parameter.split(".")[:-1]:
        module = getattr(module, part)
        classes.append(type(module).__name__.lower())
    if classes and "norm" in classes[-1]:
        return "norms"
    return "attention" if any("attention" in name or name.endswith("attn") for name in classes) else "mlp"
