"""The model that an update begins on: a whole model, or an adapter of earlier updates on its base.

An update never trains an earlier adapter further: each update would leave less room in it, and its A was turned away
from other texts. If the method trains an adapter, the earlier one stays frozen and active beside the new one, and the
two are composed at the end. If it trains all weights, the earlier adapter is first folded into them, in float32. Either
way nothing of it is rounded to half precision, and a new adapter has the same rank, start and rate as the first.
"""

from __future__ import annotations

from pathlib import Path

from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.models import lora
from forgetlearn.models.identity import Identity
from forgetlearn.models.language_model import LanguageModel, as_language_model
from forgetlearn.models.loading import adapter_base
from forgetlearn.models.lora_layers import check_layers
from forgetlearn.models.module_names import own_name
from forgetlearn.products.chain import Base, product_of, read_chain
from forgetlearn.runs.checks import GivenModel, check_weights
from forgetlearn.runtime import processes
from forgetlearn.storage import digests
from forgetlearn.weights.adapter_delta import plain_lora

MERGE = "Merge it (forgetlearn apply RUN --base BASE --merge --output DIR), and update DIR."


def of_run(config: RunConfig) -> RunConfig:
    """Return the config with a run folder that is named as the model replaced by the run's product."""
    name = Path(str(config.model.name))
    if not name.is_dir() or (product := product_of(name)) == name:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"name": str(product)})})


def load_to_update(model: GivenModel, tokenizer: object, config: RunConfig) -> LanguageModel:
    """Return the model that an update begins on; an adapter is then named `lora.EARLIER`, and frozen.

    Raises:
        ConfigError: a setting does not work on an adapter.
        ModelError: the adapter is not plain LoRA, is in memory, or its base has changed since it was made.
        RunError: the weights are not those of the model's last update.
    """
    named = model if model is not None else str(config.model.name)
    processes.on_main(lambda: check_weights(named))
    if isinstance(named, (str, Path)) and (under := adapter_base(config.model)) is not None:
        _check_adapter(Path(named), under, config)
        processes.on_main(lambda: check_weights(under))
    lm = as_language_model(named, tokenizer, config.model, all_weights=Stages(config).changes_base)
    if hasattr(lm.model, "peft_config"):
        if not isinstance(named, (str, Path)):
            raise ModelError(f"{lm.name}: is an adapter in memory. Save it, and give its folder.")
        _take_up(lm)
    return lm


def _check_adapter(folder: Path, under: str, config: RunConfig) -> None:
    """Raise an error if no update can begin on this adapter, or not with these settings."""
    place = f"{folder}: is an adapter"
    if config.model.quantization != "none":
        raise ConfigError(f"model.quantization = {config.model.quantization}: {place}. {MERGE}")
    if config.model.shard:
        raise ConfigError(f"model.shard: {place}, and those on split weights cannot be composed. {MERGE}")
    if config.forget.coef == AUTO and Stages(config).chooses_coefficient:
        raise ConfigError(
            f"forget.coef = auto: {place}, and each trial restores the weights of a whole model. Give a number. {MERGE}"
        )
    files, _config, _paths = plain_lora(folder, "Merge it with peft into a copy of the base, and update that.")
    files.tensors.close()
    chain = read_chain(folder)
    made_on = chain[-1].base_sha256 if chain and not chain[-1].taught_first else None
    if made_on and len(made_on) != digests.COMMIT_DIGITS and Path(under).exists():
        now = digests.sha256_of(Path(under))
        if now != made_on:
            raise ModelError(
                f"{folder}: was made on a base with the hash {made_on}, and {under} has the hash {now}: it was changed "
                "since. Restore it from a copy."
            )


def _take_up(lm: LanguageModel) -> None:
    """Bring the adapter of a loaded model into the form of a product, under the name `lora.EARLIER`."""
    for name in lora.names(lm.model):
        try:
            check_layers(lm.model, name)
        except ConfigError as error:
            raise ModelError(f"{lm.name}: {error} {MERGE}") from error
    lora.compose(lm.model, lora.names(lm.model), into=lora.EARLIER)
    lm.dtypes = {own_name(path): dtype for path, dtype in lm.dtypes.items() if ".lora_" not in path}


def base_of_update(lm: LanguageModel, config: RunConfig, identity: Identity) -> Base:
    """Return the base of an update of this model, as its manifest will name it."""
    under = adapter_base(config.model) if identity.get("adapter_sha256") else None
    adapter = lm.name if under is not None else None
    return Base(under or lm.name, config.model.base_model_id, **identity, adapter=adapter)
