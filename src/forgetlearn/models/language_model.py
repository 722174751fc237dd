"""A causal language model in memory with its tokenizer: load it, change the dtype of its weights, save it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.models import attention, gguf, onednn
from forgetlearn.models.batches import SMALL_MODEL
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.loading import (
    adapter_base,
    check_finite,
    load_base,
    load_tokenizer,
    own_dtype,
    pick_device,
    refusing,
)
from forgetlearn.models.module_names import own_name
from forgetlearn.runtime import processes, sharding
from forgetlearn.weights.rounding import Array, Survival
from forgetlearn.weights.task_vector import rounded, sample

log = logging.getLogger("forgetlearn")
LINEAR = (nn.Linear, Conv1D)


@dataclass
class LanguageModel:
    """A causal language model, its encoder, and its origin."""

    model: nn.Module
    encoder: Encoder
    name: str
    device: torch.device
    settings: ModelSettings
    dtypes: Mapping[str, torch.dtype]  # of each weight, when loaded and when saved
    in_float32: bool = False  # weights are held in float32 between the stages too, see `_hold_in_fast_dtype`
    _before: dict[str, Array] = field(default_factory=dict)  # a sample of each weight, taken by `to_float32`

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer."""
        return self.encoder.tokenizer

    @property
    def pad_id(self) -> int:
        """The id to pad with: the pad token, or EOS if the model has no embedding for that.

        A pad token that was added only to the tokenizer has no embedding. EOS will do, since masks decide what is
        padding.
        """
        pad, rows = self.tokenizer.pad_token_id, embedding_rows(self.model)
        usable = pad is not None and (rows is None or pad < rows)
        return int(pad if usable else self.tokenizer.eos_token_id)

    def saved_in(self, folder: Path) -> None:
        """Record that the weights in memory were saved in a folder, which becomes the model's name."""
        self.name = str(folder)
        config: PreTrainedConfig = self.model.config
        config.name_or_path = self.name

    def to_device(self) -> None:
        """Move the weights to the device that computes; those of a split model are already there."""
        if not self.is_sharded:
            self.model.to(self.device)

    @property
    def is_sharded(self) -> bool:
        """True if the weights are split over processes."""
        return sharding.is_sharded(self.model)

    def to_float32(self) -> None:
        """Convert every floating-point weight to float32, for training. Buffers keep their dtype.

        Remember a sample of each weight that `to_own_dtypes` will round.

        Raises:
            ModelError: the model is split over processes and was loaded in another dtype.
        """
        if self.is_sharded:
            sharding.check_float32(self.model)
            return
        for path, weight in self.model.named_parameters():
            name = own_name(path)
            is_rounded = self.dtypes.get(name, weight.dtype) != torch.float32
            if weight.is_floating_point() and is_rounded and name not in self._before:
                self._before[name] = sample(weight)
                weight.data = weight.data.float()

    def to_own_dtypes(self, seed: int = 0) -> dict[str, float | int | None] | None:
        """Round every weight to the dtype in which it was loaded, once if it was trained, and convert it to that.

        Return how much of the change since `to_float32` survived rounding, counted on a sample; None if nothing was
        changed or rounded. With `in_float32`, weights are rounded but stay in float32. So they do if the model is split
        over processes, and then nothing is counted.
        """
        if self.is_sharded:
            sharding.round_to(self.model, self.dtypes)
            return None
        survival = Survival()
        is_random = self.settings.rounding == "stochastic"
        for name, weight in self.model.named_parameters():
            own = rounded(weight.data, self.dtypes[name], (seed, name) if is_random else None)
            if name in self._before and weight.dtype != own.dtype:
                before = self._before[name]
                survival.count(before, sample(weight) - before, sample(own))
            weight.data = own.float() if self.in_float32 else own
        self._before.clear()
        return survival.as_dict() if survival.wanted else None

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that `from_pretrained` loads them: safetensors, each weight in its dtype.

        Every process must call this; process 0 writes.
        """
        if self.is_sharded:
            sharding.save_whole(self.model, self.tokenizer, self.dtypes, folder)
        elif processes.is_main():
            saved: PreTrainedModel = self.model
            with self._in_own_dtypes():
                saved.save_pretrained(folder, max_shard_size="5GB")
            self.tokenizer.save_pretrained(folder)

    @contextmanager
    def _in_own_dtypes(self) -> Iterator[None]:
        """Within the `with` block, hold each weight in the dtype in which it was loaded."""
        if not self.in_float32:
            yield
            return
        held = {weight: weight.data for weight in self.model.parameters()}
        try:
            for name, weight in self.model.named_parameters():
                weight.data = weight.data.to(self.dtypes[name])
            yield
        finally:
            for weight, data in held.items():
                weight.data = data

    def name_end_token(self) -> None:
        """Add the token that ends an answer to the model's generation settings, with a warning, if it is missing.

        Plain `generate` stops only at the tokens in these settings, so it would not stop after an answer. `save` writes
        the settings.
        """
        generation: GenerationConfig | None = getattr(self.model, "generation_config", None)
        if generation is None:
            return
        given = generation.eos_token_id
        ends = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        missing = [token for token in self.encoder.end_ids if token not in ends]
        if not missing:
            return
        named = ", ".join(str(self.tokenizer.convert_ids_to_tokens(token)) for token in ends)
        log.warning(
            "%s: its generation settings name %s, and an answer ends with %s (id %d): plain `generate` would run on. "
            "A whole model that is written here names it in generation_config.json; with an adapter pass "
            "eos_token_id=%d",
            *(self.name, named or "no end token", self.tokenizer.convert_ids_to_tokens(missing[0])),
            *(missing[0], missing[0]),
        )
        generation.eos_token_id = [*ends, *missing] if ends else missing[0]

    def describe(self) -> dict[str, str | int]:
        """Return the values that `auto` settings were resolved to, for the manifest."""
        dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()})
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        asked = {"chat": "chat template", "plain": "plain text"}.get(self.encoder.prompt_template)
        return {
            "dtype": ", ".join(dtypes),
            "device": device,
            "asked_in": asked or f"prompt template {self.encoder.prompt_template}",
            "parameters": parameter_count(self.model),
        }


def wrap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelSettings | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Return a LanguageModel made of a model and tokenizer in memory, ready to be scored and updated.

    `dtype` is the checkpoint's dtype, if the model was loaded in another.

    Raises:
        ModelError: a weight is not finite, or the tokenizer has no EOS token, no chat template although one is
            requested, or ids for which the model has no embedding.
    """
    check_finite(model)
    return _wrapped(model, tokenizer, settings or ModelSettings(), dtype)


def _wrapped(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, dtype: torch.dtype | None
) -> LanguageModel:
    """Do what `wrap` does, for weights that were checked when they were loaded."""
    config: PreTrainedConfig = model.config
    rows, highest = embedding_rows(model), max(tokenizer.vocab_size - 1, tokenizer.eos_token_id or 0)
    if rows is not None and highest >= rows:  # training would end in an IndexError
        raise ModelError(
            f"The tokenizer has ids up to {highest}, but the model has embeddings only for 0 to {rows - 1}. "
            "Is this the tokenizer of this model?"
        )
    encoder = Encoder(tokenizer, settings.prompt_template, context_length(config), rows)
    name = settings.base_model_id or getattr(config, "_name_or_path", "") or type(model).__name__
    dtypes = {path: dtype or weight.dtype for path, weight in model.named_parameters()}
    if settings.rounding == "stochastic" and torch.bfloat16 not in dtypes.values():
        raise ConfigError("model.rounding = stochastic: no weight of this model is bfloat16. Leave it out.")
    if settings.rounding == "stochastic" and settings.shard:
        raise ConfigError("model.rounding = stochastic: not available for a model that is split (model.shard).")
    return LanguageModel(model, encoder, settings.name or name, pick_device(settings.device), settings, dtypes)


@torch.inference_mode(False)  # tensors made in inference mode cannot be trained
def load_model(
    settings: ModelSettings | str | Path, *, all_weights: bool = False, may_hold: bool = True
) -> LanguageModel:
    """Load a model and its tokenizer, given settings, a folder, a GGUF file or a hub id; load an adapter on its base.

    `all_weights` says that all weights will be trained; a model split over processes is then loaded in float32.
    `may_hold` allows weights in half precision to be held in float32 where this CPU is much faster in that.

    Raises:
        ModelError: the model does not exist, is not a causal language model, has only pickled weights, or needs remote
            code; or its tokenizer cannot be used.
    """
    if isinstance(settings, (str, Path)):
        settings = ModelSettings(name=str(settings))
    if not settings.name:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    settings = settings.model_copy(update={"name": gguf.resolved(settings.name)})
    adapter = adapter_base(settings)
    name, as_loaded, dtype = str(settings.name), settings, None
    if settings.shard and all_weights:
        dtype = own_dtype(settings, adapter or name)
        as_loaded = settings.model_copy(update={"dtype": "float32"})
    if adapter is None:
        model, tokenizer = load_base(as_loaded, name), load_tokenizer(settings, name)
    else:
        model, tokenizer = _load_adapter(as_loaded, Path(name), adapter)
    with refusing(name, "model and tokenizer cannot be used together"):
        loaded = _wrapped(model, tokenizer, settings, dtype)
    loaded.to_device()
    if not loaded.is_sharded:
        with refusing(name, "the model cannot compute"), torch.no_grad():
            # Some wrong configs build a model that fails only when it computes.
            loaded.model(input_ids=torch.tensor([loaded.encoder.end_ids[:1]], device=loaded.device), use_cache=True)
    if may_hold:
        _hold_in_fast_dtype(loaded)
    return loaded


def _hold_in_fast_dtype(lm: LanguageModel) -> None:
    """Hold weights in float32 if they are in half precision and this CPU has no instructions for that.

    They are saved in their own dtypes all the same.
    """
    kinds, parameters = {weight.dtype for weight in lm.model.parameters()}, parameter_count(lm.model)
    slow = slow_dtypes(kinds, lm.device.type, parameters)
    if not slow or lm.is_sharded or getattr(lm.model.config, "quantization_config", None):
        return
    dtype = str(slow[0]).removeprefix("torch.")
    lacks = f"this CPU has no instructions for {dtype}"
    if not may_hold_float32(lm.settings, parameters):
        log.warning("%s, which makes it slow; model.dtype = float32 is faster, in twice the memory", lacks)
        return
    log.info("%s: the model computes in float32, and is saved in %s", lacks, dtype)
    for weight in lm.model.parameters():
        if weight.dtype in slow:
            weight.data = weight.data.float()
    lm.in_float32 = True


def slow_dtypes(dtypes: Iterable[torch.dtype], device: str, parameters: int) -> list[torch.dtype]:
    """Return those dtypes that this CPU has no instructions for; none on other devices, and for small models."""
    if device != "cpu" or parameters < SMALL_MODEL:
        return []
    return [dtype for dtype in dtypes if not onednn.has_instructions_for(dtype)]


def may_hold_float32(settings: ModelSettings, parameters: int) -> bool:
    """Return True if the user left the dtype to us, and float32 would fill at most a quarter of this machine's memory.

    A quarter, because some commands hold two copies. All of the memory counts, whatever is free now: a resumed run must
    compute the same bits.
    """
    fits = 4 * parameters <= psutil.virtual_memory().total / 4
    return settings.dtype == "auto" and settings.quantization == "none" and not settings.shard and fits


def _load_adapter(settings: ModelSettings, folder: Path, base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapter on its base, with the tokenizer in its folder or, if there is none, the base's."""
    from forgetlearn.models import lora

    try:
        model = load_base(settings, base)
    except ModelError as error:
        raise ModelError(f"{folder} is an adapter, and its base cannot be used. {error}") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(settings, str(folder) if has_tokenizer else base)
    return lora.load(model, folder, lora.PRODUCT), tokenizer


def as_language_model(
    model: LanguageModel | nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: ModelSettings | None = None,
    *,
    all_weights: bool = False,
) -> LanguageModel:
    """Return a LanguageModel for a model in memory (with its tokenizer), a folder or a hub id."""
    settings = settings or ModelSettings()
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, (str, Path)):
        return load_model(settings.model_copy(update={"name": str(model)}), all_weights=all_weights)
    if tokenizer is None:
        raise ModelError("A model in memory needs its tokenizer: pass tokenizer=...")
    return wrap(model, tokenizer, settings)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the model's maximum length in tokens; None if its config does not state it."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def embedding_rows(model: nn.Module) -> int | None:
    """Return the number of token ids that have embeddings; None if the model does not expose its embeddings."""
    weight = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def width(model: nn.Module) -> int:
    """Return how many numbers stand for a token between the model's layers."""
    inner = attention.plain(model)
    found = getattr(inner.config.get_text_config(), "hidden_size", None)
    return found if isinstance(found, int) else int(inner.get_input_embeddings().weight.shape[1])


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the ModuleList that holds the most weights, and its path; both are empty if there is none.

    It need not be the longest list: a model with 24 layers may have 64 experts in each.
    """
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda item: parameter_count(item[1]), default=("", nn.ModuleList()))


def editable_module(model: nn.Module) -> str:
    """Return the path of the module that LocFT-BF found best for editing facts, from the model's structure alone.

    It is the MLP's last projection in layer int(0.7 n) of n: among the linear modules whose output is as wide as the
    model, the one with the most inputs. For Llama-3-8B that is `down_proj` in layer 22 of 32.

    Raises:
        ModelError: the model has no list of layers, or that layer has no such module.
    """
    path, stack = layer_list(model)
    index = int(0.7 * len(stack))
    n_wanted = width(model)
    found = []
    for name, module in stack[index].named_modules() if len(stack) else ():
        if isinstance(module, LINEAR):
            n_in, n_out = linear_shape(module)
            if n_out == n_wanted:
                found.append((n_in, f"{path}.{index}.{name}"))
    if not found:
        raise ModelError("No module that maps to the model's width was found in its layers: locft cannot choose one.")
    return max(found)[1]


def linear_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of a linear module. GPT-2's Conv1D stores the transposed matrix."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights; tied weights count once."""
    return sum(weight.numel() for weight in model.parameters())
