"""Read adapter folders as peft writes them, without torch: a typed, validated config, and the tensors.

An adapter may come from a stranger, and peft trusts its config. Every command therefore reads adapters through this
module, which reports errors before peft sees the config.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from forgetlearn.errors import ModelError, plain, shown, some
from forgetlearn.runtime.patterns import Pattern, problem
from forgetlearn.weights.checkpoint_folder import ADAPTER, FLOATS, CheckpointFolder, read_object

CONFIG = "adapter_config.json"
WEIGHT = ".weight"
ALL_LINEAR = "all-linear"
LORA = "LORA"
DEFAULT = 8  # peft's default for both r and lora_alpha
MOST_LAYERS = 1000
MOST_NUMBER = 1_000_000  # the largest number in the config of an adapter other than LoRA

Rank = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Names = list[str] | None
NAMES = "a list of names of modules, or null"
NAME_OR_NAMES = "a regular expression, a list of names of modules, or null"


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json that all kinds of adapters share; null counts as absent."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    peft_type: str = Field(description="the name of a kind of adapter, such as LORA")
    base_model_name_or_path: str | None = Field(None, description="the base's folder or hub id")
    revision: str | None = Field(None, description="a text, or null")
    task_type: str | None = Field(None, description="CAUSAL_LM, or null")
    inference_mode: bool | None = Field(None, description="true or false")
    peft_version: str | None = Field(None, description="a text, or null")
    auto_mapping: dict[str, object] | None = Field(None, description="an object, or null")
    ensure_weight_tying: bool | None = Field(None, description="true or false")
    target_modules: str | Names = Field(None, description=NAME_OR_NAMES)
    exclude_modules: str | Names = Field(None, description=NAME_OR_NAMES)
    modules_to_save: Names = Field(None, description=NAMES)
    layers_to_transform: Index | list[Index] | None = Field(None, description="numbers of layers, or null")
    layers_pattern: str | Names = Field(None, description="the name of the list of layers, or null")
    megatron_config: None = Field(None, description="null: peft would import the module that megatron_core names")

    def _layer_patterns(self) -> list[tuple[str, str]]:
        """Return (name, regular expression) for each entry of `layers_pattern`, as peft builds the expression."""
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        return [(name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names]

    def patterns(self) -> Iterator[Pattern]:
        """Yield the regular expressions by which peft matches module names."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(text := getattr(self, name), str) and text != ALL_LINEAR:
                yield Pattern(name, text, text)
        for text in self.modules_to_save or ():
            yield Pattern("modules_to_save", text, rf"(^|.*\.){text}($|\..*)", "match")
        for text, regex in self._layer_patterns():
            yield Pattern("layers_pattern", text, regex, "match")
        for name in ("rank_pattern", "alpha_pattern"):
            for text in getattr(self, name, None) or ():
                yield Pattern(name, text, _suffix(text), "match")

    def targets(self, path: str) -> bool:
        """Return True if peft would adapt the module at this path; `all-linear` is not resolved here."""
        if _matches(self.exclude_modules, path) or not _matches(self.target_modules, path):
            return False
        layers = self.layers_to_transform
        is_named = isinstance(self.target_modules, str) or path in (self.target_modules or ())
        if layers is None or layers == [] or is_named:
            return True
        regexes = [regex for _name, regex in self._layer_patterns()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next(filter(None, (re.match(regex, path) for regex in regexes)), None)
        return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)


class LoraAdapterConfig(AdapterConfig):
    """The fields of a LoRA adapter's adapter_config.json."""

    r: Rank | None = Field(None, description="a whole number of at least 1")
    lora_alpha: Alpha | None = Field(None, description="a finite number")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="a number from 0 to below 1")
    rank_pattern: dict[str, Rank] | None = Field(None, description="ranks (from 1) by names of modules, or null")
    alpha_pattern: dict[str, Alpha] | None = Field(None, description="finite numbers by names of modules, or null")
    use_rslora: bool | None = Field(None, description="true or false")
    use_dora: bool | None = Field(None, description="true or false")
    use_qalora: bool | None = Field(None, description="true or false")
    qalora_group_size: Annotated[int, Field(ge=1, le=MOST_NUMBER)] | None = Field(None, description="a whole number")
    lora_bias: bool | None = Field(None, description="true or false")
    fan_in_fan_out: bool | None = Field(None, description="true or false")
    bias: Literal["none", "all", "lora_only"] | None = Field(None, description="none, all or lora_only")
    init_lora_weights: bool | str | None = Field(None, description="true, false or the name of an initialisation")
    target_parameters: Names = Field(None, description="a list of names of parameters, or null")
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = Field(None, description="ids of tokens")
    alora_invocation_tokens: list[Index] | None = Field(None, description="a list of ids of tokens, or null")
    layer_replication: list[list[Annotated[int, Field(ge=0, le=MOST_LAYERS)]]] | None = Field(
        None, description=f"pairs of numbers of layers up to {MOST_LAYERS}, or null"
    )

    def targets(self, path: str) -> bool:
        """Return True if peft would adapt the module at this path, listed as a module or by its weight."""
        return self.targets_weight(path) or super().targets(path)

    def targets_weight(self, path: str) -> bool:
        """Return True if `target_parameters` names the weight of the module at this path, by peft's rules."""
        return _matches(self.target_parameters, f"{path}{WEIGHT}")

    def rank(self, path: str) -> int:
        """Return the rank for the module at this path: as in peft, the first matching pattern decides."""
        return int(_first_match(path, self.rank_pattern, self.r))

    def alpha(self, path: str) -> float:
        """Return the alpha for the module at this path: as in peft, the first matching pattern decides."""
        return float(_first_match(path, self.alpha_pattern, self.lora_alpha))

    def ranks(self) -> list[int]:
        """Return all ranks in the config."""
        return [rank for rank in (self.r, *(self.rank_pattern or {}).values()) if rank is not None]


def _matches(names: str | Names, path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _first_match(path: str, by_pattern: Mapping[str, float] | None, default: float | None) -> float:
    found = (value for text, value in (by_pattern or {}).items() if re.match(_suffix(text), path))
    value = next(found, default)
    return DEFAULT if value is None else value


def _suffix(text: str) -> str:
    """Return the regular expression that peft builds from a name in rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({text})$"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder: its config, and the tensors of its only file."""

    folder: Path
    config: AdapterConfig
    tensors: CheckpointFolder

    def check_patterns(self, names: Sequence[str]) -> None:
        """Raise ModelError if a pattern of the config is invalid or takes too long to match these module names."""
        if reason := problem(list(self.config.patterns()), names):
            raise ModelError(f"{self.folder / CONFIG}: {reason}.")

    def check_types(self, kind: type) -> None:
        """Raise ModelError if a field does not have the type that `kind`, peft's class for this config, declares.

        peft itself would accept 0.5 as true. Null counts as absent, and `alpha` may be a fraction, whatever type peft
        declares.
        """
        own, hints = type(self.config).model_fields, typing.get_type_hints(kind)
        odd = [
            f"{plain(name)} = {shown(value)}: expected {_type_name(hints[name])}"
            for name, value in self.config.model_dump(exclude=set(own)).items()
            if name in hints and value is not None and not _fits(value, float if name == "alpha" else hints[name])
        ]
        if odd:
            raise ModelError(f"{self.folder / CONFIG}: {some(odd, 3)}.")


def _type_name(hint: object) -> str:
    """Return a type as it is written in source code: `int`, `list[str] | None`."""
    return re.sub(r"\b(?:\w+\.)+", "", hint.__name__ if isinstance(hint, type) else str(hint))


def _fits(value: object, hint: type[object]) -> bool:
    """Return True if a value from a JSON file has the type `hint`; numbers must be finite."""
    try:
        TypeAdapter(hint).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except Exception:  # peft's classes check their values too, and may raise anything
        return False
    return True


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return an adapter's config (for LoRA a `LoraAdapterConfig`); raise ModelError if a field has a wrong value."""
    file = folder / CONFIG
    fields = read_object(file)
    is_lora = fields.get("peft_type") == LORA
    try:
        config = (LoraAdapterConfig if is_lora else AdapterConfig).model_validate(fields)
    except ValidationError as error:
        names = dict.fromkeys(str(item["loc"][0]) for item in error.errors(include_url=False))
        problems = []
        for name in names:
            value = f" = {shown(fields[name])}: " if name in fields else ": is missing, "
            problems.append(f"{name}{value}expected {LoraAdapterConfig.model_fields[name].description}")
        raise ModelError(f"{file}: {some(problems, 3)}.") from None
    for name, value in fields.items():
        if not is_lora and isinstance(value, (int, float)) and abs(value) > MOST_NUMBER:
            raise ModelError(f"{file}: {name} = {shown(value)}: expected at most {MOST_NUMBER:,}.")
    return config


def open_adapter(folder: Path) -> AdapterFiles:
    """Open an adapter folder, and check its config against its tensors as far as possible without the base.

    Raises:
        ModelError: the folder has no safetensors adapter, its config is wrong, a tensor is not finite, a LoRA factor
            is stored as integers, or a rank is larger than any tensor.
    """
    file = folder / ADAPTER
    if not file.is_file():
        is_pickled = (folder / "adapter_model.bin").is_file()
        hint = " Pickled adapters are not read: save it again with peft." if is_pickled else ""
        raise ModelError(f"{folder}: holds no {ADAPTER}.{hint}")
    config = read_adapter_config(folder)
    tensors = CheckpointFolder.of_file(file)
    odd = [f"{e.name} ({e.dtype})" for e in tensors.entries.values() if ".lora_" in e.name and e.dtype not in FLOATS]
    if odd:
        raise ModelError(f"{file}: {some(odd)}: expected float32, float16 or bfloat16.")
    if isinstance(config, LoraAdapterConfig):
        largest = max((size for shape in tensors.shapes().values() for size in shape), default=0)
        rank = max(config.ranks(), default=0)
        if rank > max(largest, 1):
            raise ModelError(
                f"{folder / CONFIG}: a rank of {shown(rank)}, and no tensor of {ADAPTER} has more than {largest} rows "
                "or columns. Does the config belong to another adapter?"
            )
    tensors.check_finite()
    return AdapterFiles(folder, config, tensors)
