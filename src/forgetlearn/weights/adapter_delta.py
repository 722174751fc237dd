"""The change that a LoRA adapter makes to a checkpoint, computed from its factors a few rows at a time.

Torch and transformers are imported only if names and shapes do not show how a module stores its matrix.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetlearn.errors import ModelError, WeightMismatchError, plain, shown, some
from forgetlearn.storage.run_folder import MANIFEST
from forgetlearn.weights.adapter_files import CONFIG, WEIGHT, AdapterFiles, LoraAdapterConfig, open_adapter
from forgetlearn.weights.checkpoint_folder import ADAPTER, FLOATS, CheckpointFolder, Entry, read_object
from forgetlearn.weights.deltas import Change, read_wide
from forgetlearn.weights.rounding import Array, Scratch

if TYPE_CHECKING:
    from forgetlearn.weights.structure import Structure

FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
CACHED = 4  # matrices whose factors are kept in memory
# Fields of adapter_config.json that do not change what the saved factors mean.
HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "megatron_core"),
    *("loftq_config", "corda_config", "lora_ga_config"),  # no effect unless init_lora_weights names them
}
KEEPS_BASE = (True, False, None, "true", "gaussian", "eva", "orthogonal")  # initialisations that do not change the base
TUNED = "Merge it with peft into a copy of the base and pass that as --tuned."
WHY_NOT = {
    "use_dora": "DoRA also scales the weights",
    "lora_bias": "it trains biases",
    "bias": "it trains biases",
    "modules_to_save": "it holds whole modules beside the factors",
    "trainable_token_indices": "it holds rows of the embedding",
    "target_parameters": "it adapts parameters that are no module's weight",
    "layer_replication": "its model has more layers than its base",
}


class Adapter(Change):
    """The change `scaling * B A` that a LoRA adapter makes. The dense matrix is never built as a whole.

    The scaling is lora_alpha / r (lora_alpha / sqrt(r) under rsLoRA), with the config's patterns applied. If a module
    stores its matrix as (in, out), as in GPT-2, the product is transposed. The shapes show which modules do. For a
    square matrix the model's structure shows it, because `fan_in_fan_out` is one value for all modules, and peft itself
    gets it wrong.

    Raises:
        ModelError: the folder holds no safetensors adapter, the adapter has more than LoRA factors on matrices, or the
            model's structure is needed and cannot be built from the base's config.
        WeightMismatchError: the factors do not fit the base.
    """

    def __init__(self, base: CheckpointFolder, folder: str | Path) -> None:
        self.base, self.folder = base, Path(folder)
        files, self.config, paths = plain_lora(self.folder)
        files.check_patterns([*(name.removesuffix(WEIGHT) for name in base.entries), *paths])
        self.paths = {self._stored_name(f"{path}{WEIGHT}"): path for path in paths}
        super().__init__(files.tensors, {name: name for name in self.paths})
        self._check_complete()
        self.transposed = {name: self._check_target(name, path) for name, path in self.paths.items()}
        self.made_on = _base_of_run(self.folder)
        self._factors_of = functools.lru_cache(CACHED)(self._load)
        self._lock = threading.Lock()

    @functools.cached_property
    def structure(self) -> Structure:
        """The structure of the base model. The first access builds it, which takes seconds."""
        from forgetlearn.weights.structure import Structure

        return Structure(self.base.folder, self.base.entries)

    def _stored_name(self, name: str) -> str:
        """Return the base's name for the weight that the model calls `name`; older files use other names."""
        if name in self.base.entries or not self.base.config():
            return name
        return self.structure.stored.get(name, name)

    def _check_complete(self) -> None:
        """Raise WeightMismatchError if the config names modules of the base for which the file has no factors.

        Modules that the model does not use are ignored: layers beyond num_hidden_layers, lists of layers (a vision
        tower, draft layers) without an adapted module, and experts that are fused during loading.
        """
        stacks = {_stack_of(name)[0] for name in self.paths}
        layers = _number_of_layers(self.base.config())
        lacking = []
        for name, entry in self.base.entries.items():
            path = name.removesuffix(WEIGHT)
            stack, layer = _stack_of(path)
            used = stack in stacks and (layer is None or layers is None or layer < layers)
            is_matrix = path != name and len(entry.shape) == 2 and entry.dtype in FLOATS
            if used and is_matrix and name not in self.paths and self.config.targets(path):
                lacking.append(path)
        if lacking and self.base.config():
            lacking = [path for path in lacking if self.structure.holds(path)]
        if lacking:
            raise WeightMismatchError(
                f"{self.folder}: {CONFIG} names {len(lacking) + len(self.paths)} modules of {self.base.folder}, and "
                f"{ADAPTER} has no factors for {len(lacking)} of them: {some(lacking)}. Save or download the adapter "
                "again."
            )

    def _check_target(self, name: str, path: str) -> bool:
        """Return True if the base stores a matrix as (in, out); raise WeightMismatchError if the factors don't fit."""
        base = self.base
        if name not in base.entries:
            raise WeightMismatchError(
                f"{self.folder}: adapts {path}, and {base.folder} has no {name}. Is it the adapter of another base? "
                "(A head that is tied to the embedding is not stored, nor is what a model cuts out of a larger tensor "
                "while it loads: merge such an adapter with peft.)"
            )
        if twins := base.twins(name):
            raise WeightMismatchError(
                f"{self.folder}: adapts {path}, whose weight is also {some(twins)} in {base.folder}: with tied weights "
                "peft computes an adapter in two ways that disagree. Train it without that module."
            )
        r_in, r_out = (self._factor(path, letter).shape for letter in "AB")
        shape, rank = base.entries[name].shape, self.config.rank(path)
        straight, transposed = (r_out[0], r_in[1]), (r_in[1], r_out[0])
        if len({r_in[0], r_out[1], rank}) > 1 or shape not in (straight, transposed):
            raise WeightMismatchError(
                f"{self.folder}: the factors of {path} are B {r_out} and A {r_in} (r = {rank} in its config), {name} "
                f"of the base is {shape}. Is it the adapter of another base?"
            )
        if base.entries[name].dtype not in FLOATS:
            raise WeightMismatchError(f"{self.folder}: adapts {path}, which holds integers in {base.folder}.")
        if self.config.targets_weight(path):
            return False  # peft adapts a named parameter in its stored orientation
        if straight != transposed:
            return shape == transposed
        # All transformers modules that store their matrix as (in, out) have a bias.
        return f"{name.removesuffix('weight')}bias" in base.entries and self.structure.is_transposed(path)

    def _factor(self, path: str, letter: str) -> Entry:
        return self.source.entries[f"base_model.model.{path}.lora_{letter}.weight"]

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """Fill `into` with some rows of the product, or part of one row."""
        with self._lock:  # one thread reads the factors while the others wait
            left, right = self._factors_of(entry.name)
        columns = entry.shape[1]
        row, column = divmod(start, columns)
        rows = max(1, len(into) // columns)
        width = columns if column == 0 and len(into) >= columns else len(into)
        np.matmul(left[row : row + rows], right[:, column : column + width], out=into.reshape(rows, width))

    def _load(self, name: str) -> tuple[Array, Array]:
        """Return the two factors whose product is the change of a tensor."""
        path = self.paths[name]
        b, a = self.factors(path)
        b *= np.float32(self.scaling(path))
        return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if self.transposed[name] else (b, a)

    def factors(self, path: str) -> tuple[Array, Array]:
        """Return the factors B (out, r) and A (r, in) of a module in float32, without the scaling."""
        b, a = (self._matrix(self._factor(path, letter)) for letter in "BA")
        return b, a

    def scaling(self, path: str) -> float:
        """Return what the product B A of a module is multiplied by."""
        rank = self.config.rank(path)
        return self.config.alpha(path) / (rank**0.5 if self.config.use_rslora else rank)

    def _matrix(self, entry: Entry) -> Array:
        found = np.empty(entry.n_entries, np.float32)
        read_wide(self.source, entry, 0, found, Scratch())
        return found.reshape(entry.shape)


def plain_lora(folder: Path, remedy: str = TUNED) -> tuple[AdapterFiles, LoraAdapterConfig, list[str]]:
    """Return an adapter's files, its config, and the paths of the modules that it adapts.

    Raise ModelError, with the remedy, if it holds anything but plain LoRA factors.
    """
    files = open_adapter(folder)
    config = files.config.model_dump()
    if not isinstance(files.config, LoraAdapterConfig) or files.config.r is None or files.config.lora_alpha is None:
        kind = plain(files.config.peft_type)
        raise ModelError(f"{folder}: peft_type = {kind}, expected LORA with r and lora_alpha. {remedy}")
    has_patterns = config["rank_pattern"] or config["alpha_pattern"]
    if not has_patterns and all(name.endswith(WEIGHT) for name in config["target_parameters"] or ()):
        del config["target_parameters"]  # adapting a module's weight gives the same factors as adapting the module
    used = [name for name, value in config.items() if name not in HARMLESS and value and value != "none"]
    if used:
        reason = WHY_NOT.get(used[0], "forgetlearn does not know what that adds")
        raise ModelError(
            f"{folder}: {plain(used[0])} = {shown(config[used[0]])}: {reason}, so its factors alone are not its "
            f"change. {remedy}"
        )
    start = files.config.init_lora_weights
    if start not in KEEPS_BASE:
        raise ModelError(
            f"{folder}: init_lora_weights = {shown(start)}: that changed the base's own weights too. "
            "Save it with path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    return files, files.config, _adapted_paths(files.tensors, remedy)


def _adapted_paths(factors: CheckpointFolder, remedy: str) -> list[str]:
    """Return the paths of the adapted modules; raise ModelError unless all tensors are pairs of factors."""
    found: dict[str, set[str]] = {}
    odd = []
    for key, entry in factors.entries.items():
        matched = FACTOR.fullmatch(key)
        if matched is None or len(entry.shape) != 2 or entry.dtype not in FLOATS:
            odd.append(key)
        else:
            found.setdefault(matched[1], set()).add(matched[2])
    odd += [path for path, both in found.items() if len(both) < 2]
    if odd or not found:
        raise ModelError(
            f"{factors.folder / ADAPTER}: {some(odd) if odd else 'nothing'}: expected pairs of LoRA factors on "
            f"matrices and nothing else (an embedding's factors are not supported). {remedy}"
        )
    return list(found)


def _stack_of(path: str) -> tuple[str, int | None]:
    """Return the path of a module's layer list and its layer's number: `model.layers.3.mlp` gives (model.layers, 3)."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
    return (found[1], int(found[2])) if found else ("", None)


def _number_of_layers(config: Mapping[str, object]) -> int | None:
    """Return the number of layers that a model's config states; None if it states none."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if type(number := section.get(name)) is int:
                return int(number)
    return None


def _base_of_run(folder: Path) -> str | None:
    """Return the base's hash from the manifest of the run that wrote this folder; None if there is none."""
    manifest = folder.resolve().parent / MANIFEST
    inputs = read_object(manifest).get("inputs") if manifest.is_file() else None
    found = inputs.get("base_sha256") if isinstance(inputs, dict) else None
    return found if isinstance(found, str) else None
