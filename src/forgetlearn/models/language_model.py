"""Models and tokenizers: load with a clear word about what is wrong, save so that plain tools load them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ForgetLearnError, ModelError, check_installed, plain, shown, some
from forgetlearn.models import hub
from forgetlearn.models.encoding import Encoder
from forgetlearn.runtime import processes, sharding
from forgetlearn.weights import adapter_files
from forgetlearn.weights.adapter_files import MOST_LAYERS
from forgetlearn.weights.checkpoint_folder import FLOATS, INDEX, WHOLE, CheckpointFolder, read_object, weight_files
from forgetlearn.weights.rounding import Array, Survival
from forgetlearn.weights.task_vector import is_finite, rounded, sample

MOST_COUNTED = 100_000  # of anything (labels, experts) that a config counts
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
log = logging.getLogger("forgetlearn")


@dataclass
class LanguageModel:
    """A causal language model, the encoder that asks it, and where it came from."""

    model: nn.Module
    encoder: Encoder
    name: str
    device: torch.device
    settings: ModelSettings
    dtypes: Mapping[str, torch.dtype]  # of each weight, as it was loaded and as it will be saved
    _before: dict[str, Array] = field(default_factory=dict)  # some numbers of each weight that is in float32 for now

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the encoder."""
        return self.encoder.tokenizer

    @property
    def pad_id(self) -> int:
        """An id for padding; padding is told by the mask, never by this id, so EOS will do.

        A pad token that was added to the tokenizer only has no row among the embeddings.
        """
        pad, rows = self.tokenizer.pad_token_id, embedding_rows(self.model)
        usable = pad is not None and (rows is None or pad < rows)
        return int(pad if usable else self.tokenizer.eos_token_id)

    def now_in(self, folder: Path) -> None:
        """Record that the weights in memory were saved in a folder, which becomes the model's name."""
        self.name = str(folder)
        config: Any = self.model.config
        config.name_or_path = self.name

    def to_device(self) -> None:
        """Move the weights to where the computing is done; parts of a split model are there."""
        if not self.is_sharded:
            self.model.to(self.device)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are split over processes."""
        return sharding.is_sharded(self.model)

    def to_float32(self) -> None:
        """Every floating-point weight in float32, for training. Buffers stay: rotary frequencies have a dtype.

        Raises:
            ModelError: the model is split over processes, and was loaded in another dtype.
        """
        if self.is_sharded:
            sharding.check_float32(self.model)
            return
        for name, weight in self.model.named_parameters():
            if weight.is_floating_point() and weight.dtype != torch.float32:
                self._before[name] = sample(weight)
                weight.data = weight.data.float()

    def to_own_dtypes(self, seed: int = 0) -> dict[str, float | int | None] | None:
        """Every weight in the dtype that it was loaded in, rounded once if it was trained.

        What comes back says what that left of the change since `to_float32`, counted on a sample; None where nothing
        had changed or been rounded. Where the model is split over processes, the weights are rounded and stay in
        float32, and it is not counted.
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
                survival.look(before, sample(weight) - before, sample(own))
            weight.data = own
        self._before.clear()
        return survival.as_dict() if survival.wanted else None

    def save(self, folder: Path) -> None:
        """Write model and tokenizer, as `save_model`. Every process calls it; process 0 writes."""
        if self.is_sharded:
            sharding.save_whole(self.model, self.tokenizer, self.dtypes, folder)
        elif processes.is_main():
            save_model(self.model, self.tokenizer, folder)

    def name_end_token(self) -> None:
        """Add the token that ends an answer to the model's generation settings, with a warning, if it is missing.

        Plain `generate` stops only at these tokens, and would not stop after an answer. `save` writes them.
        """
        generation: Any = getattr(self.model, "generation_config", None)
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

    def describe(self) -> dict[str, Any]:
        """What `auto` in the settings came to, for the manifest."""
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
    model: nn.Module, tokenizer: Any, settings: ModelSettings | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A model and tokenizer that are in memory, ready to be asked and updated.

    `dtype` is that of its checkpoint, where it was loaded in another.

    Raises:
        ModelError: a weight is not finite, or the tokenizer has no EOS token, no chat template where one is asked for,
            or ids that the model has no embedding for.
    """
    check_finite(model)
    return _wrapped(model, tokenizer, settings, dtype)


def _wrapped(
    model: nn.Module, tokenizer: Any, settings: ModelSettings | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Do what `wrap` does, for weights that were checked when they were loaded."""
    settings = settings or ModelSettings()
    config: Any = model.config
    _check_vocabulary(model, tokenizer)
    encoder = Encoder(tokenizer, settings.prompt_template, context_length(config), embedding_rows(model))
    name = settings.base_model_id or getattr(config, "_name_or_path", "") or type(model).__name__
    dtypes = {path: dtype or weight.dtype for path, weight in model.named_parameters()}
    if settings.rounding == "stochastic":
        _check_stochastic(settings, dtypes)
    return LanguageModel(model, encoder, settings.name or name, pick_device(settings.device), settings, dtypes)


def _check_stochastic(settings: ModelSettings, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ConfigError unless the weights can be rounded stochastically when they are stored."""
    if torch.bfloat16 not in dtypes.values():
        raise ConfigError("model.rounding = stochastic: no weight of this model is bfloat16. Leave it out.")
    if settings.shard:
        raise ConfigError("model.rounding = stochastic: a model that is split over processes (model.shard) has none.")


@torch.inference_mode(False)  # of tensors made in that mode none can be trained
def load_model(settings: ModelSettings | str | Path, *, all_weights: bool = False) -> LanguageModel:
    """The model and tokenizer of a folder or hub id, or that settings name; an adapter is loaded on its base.

    `all_weights` says that they will be trained: a model that is split over processes is then in float32.

    Raises:
        ModelError: it does not exist, is no causal language model, has only pickled weights, needs remote
            code, or its tokenizer cannot be used.
    """
    if isinstance(settings, (str, Path)):
        settings = ModelSettings(name=str(settings))
    if not settings.name:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    adapter = adapter_base(settings)
    name, as_loaded, own_dtype = settings.name, settings, None
    if settings.shard and all_weights:
        own_dtype = _own_dtype(settings, adapter or name)
        as_loaded = settings.model_copy(update={"dtype": "float32"})
    if adapter is None:
        model = _load_base(as_loaded, name)
        tokenizer = _load_tokenizer(settings, name)
    else:
        model, tokenizer = _load_adapter(as_loaded, Path(name), adapter)
    with _refusing(name, "model and tokenizer cannot be used together"):
        loaded = _wrapped(model, tokenizer, settings, own_dtype)
    loaded.to_device()
    if not loaded.is_sharded:
        with _refusing(name, "the model cannot compute"):
            _try(loaded)
    return loaded


def _try(lm: LanguageModel) -> None:
    """Run one token through the model: some wrong configs build a model that fails only when it computes."""
    token = torch.tensor([lm.encoder.end_ids[:1]], device=lm.device)
    with torch.no_grad():
        lm.model(input_ids=token, use_cache=True)


def load_weights(settings: ModelSettings) -> nn.Module:
    """Return the model that settings name, in its stored dtypes, without its tokenizer.

    Raises:
        ModelError: see `load_model`.
    """
    model: nn.Module = _load_base(settings.model_copy(update={"dtype": "auto"}), str(settings.name))
    return model


def as_language_model(
    model: LanguageModel | nn.Module | str | Path,
    tokenizer: Any = None,
    settings: ModelSettings | None = None,
    *,
    all_weights: bool = False,
) -> LanguageModel:
    """A model that is passed in (with its tokenizer) or named (folder, hub id), ready to be used; see `load_model`.

    Raises:
        ModelError: see `load_model`; or a model in memory comes without a tokenizer.
    """
    settings = settings or ModelSettings()
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, (str, Path)):
        return load_model(settings.model_copy(update={"name": str(model)}), all_weights=all_weights)
    if tokenizer is None:
        raise ModelError("A model in memory needs its tokenizer: pass tokenizer=...")
    return wrap(model, tokenizer, settings)


def context_length(config: Any) -> int | None:
    """Longest text in tokens that the model was made for; None where its config does not say."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def pick_device(wanted: str) -> torch.device:
    """The device to compute on; auto takes an accelerator where there is one.

    Raises:
        ConfigError: the device is not there.
    """
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[wanted]:
        raise ConfigError(f"model.device = {wanted}: there is no such device here. Use auto or cpu.")
    return torch.device(wanted)


def embedding_rows(model: nn.Module) -> int | None:
    """Number of token ids that the model knows; None for a model that does not tell."""
    find: Any = getattr(model, "get_input_embeddings", None)
    weight: Any = getattr(find() if find else None, "weight", None)
    return None if weight is None else int(weight.shape[0])


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer so that `from_pretrained` loads them: safetensors, each weight in its dtype."""
    saved: Any = model
    saved.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and layers of the list of modules that holds the most weights; an empty one where there is no list.

    Not the longest one: a model with 24 layers may have 64 experts in each.
    """
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda item: parameter_count(item[1]), default=("", nn.ModuleList()))


def editable_module(model: nn.Module) -> str:
    """The path of the module that holds facts best by LocFT-BF's finding, told from the model's structure alone.

    The MLP's last projection, seven tenths of the way up: in the list of layers, at index
    int(0.7 n), the linear module with the most inputs among those whose output has the width of the
    model. For Llama-3-8B that is layer 22 of 32, `down_proj`.

    Raises:
        ModelError: the model has no list of layers, or no such module in it.
    """
    path, stack = layer_list(model)
    index = int(0.7 * len(stack))
    config: Any = model.config
    width = config.get_text_config().hidden_size
    found = []
    for name, module in stack[index].named_modules() if len(stack) else ():
        if isinstance(module, (nn.Linear, Conv1D)):
            rows, columns = module.weight.shape
            n_in, n_out = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            if n_out == width:
                found.append((n_in, f"{path}.{index}.{name}"))
    if not found:
        raise ModelError("No module that maps to the model's width was found in its layers: locft cannot choose one.")
    return max(found)[1]


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


def adapter_base(settings: ModelSettings) -> str | None:
    """The base of an adapter folder; None where the name is not one."""
    folder = Path(str(settings.name))
    if not (folder / adapter_files.CONFIG).is_file():
        return None
    base = adapter_files.read_adapter_config(folder).base_model_name_or_path
    if not base:
        file = folder / adapter_files.CONFIG
        raise ModelError(f"{file}: names no base_model_name_or_path. Write the base's folder or hub id there.")
    return base


def _load_adapter(settings: ModelSettings, folder: Path, base: str) -> tuple[Any, Any]:
    """An adapter on its base, and the tokenizer beside it or, where there is none, that of the base."""
    from forgetlearn.models import lora

    try:
        model = _load_base(settings, base)
    except ModelError as error:
        raise ModelError(f"{folder} is an adapter, and its base cannot be used. {error}") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = _load_tokenizer(settings, str(folder) if has_tokenizer else base)
    return lora.load(model, folder, lora.PRODUCT), tokenizer


def read_outline(settings: ModelSettings) -> tuple[Any, Any, list[str]]:
    """Config and tokenizer of a model, without its weights; instead of a tokenizer that cannot be had, a note.

    Raises:
        ModelError: as `load_model`; or it is an adapter.
    """
    if not settings.name:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    if adapter_base(settings) is not None:
        raise ModelError(f"{settings.name}: is an adapter. Give the whole model that is to be updated.")
    config = _read_config(settings, settings.name)
    try:
        return config, _load_tokenizer(settings, settings.name), []
    except ModelError as error:
        return config, None, [str(error)]


def _load_base(settings: ModelSettings, name: str) -> Any:
    _check_folder(name)
    # Otherwise transformers asks a service on the hub to convert pickles, and sends it the user's token.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    options = _source_options(settings, name)
    split = sharding.loading_options() if settings.shard else {}
    quantized = _in_four_bits(settings) if settings.quantization == "4bit" else {}
    config = _read_config(settings, name)
    stored = CheckpointFolder(name, any_dtype=True) if Path(name).is_dir() else None
    with _refusing(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=settings.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told by _check_loaded, with the tensor and its shapes
            output_loading_info=True,
            **split,
            **quantized,
            **options,
        )
    _check_loaded(name, info)
    stored = stored or _stored_from_hub(name, config)
    if stored is not None:
        _check_dtypes(stored, model, info["unexpected_keys"])
        if quantized:  # what is packed shows no NaN
            stored.check_finite()
    check_finite(model, stored)
    if quantized:
        # On such CPUs bitsandbytes packs the weights anew at the first forward pass of scoring, and gradients through
        # packed weights are wrong (0.50.2: cosine -0.05 with the right ones, 0.998 without).
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if settings.shard:
        sharding.check_sharded(model)
    return model


def _in_four_bits(settings: ModelSettings) -> dict[str, Any]:
    """How transformers loads a base in 4 bits, as QLoRA has it: NF4, the scales quantised too.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    check_installed("bitsandbytes", "model.quantization = 4bit", "qlora")
    device = pick_device(settings.device)
    computed = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _source_options(settings: ModelSettings, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if Path(name).is_dir():
        return options
    return {**options, "revision": settings.revision, "local_files_only": not hub.answers()}


@contextmanager
def _refusing(name: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever transformers or a tokenizer raises about the files into a ModelError that names the folder."""
    try:
        yield
    except (ForgetLearnError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(_loading_problem(name, error, what)) from error


def _read_config(settings: ModelSettings, name: str) -> Any:
    """Return the config of a causal language model.

    Raises:
        ModelError: it is the config of another kind of model, is unreadable, or has an absurd number of layers.
    """
    _check_folder(name)
    with _refusing(name):
        config = AutoConfig.from_pretrained(name, **_source_options(settings, name))
        _check_causal(name, config, settings)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and not 0 <= layers <= MOST_LAYERS:  # making them would take minutes
        raise ModelError(f"{name}: config.json: num_hidden_layers = {shown(layers)}: expected 0 to {MOST_LAYERS}.")
    return config


def _own_dtype(settings: ModelSettings, name: str) -> torch.dtype:
    """The dtype that a model would be loaded in; float32 where its config does not say."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    config = _read_config(settings, name)
    return getattr(config.get_text_config(), "dtype", None) or torch.float32


def _check_loaded(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that would stay random; say which ones of the files the product will not hold."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ModelError(f"{name}: {len(missing)} tensors are not in its files, the first is {missing[0]}.")
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise ModelError(
            f"{name}: {len(mismatched)} tensors have another shape in its files than its config says, "
            f"the first is {key}: {tuple(stored)}, expected {tuple(wanted)}."
        )
    if unexpected:
        log.warning(
            "%s: %d tensors of its files have no place in the model (transformers leaves them out), so the "
            "product will not hold them; the first is %s",
            name,
            len(unexpected),
            unexpected[0],
        )


def _stored_from_hub(name: str, config: Any) -> CheckpointFolder | None:
    """Return the files of a model that was just loaded from the hub's cache; None if they are not found."""
    found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    folder = Path(found).parent if isinstance(found, str) else None
    if folder is None or not any((folder / file).is_file() for file in (WHOLE, INDEX)):
        return None
    return CheckpointFolder(folder, any_dtype=True)


def _check_dtypes(stored: CheckpointFolder, model: nn.Module, unused: Iterable[str]) -> None:
    """Raise ModelError if weights are stored as integers or in 8 bits without a quantization_config.

    transformers would read 8-bit numbers as the weights themselves, without their scales. Buffers (masks, counts) may
    be integers, and tensors that the model does not use may have any dtype.
    """
    if getattr(model.config, "quantization_config", None):
        return
    prefix = getattr(model, "base_model_prefix", "")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {name for name, _buffer in model.named_buffers()}
    odd = [
        entry
        for entry in stored.entries.values()
        if entry.dtype not in FLOATS
        and not buffers & {entry.name, f"{prefix}.{entry.name}"}
        and entry.name not in unused
        and not any(re.search(pattern, entry.name) for pattern in ignored)
    ]
    if odd:
        raise ModelError(
            f"{stored.folder / odd[0].file}: {len(odd)} weights are stored in none of float32, float16 and "
            f"bfloat16: {some([f'{entry.name} ({entry.dtype})' for entry in odd])}. config.json has no "
            "quantization_config that says how to read them. Take the checkpoint that this one was made from."
        )


def check_finite(model: nn.Module, stored: CheckpointFolder | None = None) -> None:
    """Raise ModelError if a weight contains NaN or infinity; `stored` gives its file. Takes 0.2 s per GB.

    Buffers are not checked: masks contain -inf by design.
    """
    odd = [name for name, weight in model.named_parameters() if not is_finite(sharding.local(weight))]
    if odd:
        entry = stored.entries.get(odd[0]) if stored else None
        where = f"{stored.folder / entry.file}: " if stored and entry else ""
        raise ModelError(
            f"{where}{len(odd)} weights hold numbers that are not finite (NaN or inf): {some(odd)}. "
            "Did the training diverge, or is the file damaged?"
        )


def _load_tokenizer(settings: ModelSettings, name: str) -> Any:
    """Load the tokenizer of a folder or hub id, and try it on a text.

    Raises:
        ModelError: there is none, or its files hold what tokenizers cannot use.
    """
    folder = Path(name)
    for file in filter(Path.is_file, (folder / file for file in TOKENIZER_FILES)):
        _check_tokenizer_file(file)
    try:
        with _refusing(name, "its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, **_source_options(settings, name))
            tokenizer.decode(tokenizer("a text", add_special_tokens=True)["input_ids"])
    except ModelError as error:
        if "instantiate the backend tokenizer" in str(error.__cause__):
            raise ModelError(f"{name}: has no tokenizer. Save it there with tokenizer.save_pretrained.") from error
        raise
    return tokenizer


def _check_tokenizer_file(file: Path) -> None:
    told = read_object(file)
    length = told.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float)) or not length > 0):
        raise ModelError(f"{file}: model_max_length = {shown(length)}: expected a number of tokens, or null.")


def _check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for: training would end in an IndexError."""
    rows = embedding_rows(model)
    highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id or 0)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"The tokenizer has ids up to {highest}, the model embeddings for 0 to {rows - 1}. "
            "Is it the tokenizer of this model?"
        )


def _check_folder(name: str) -> None:
    """Refuse a folder that cannot be a model before the hub is asked for something of that name."""
    folder = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name
    if not folder.exists():
        if looks_like_path:
            near = hub.near_models(folder)
            raise ModelError(f"{name}: there is no such folder. Give the folder of a saved model, or a hub id.{near}")
        return
    if not folder.is_dir():
        raise ModelError(f"{name}: is a file. Give the folder of a saved model, or a hub id.")
    files = [path.name for path in folder.iterdir()]
    if "config.json" not in files:
        products = [f"{name}/{product}" for product in ("adapter", "model") if product in files]
        hint = f" Did you mean {products[0]}?" if products else " Give the folder that save_pretrained wrote."
        raise ModelError(f"{name}: has no config.json, so it is no saved model.{hint}")
    if not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in files if file.endswith(PICKLES)]
        found = "no weights"
        if pickles:
            found = f"only pickled weights ({pickles[0]}), which can run code when they are read"
        raise ModelError(f"{name}: has {found}. Save it with save_pretrained, which writes safetensors.")
    _check_counts(folder / "config.json", read_object(folder / "config.json"))
    if "generation_config.json" in files:
        read_object(folder / "generation_config.json")
    if INDEX in files:
        weight_files(folder)  # an index may name only files of the folder


def _check_counts(file: Path, told: Mapping[str, Any]) -> None:
    """Raise ModelError if a number in config.json is NaN or a count absurd: transformers would build so many layers."""
    text = told.get("text_config")
    for name, value in [*told.items(), *(text.items() if isinstance(text, dict) else ())]:
        if value != value:
            raise ModelError(f"{file}: {plain(name)} = NaN: expected a number.")
        if name.startswith("num_") and isinstance(value, (int, float)) and value > MOST_COUNTED:
            raise ModelError(f"{file}: {plain(name)} = {shown(value)}: expected at most {MOST_COUNTED:,}.")


def _check_causal(name: str, config: Any, settings: ModelSettings) -> None:
    named = list(config.architectures or [])
    known: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([value] if isinstance(value, str) else value)
    if named and not known.intersection(named) and not settings.trust_remote_code:
        remote = ". It brings its own code: pass --set model.trust_remote_code=true if you trust it"
        hint = remote if getattr(config, "auto_map", None) else ", which is no causal language model"
        raise ModelError(f"{name}: its architecture is {named[0]}{hint}.")


def _loading_problem(name: str, error: Exception, what: str = "cannot be loaded") -> str:
    text = str(error)
    if reason := hub.problem(error, name):
        return f"{name}: {reason}"
    if "trust_remote_code" in text:
        return (
            f"{name}: it needs Python code from its repository. "
            "If you trust that code, pass --set model.trust_remote_code=true."
        )
    if "Unrecognized configuration class" in text:
        return f"{name}: is no causal language model."
    if "model_type" in text and "Unrecognized model" in text:
        return f"{name}: has no config.json that names a model_type, so it is no saved model (is it an adapter?)."
    if "safetensors" in text and ("does not appear" in text or "not found" in text or "no file named" in text):
        return (
            f"{name}: has no safetensors weights. Pickled weights can run code when they are read; convert them first."
        )
    return f"{name}: {what}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """Return the first line of a library's error, with the name of its type if the text alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if lines and isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__} "
    return plain((kind + (lines[0] if lines else "")).strip()[:300])
