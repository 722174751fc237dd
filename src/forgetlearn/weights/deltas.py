"""What is subtracted from a checkpoint, read piece by piece: another checkpoint, a vector's file, an adapter.

Each says which tensors of the base it moves and gives, for a range of one tensor's numbers, the change in the
width that it is summed in. All names and shapes are compared when it is opened, before anything is written.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from forgetlearn.errors import ConfigError, ModelError, WeightMismatchError, plain, shown, some
from forgetlearn.storage.run_folder import MANIFEST
from forgetlearn.weights.adapter_files import CONFIG, WEIGHT, AdapterFiles, LoraAdapterConfig, open_adapter
from forgetlearn.weights.checkpoint_folder import (
    ADAPTER,
    FLOATS,
    WIDTHS,
    CheckpointFolder,
    Entry,
    Shape,
    check_same,
    named_in,
    partners,
    read_object,
)
from forgetlearn.weights.rounding import Array, Scratch, widen

VECTOR = "vector.safetensors"
PREFIX = "base_model.model."
# Fields of adapter_config.json that change nothing about what saved factors mean.
HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "megatron_core"),
    *("loftq_config", "corda_config", "lora_ga_config"),  # without effect unless init_lora_weights names them
}
KEEPS_BASE = (True, False, None, "true", "gaussian", "eva", "orthogonal")  # ways of starting that leave the base alone
WHY_NOT = {
    "use_dora": "DoRA also scales the weights",
    "lora_bias": "it trains biases",
    "bias": "it trains biases",
    "modules_to_save": "it holds whole modules beside the factors",
    "trainable_token_indices": "it holds rows of the embedding",
    "target_parameters": "it adapts parameters that are no module's weight",
    "layer_replication": "its model has more layers than its base",
}


class Change(Protocol):
    """What is subtracted, times a coefficient.

    moved    each tensor of the base that is moved, to the name by which it is found here
    made_on  SHA-256 of the only base that it may be subtracted from, as `digests.sha256_of`; None for any
    """

    moved: Mapping[str, str]
    made_on: str | None

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """The change of a tensor's numbers from `start` on into `into`; `base` are the base's numbers there."""

    def close(self) -> None:
        """Close the files."""


class Difference:
    """`tuned - base`, for another checkpoint of the same architecture, whatever its shards, order and dtypes.

    Raises:
        WeightMismatchError: names, shapes or kinds of numbers differ.
        ModelError: see `CheckpointFolder`.
    """

    def __init__(self, base: CheckpointFolder, tuned: str | Path) -> None:
        self.tuned = CheckpointFolder(tuned).open_all()
        refuse_quantised(self.tuned)
        found = partners(base, self.tuned)
        ours, theirs = base.dtypes(), self.tuned.dtypes()
        kinds = {name: (ours[name], theirs[partner]) for name, partner in found.items()}
        if odd := [name for name, (one, two) in kinds.items() if (one in FLOATS) != (two in FLOATS)]:
            first, second = kinds[odd[0]]
            whole = "tuned" if first in FLOATS else "base"
            raise WeightMismatchError(
                f"{len(odd)} of {len(found)} tensors are floating-point on one side and integers on the other: "
                f"{some(odd)} ({first} in base, {second} in tuned). Is {whole} quantised? Save it as bfloat16."
            )
        self.moved: Mapping[str, str] = {name: found[name] for name, dtype in ours.items() if dtype in FLOATS}
        self.made_on: str | None = None

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """Tuned minus base."""
        _read(self.tuned, self.tuned.entries[self.moved[entry.name]], start, into, scratch)
        np.subtract(into, base, out=into)

    def close(self) -> None:
        """Close the tuned files."""
        self.tuned.close()


class Stored:
    """A task vector that was saved: float32 tensors under the names of the base.

    Raises:
        WeightMismatchError: it names a tensor that the base has not, or in another shape.
        ModelError: there is none.
    """

    def __init__(self, base: CheckpointFolder, vector: str | Path) -> None:
        self.file = open_vector(vector)
        self.made_on: str | None = None  # it may be added to what was made from its base, or to another model
        ours, theirs = base.shapes(), self.file.shapes()
        self.moved: Mapping[str, str] = named_in(theirs, base)
        reached = {partner: ours[name] for name, partner in self.moved.items()}
        check_same(reached, theirs, ("base", "vector"))
        if whole := [name for name in self.moved if base.entries[name].dtype not in FLOATS]:
            raise WeightMismatchError(f"The vector moves {some(whole)}, whole numbers in {base.folder}.")

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """The vector's own numbers."""
        _read(self.file, self.file.entries[self.moved[entry.name]], start, into, scratch)

    def close(self) -> None:
        """Close the vector's file."""
        self.file.close()


class Adapter:
    """`scaling * B A` of a LoRA adapter's factors, a few rows at a time: the dense matrix is never whole.

    The scaling is lora_alpha / r, under rsLoRA lora_alpha / sqrt(r), with the patterns of the config. A module that
    holds its matrix as (in, out), as GPT-2's do, gets the product transposed. Shapes say which do, and of a square
    matrix the model's structure: `fan_in_fan_out` is one value for all modules, and peft itself writes it wrong.

    Raises:
        ModelError: the folder holds no safetensors adapter, or one that is more than LoRA factors on matrices; or the
            base's config makes no model, where its structure is needed.
        WeightMismatchError: the factors do not fit the base.
    """

    def __init__(self, base: CheckpointFolder, folder: str | Path) -> None:
        self.folder = Path(folder)
        files, self.config = plain_lora(self.folder)
        self.factors = files.tensors.open_all()
        self.structure = _Structure(base)
        paths = _paths(self.factors)
        modules = [name.removesuffix(".weight") for name in base.entries]
        files.check_patterns([*modules, *paths.values()])
        self.paths = {self._stored_name(base, name): path for name, path in paths.items()}
        self._check_whole(base)
        self.turned: dict[str, bool] = {}
        for name, path in self.paths.items():
            self._check_target(base, name, path)
        self.moved: Mapping[str, str] = {name: name for name in self.paths}
        self.made_on = _base_of_run(self.folder)
        self._kept: dict[str, tuple[Array, Array]] = {}
        self._lock = threading.Lock()

    def _check_whole(self, base: CheckpointFolder) -> None:
        """Raise WeightMismatchError if the config names modules of the base for which the file has no factors.

        Modules that the model does not use are ignored: layers beyond num_hidden_layers, lists of layers (a vision
        tower, layers for drafting) in which nothing is adapted, and experts that it fuses while it loads.
        """
        stacks = {stack_of(name.removesuffix(".weight"))[0] for name in self.paths}
        layers = number_of_layers(base.config())
        lacking = []
        for name, entry in base.entries.items():
            path = name.removesuffix(".weight")
            stack, layer = stack_of(path)
            used = stack in stacks and (layer is None or layers is None or layer < layers)
            is_matrix = path != name and len(entry.shape) == 2 and entry.dtype in FLOATS
            if used and is_matrix and name not in self.paths and self.config.targets(path):
                lacking.append(path)
        if lacking and base.config():
            lacking = [path for path in lacking if self.structure.holds(path)]
        if lacking:
            raise WeightMismatchError(
                f"{self.folder}: {CONFIG} names {len(lacking) + len(self.paths)} modules of {base.folder}, and "
                f"{ADAPTER} has no factors for {len(lacking)} of them: {some(lacking)}. Save or download the adapter "
                "again."
            )

    def _stored_name(self, base: CheckpointFolder, name: str) -> str:
        """Return the name in the base's files of the weight that the model calls `name`: older files differ."""
        return name if name in base.entries or not base.config() else self.structure.stored_name(name)

    def _check_target(self, base: CheckpointFolder, name: str, path: str) -> None:
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
        shape, r_in, r_out = base.shapes()[name], self._shape(path, "A"), self._shape(path, "B")
        straight, turned = (r_out[0], r_in[1]), (r_in[1], r_out[0])
        if len({r_in[0], r_out[1], self.config.rank(path)}) > 1 or shape not in (straight, turned):
            raise WeightMismatchError(
                f"{self.folder}: the factors of {path} are B {r_out} and A {r_in} (r = "
                f"{self.config.rank(path)} in its config), {name} of the base is {shape}. "
                "Is it the adapter of another base?"
            )
        if base.entries[name].dtype not in FLOATS:
            raise WeightMismatchError(f"{self.folder}: adapts {path}, whole numbers in {base.folder}.")
        if self.config.targets_weight(path):
            self.turned[name] = False  # as a parameter it is taken as it is stored
        elif straight != turned:
            self.turned[name] = shape == turned
        else:  # transformers' modules that hold it as (in, out) have a bias, all of them
            has_bias = f"{name.removesuffix('weight')}bias" in base.entries
            self.turned[name] = has_bias and self.structure.turned(path)

    def _shape(self, path: str, factor: str) -> Shape:
        return self.factors.entries[f"{PREFIX}{path}.lora_{factor}.weight"].shape

    def fill(self, entry: Entry, start: int, base: Array, into: Array, scratch: Scratch) -> None:
        """Rows of the product, or a part of one row."""
        left, right = self._pair(entry.name)
        columns = entry.shape[1]
        row, column = divmod(start, columns)
        rows = max(1, len(into) // columns)
        width = columns if column == 0 and len(into) >= columns else len(into)
        np.matmul(left[row : row + rows], right[:, column : column + width], out=into.reshape(rows, width))

    def _pair(self, name: str) -> tuple[Array, Array]:
        """Two factors whose product is the change of the matrix; those of the last matrices are kept."""
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= 4:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[name] = self._load(name)
            return self._kept[name]

    def _load(self, name: str) -> tuple[Array, Array]:
        path = self.paths[name]
        a, b = (self._matrix(f"{PREFIX}{path}.lora_{factor}.weight") for factor in "AB")
        rank = len(a)
        b *= np.float32(self.config.alpha(path) / (rank**0.5 if self.config.use_rslora else rank))
        return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if self.turned[name] else (b, a)

    def _matrix(self, key: str) -> Array:
        entry = self.factors.entries[key]
        found = np.empty(entry.n_entries, np.float32)
        _read(self.factors, entry, 0, found, Scratch())
        return found.reshape(entry.shape)

    def close(self) -> None:
        """Close the adapter's file."""
        self.factors.close()


class _Structure:
    """The structure of a base's model, built on first use, which takes seconds."""

    def __init__(self, base: CheckpointFolder) -> None:
        self.base = base

    @functools.cached_property
    def _model(self) -> Any:
        from forgetlearn.weights.structure import skeleton

        return skeleton(self.base.folder)

    @functools.cached_property
    def _stored(self) -> dict[str, str]:
        from forgetlearn.weights.structure import stored_names

        return stored_names(self._model, self.base.entries)

    def stored_name(self, name: str) -> str:
        """Return the name of a weight in the checkpoint; its own name if the checkpoint has no other."""
        return self._stored.get(name, name)

    def holds(self, path: str) -> bool:
        """Whether the model has a module at the path by which the checkpoint stores its weight."""
        from forgetlearn.weights.structure import turned

        own = {stored: name for name, stored in self._stored.items()}
        name = own.get(f"{path}{WEIGHT}")
        return name is not None and turned(self._model, name.removesuffix(WEIGHT)) is not None

    def turned(self, path: str) -> bool:
        """Return True if a module stores its matrix as (in, out)."""
        from forgetlearn.weights.structure import turned

        if (found := turned(self._model, path)) is None:
            raise WeightMismatchError(
                f"{self.base.folder}: its config makes a model without {path}, which the adapter changes. "
                "Is it the adapter of another base?"
            )
        return found


def _read(folder: CheckpointFolder, entry: Entry, start: int, into: Array, scratch: Scratch) -> None:
    """Fill `into` with numbers of a tensor, in the width of `into`; raise ModelError if one is NaN."""
    if entry.dtype == "F32" and into.dtype == np.float32:
        folder.read_numbers(entry, start, into.view(np.uint8), scratch)
        return
    raw = scratch.array("other", len(into) * WIDTHS[entry.dtype], np.uint8)
    folder.read_numbers(entry, start, raw, scratch)
    widen(raw, entry.dtype, into)


def check_change(name: str, base: Array, change: Array) -> None:
    """Raise ModelError if a change is not finite where the base is finite (a mask of -inf does not change)."""
    if not np.isfinite(np.dot(change, change)) and (~np.isfinite(change) & ~np.isinf(base)).any():
        raise ModelError(
            f"{name}: the difference is not finite. Did the training diverge? Look for infinite numbers in what is "
            "compared with the base."
        )


def open_vector(vector: str | Path) -> CheckpointFolder:
    """The tensors of a saved vector; `metadata[VECTOR]` says where it is from.

    Raises:
        ModelError: there is none.
    """
    folder = Path(vector)
    file = folder if folder.suffix == ".safetensors" else folder / VECTOR
    if not file.is_file():
        raise ModelError(f"{vector}: holds no {VECTOR}. Make one with forgetlearn vector.")
    found = CheckpointFolder.of_file(file)
    if found.metadata[file.name].get("forgetlearn") != "task vector":
        raise ModelError(f"{file}: was not written by forgetlearn vector.")
    return found.open_all()


def refuse_quantised(folder: CheckpointFolder) -> None:
    """Raise ModelError unless the weights are plain numbers.

    Raises:
        ModelError: the config says that they are quantised.
    """
    if folder.config().get("quantization_config"):
        raise ModelError(
            f"{folder.folder}: is quantised (quantization_config in config.json). Quantised weights are not moved: "
            "take the checkpoint in bfloat16, float16 or float32 that it was made from."
        )


def plain_lora(folder: Path) -> tuple[AdapterFiles, LoraAdapterConfig]:
    """Return an adapter that consists of LoRA factors alone, and its config.

    Raises:
        ModelError: there is no such adapter, see `open_adapter`, or subtracting its factors would not subtract what it
            does.
    """
    files = open_adapter(folder)
    config = files.config.model_dump()
    if not isinstance(files.config, LoraAdapterConfig) or files.config.r is None or files.config.lora_alpha is None:
        raise ModelError(f"{folder}: peft_type = {plain(files.config.peft_type)}, expected LORA with r and lora_alpha.")
    has_patterns = config["rank_pattern"] or config["alpha_pattern"]
    if not has_patterns and all(name.endswith(WEIGHT) for name in config["target_parameters"] or ()):
        del config["target_parameters"]  # weights of modules, with factors as of the modules themselves
    used = [name for name, value in config.items() if name not in HARMLESS and value and value != "none"]
    if used:
        reason = WHY_NOT.get(used[0], "forgetlearn does not know what that adds")
        raise ModelError(
            f"{folder}: {plain(used[0])} = {shown(config[used[0]])}: {reason}, so subtracting the factors would be "
            "wrong. Merge it with peft into a copy of the base and pass that as --tuned."
        )
    start = files.config.init_lora_weights
    if start not in KEEPS_BASE:
        raise ModelError(
            f"{folder}: init_lora_weights = {shown(start)}: that changed the base's own weights too. "
            "Save it with path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )
    return files, files.config


def stack_of(path: str) -> tuple[str, int | None]:
    """Return a module's list of layers and the number of its layer: `model.layers.3.mlp` gives (model.layers, 3)."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
    return (found[1], int(found[2])) if found else ("", None)


def number_of_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a model's config states; None if it states none."""
    text = config.get("text_config")
    for told in (config, text if isinstance(text, dict) else {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if type(told.get(name)) is int:
                return int(told[name])
    return None


def _base_of_run(folder: Path) -> str | None:
    """The hash of the base in the manifest of the run that the folder is the product of."""
    manifest = folder.resolve().parent / MANIFEST
    inputs = read_object(manifest).get("inputs") if manifest.is_file() else None
    found = inputs.get("base_sha256") if isinstance(inputs, dict) else None
    return found if isinstance(found, str) else None


def _paths(factors: CheckpointFolder) -> dict[str, str]:
    """Names of the base's weights to paths of the adapted modules."""
    found: dict[str, set[str]] = {}
    odd = []
    for key in factors.entries:
        matched = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if matched is None or len(factors.entries[key].shape) != 2 or factors.entries[key].dtype not in FLOATS:
            odd.append(key)
        else:
            found.setdefault(matched[1], set()).add(matched[2])
    odd += [path for path, both in found.items() if len(both) < 2]
    if odd or not found:
        raise ModelError(
            f"{factors.folder / ADAPTER}: {some(odd) if odd else 'nothing'}: expected pairs of LoRA factors on "
            "matrices and nothing else (an embedding's factors are not supported). Merge it with peft into a copy of "
            "the base and pass that as --tuned."
        )
    return {f"{path}.weight": path for path in found}


def open_change(
    base: CheckpointFolder, tuned: str | Path | None, adapter: str | Path | None, vector: str | Path | None
) -> Change:
    """The one of the three that is given.

    Raises:
        ConfigError: none is, or more than one.
    """
    given = [what for what in (tuned, adapter, vector) if what is not None]
    if len(given) != 1:
        raise ConfigError(f"{len(given)} of --tuned, --adapter and --vector are given. Give one: what is subtracted.")
    if tuned is not None:
        return Difference(base, tuned)
    return Adapter(base, adapter) if adapter is not None else Stored(base, vector or "")
