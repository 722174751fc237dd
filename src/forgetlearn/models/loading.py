"""Load a model's config, weights and tokenizer from a folder, a GGUF file or the hub, with clear errors."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ForgetLearnError, ModelError, check_installed, plain, shown, some
from forgetlearn.models import gguf, hub
from forgetlearn.runtime import sharding
from forgetlearn.weights.adapter_files import CONFIG, MOST_LAYERS, read_adapter_config
from forgetlearn.weights.checkpoint_folder import FLOATS, INDEX, WHOLE, CheckpointFolder, read_object, weight_files
from forgetlearn.weights.task_vector import is_finite

MOST_COUNTED = 100_000  # the most labels, experts or other things that a config may count
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TRUSTING = "--set model.trust_remote_code=true (to chat and serve --trust-remote-code)"
log = logging.getLogger("forgetlearn")


def pick_device(wanted: str) -> torch.device:
    """Return the device to compute on; raise ConfigError if it is not available. `auto` prefers an accelerator."""
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        raise ConfigError(f"model.device = {wanted}: this machine has no such device. Use auto or cpu.")
    return torch.device(wanted)


def adapter_base(settings: ModelSettings) -> str | None:
    """Return the base of an adapter folder; None if `settings.name` is not an adapter folder."""
    if settings.name is None:
        return None
    folder = Path(settings.name)
    if not (folder / CONFIG).is_file():
        return None
    base = read_adapter_config(folder).base_model_name_or_path
    if not base:
        raise ModelError(f"{folder / CONFIG}: names no base_model_name_or_path. Set it to the base's folder or hub id.")
    return base


def read_outline(settings: ModelSettings) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None, list[str]]:
    """Return a model's config, its tokenizer, and notes.

    If the tokenizer cannot be loaded, it is None, and a note says why.
    """
    if not settings.name:
        raise ConfigError("model.name is not set. Give --model with a folder or a hub id.")
    config = read_config(settings, settings.name)
    try:
        return config, load_tokenizer(settings, settings.name), []
    except ModelError as error:
        return config, None, [str(error)]


def read_config(settings: ModelSettings, name: str) -> PreTrainedConfig:
    """Return the config of a causal language model; raise ModelError if it is of another kind or has absurd values."""
    _check_folder(name)
    file = gguf.file_of(name)
    with refusing(name), _source(settings, name) as (source, options):
        config = AutoConfig.from_pretrained(source, **options)
        config.name_or_path = name
        if file is not None:
            config.dtype = gguf.read_header(file).dtype  # a GGUF file states none
        _check_causal(name, config, settings)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and not 0 <= layers <= MOST_LAYERS:  # building them would take minutes
        raise ModelError(f"{name}: config.json: num_hidden_layers = {shown(layers)}: expected 0 to {MOST_LAYERS}.")
    return config


def load_base(settings: ModelSettings, name: str) -> PreTrainedModel:
    """Load a causal language model and check all of its weights; for errors see `language_model.load_model`."""
    if (file := gguf.file_of(name)) is not None:
        return _load_gguf(settings, file)
    _check_folder(name)
    # Otherwise transformers asks a service on the hub to convert pickles, and sends it the user's token.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    split = sharding.loading_options() if settings.shard else {}
    quantized = _in_four_bits(settings) if settings.quantization == "4bit" else {}
    config = read_config(settings, name)
    stored = CheckpointFolder(name, any_dtype=True) if Path(name).is_dir() else None
    with refusing(name), _source(settings, name) as (source, options):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=settings.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported by _check_loaded, with the tensor and its shapes
            output_loading_info=True,
            **split,
            **quantized,
            **options,
        )
    _check_loaded(name, info)
    stored = stored or _stored_from_hub(name, config)
    if stored is not None:
        _check_dtypes(stored, model, info["unexpected_keys"])
        if quantized:  # packed weights hide NaN
            stored.check_finite()
    check_finite(model, stored)
    if quantized:
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first forward pass of scoring, and gradients
        # through repacked weights are wrong (0.50.2: cosine with the correct ones -0.05; without repacking, 0.998).
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if settings.shard:
        sharding.check_sharded(model)
    return model


def _load_gguf(settings: ModelSettings, file: Path) -> PreTrainedModel:
    """Load a model from a GGUF file, unpacked, so that it can be trained and saved like any other."""
    gguf.check_settings(settings)
    name = str(file)
    config = read_config(settings, name)
    # transformers shows a bar while it unpacks, whatever its settings.
    with refusing(name), _source(settings, name) as (source, options), gguf.one_table(), redirect_stderr(io.StringIO()):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=settings.dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        model.config.name_or_path = name
        info["unexpected_keys"] = {*info["unexpected_keys"], *gguf.unused_tensors(gguf.read_header(file), model)}
    _check_loaded(name, info)
    check_finite(model)
    return model


def load_tokenizer(settings: ModelSettings, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id, and try it on a text."""
    for file in filter(Path.is_file, (Path(name) / file for file in TOKENIZER_FILES)):
        length = read_object(file).get("model_max_length")
        if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float)) or not length > 0):
            raise ModelError(f"{file}: model_max_length = {shown(length)}: expected a number of tokens, or null.")
    try:
        what = "its tokenizer cannot be loaded"
        with refusing(name, what), _source(settings, name) as (source, options):
            # AutoTokenizer would read the whole of a GGUF file for its config.
            kind = PreTrainedTokenizerFast if "gguf_file" in options else AutoTokenizer
            tokenizer = kind.from_pretrained(source, **options)
            tokenizer.decode(tokenizer("a text", add_special_tokens=True)["input_ids"])
    except ModelError as error:
        if "instantiate the backend tokenizer" in str(error.__cause__):
            raise ModelError(f"{name}: has no tokenizer. Save it there with tokenizer.save_pretrained.") from error
        raise
    return tokenizer


def own_dtype(settings: ModelSettings, name: str) -> torch.dtype:
    """Return the dtype in which a model would be loaded; float32 if its config states none."""
    asked = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    found: torch.dtype | None = asked or getattr(read_config(settings, name).get_text_config(), "dtype", None)
    return found or torch.float32


@contextmanager
def refusing(name: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever transformers or a tokenizer raises about the files into a ModelError that names the folder."""
    try:
        yield
    except (ForgetLearnError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{name}: {_loading_problem(name, error, what)}") from error


def _loading_problem(name: str, error: Exception, what: str) -> str:
    if reason := hub.problem(error, name):
        return reason
    text = str(error)
    if "trust_remote_code" in text:
        return f"it needs Python code from its repository. If you trust that code, pass {TRUSTING}."
    if "GGUF model with architecture" in text:
        return f"{plain(text[:200])} transformers does not read it. Take the safetensors that this file was made from."
    if "Unrecognized configuration class" in text:
        return "is not a causal language model."
    if "model_type" in text and "Unrecognized model" in text:
        return "has no config.json that names a model_type, so it is not a saved model (is it an adapter?)."
    if "safetensors" in text and ("does not appear" in text or "not found" in text or "no file named" in text):
        return "has no safetensors weights. Pickled weights can run code when they are read; convert them first."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Add the type's name if the text alone says little.
    kind = "" if lines and isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__} "
    return f"{what}: {plain((kind + (lines[0] if lines else '')).strip()[:300])}"


def _in_four_bits(settings: ModelSettings) -> dict[str, object]:
    """Return options that load a base in 4 bits as in QLoRA: NF4, with quantised scales."""
    check_installed("bitsandbytes", "model.quantization = 4bit", "qlora")
    device = pick_device(settings.device)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


@contextmanager
def _source(settings: ModelSettings, name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the first argument and the options of `from_pretrained` that say where a model is."""
    options: dict[str, object] = {"trust_remote_code": settings.trust_remote_code}
    if (file := gguf.file_of(name)) is not None:
        with gguf.alone(file) as folder:
            yield folder, {"gguf_file": gguf.LINK}
    elif Path(name).is_dir():
        yield name, options
    else:
        yield name, {**options, "revision": settings.revision, "local_files_only": not hub.is_reachable()}


def _check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that are not in the files; warn of weights in the files that the product lacks."""
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
            "%s: %d tensors in its files do not belong to the model (transformers ignores them), so the "
            "product will not contain them; the first is %s",
            *(name, len(unexpected), unexpected[0]),
        )


def _stored_from_hub(name: str, config: PreTrainedConfig) -> CheckpointFolder | None:
    """Return the files of a model that was just loaded from the hub's cache; None if they are not found."""
    found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    folder = Path(found).parent if isinstance(found, str) else None
    if folder is None or not any((folder / file).is_file() for file in (WHOLE, INDEX)):
        return None
    return CheckpointFolder(folder, any_dtype=True)


def _check_dtypes(stored: CheckpointFolder, model: PreTrainedModel, unused: Iterable[str]) -> None:
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


def _check_folder(name: str) -> None:
    """Raise ModelError if `name` is a path without a usable model, before the hub is asked for that name."""
    folder = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name
    if (file := gguf.file_of(name)) is not None:
        _check_counts(file, gguf.read_header(file).metadata)
        return
    if not folder.exists():
        if looks_like_path or folder.suffix == gguf.SUFFIX:
            near = hub.near_models(folder)
            raise ModelError(f"{name}: does not exist. Give the folder of a saved model, or a hub id.{near}")
        return
    if not folder.is_dir():
        raise ModelError(f"{name}: is neither a folder nor a file. Give the folder of a saved model, or a hub id.")
    files = [path.name for path in folder.iterdir()]
    if "config.json" not in files:
        products = [f"{name}/{product}" for product in ("adapter", "model") if product in files]
        hint = f" Did you mean {products[0]}?" if products else " Give the folder that save_pretrained wrote."
        raise ModelError(f"{name}: has no config.json, so it is not a saved model.{hint}")
    if not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in files if file.endswith(PICKLES)]
        found = (
            f"only pickled weights ({pickles[0]}), which can run code when they are read" if pickles else "no weights"
        )
        raise ModelError(f"{name}: has {found}. Save it with save_pretrained, which writes safetensors.")
    config = read_object(folder / "config.json")
    text = config.get("text_config")
    _check_counts(folder / "config.json", config | (text if isinstance(text, dict) else {}))
    if "generation_config.json" in files:
        read_object(folder / "generation_config.json")
    if INDEX in files:
        weight_files(folder)  # an index may name only files of the folder


def _check_counts(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError if a config has NaN or an absurd count: transformers would build that many modules."""
    for name, value in config.items():
        if value != value:
            raise ModelError(f"{file}: {plain(name)} = NaN: expected a number.")
        is_count = name.startswith("num_") or name.endswith("_count")
        if is_count and isinstance(value, (int, float)) and value > MOST_COUNTED:
            raise ModelError(f"{file}: {plain(name)} = {shown(value)}: expected at most {MOST_COUNTED:,}.")


def _check_causal(name: str, config: PreTrainedConfig, settings: ModelSettings) -> None:
    architectures = list(config.architectures or [])
    values = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {name for value in values for name in ([value] if isinstance(value, str) else value)}
    if architectures and not known.intersection(architectures) and not settings.trust_remote_code:
        remote = f". It brings its own code: if you trust it, pass {TRUSTING}"
        hint = remote if getattr(config, "auto_map", None) else ", which is not a causal language model"
        raise ModelError(f"{name}: its architecture is {architectures[0]}{hint}.")
