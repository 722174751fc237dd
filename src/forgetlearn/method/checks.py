"""Check, before anything is trained, that a model can forget and learn with the given settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from forgetlearn.config.methods import KINDS, KindName
from forgetlearn.config.schema import ForgetSettings, LoraSettings, StageSettings, TuningSettings
from forgetlearn.errors import ConfigError, FactError, some
from forgetlearn.facts import Fact
from forgetlearn.facts.subjects import subject_span
from forgetlearn.method.kinds import STAGE_KINDS, ClosedForm
from forgetlearn.method.moments import check_text
from forgetlearn.models import lora, module_names
from forgetlearn.models.language_model import LanguageModel, layer_list
from forgetlearn.models.modules import factors_of, groups, mlp_output, out_of_reach
from forgetlearn.training.finetune import check_computing
from forgetlearn.weights.adapter_files import ALL_LINEAR

log = logging.getLogger("forgetlearn")


def check_forgetting(lm: LanguageModel, settings: ForgetSettings, how: KindName) -> None:
    """Raise ConfigError if this model cannot forget with these settings."""
    kind = KINDS[how]
    check_computing(settings, lm.device)
    factors = factors_of(lm.model, settings.modules)
    targets = lora.check_targets(lm.model, settings.lora) if kind.adapter else list(factors)
    if not any(name in factors for name in targets):
        raise ConfigError(
            f"forget.modules = {settings.modules!r}: the adapter changes none of these weights. It changes others, "
            f"for example {targets[0]}. Name some that lora.target_modules and lora.layers cover."
        )
    if kind.adapter and settings.modules != module_names.ALL:
        matrices = {name for name, weight in lm.model.named_parameters() if weight.dim() > 1}
        if left_out := [name for name in factors if name in matrices and name not in targets]:
            log.warning(
                "forget.modules = %s: the adapter (lora.target_modules, lora.layers) leaves out %d of its matrices, "
                "which stay: %s",
                *(settings.modules, len(left_out), some(left_out)),
            )
    if settings.rows != "all":
        if lm.is_sharded:
            raise ConfigError(f"forget.rows = {settings.rows}: needs whole matrices, and model.shard splits them.")
        if not kind.subtracts_from_base:
            raise ConfigError(f"forget.rows = {settings.rows}: needs forgetting with all weights (method f-ft).")
        _check_vocabulary(lm, settings, "forget")
    if not kind.subtracts and settings.modules != module_names.ALL:
        raise ConfigError("forget.modules: this method subtracts nothing. Set it to all.")


def check_learning(lm: LanguageModel, settings: StageSettings, how: KindName) -> None:
    """Raise ConfigError if this model cannot learn with these settings."""
    kind = KINDS[how]
    if settings.rows != "all":
        check_rows(lm, settings, how)
    check_computing(settings, lm.device)
    if kind.adapter:
        lora.check_targets(lm.model, settings.lora)
    if isinstance(editor := STAGE_KINDS[how], ClosedForm):
        _check_layers(lm, settings, editor)
    if settings.modules == module_names.ALL:
        return
    if not kind.chooses_weights:
        raise ConfigError(
            f"learn.modules = {settings.modules!r}: only learning with all weights takes modules; "
            "LoRA takes lora.target_modules, and locft chooses its module."
        )
    if isinstance(settings.modules, dict):
        raise ConfigError("learn.modules: a weight is trained or not, so give names without factors.")
    factors_of(lm.model, settings.modules, "learn.modules")


def _check_layers(lm: LanguageModel, settings: StageSettings, kind: ClosedForm) -> None:
    """Raise an error if the model is split, or does not have the layers to edit with one MLP in each."""
    if lm.is_sharded:
        raise ConfigError("model.shard: ROME, MEMIT and AlphaEdit need whole matrices, and this splits them.")
    n_layers = len(layer_list(lm.model)[1])
    layers = kind.layers(n_layers, settings)
    check_text(lm, [mlp_output(lm.model, layer) for layer in layers], settings.edit)
    if layers[-1] == n_layers - 1 > 0:
        log.warning(
            "layer %d is the last: what it gives at a subject is read only where the prompt ends with the subject",
            layers[-1],
        )


def check_subjects(facts: Iterable[Fact]) -> None:
    """Raise FactError, naming the first three, if facts have no subject that ROME and MEMIT could edit at."""
    problems = []
    for fact in facts:
        try:
            subject_span(fact)
        except FactError as error:
            problems.append(str(error))
    if problems:
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FactError("\n".join(problems[:3]) + more)


def check_rows(lm: LanguageModel, settings: StageSettings, how: KindName) -> None:
    """Raise ConfigError if learning cannot be restricted to rows of the vocabulary's matrices."""
    if settings.rows != "facts":
        raise ConfigError(f"learn.rows = {settings.rows}: only forgetting takes this. Learning takes all or facts.")
    if not KINDS[how].chooses_weights:
        raise ConfigError(
            "learn.rows = facts: only learning with all weights takes rows (ft, f-ft, f-lora-ft, ft-c, ga). locft and "
            "LoRA leave the embeddings and the head alone, unless lora.target_modules names them."
        )
    _check_vocabulary(lm, settings, "learn")
    if lm.is_sharded or settings.deepspeed:
        raise ConfigError("learn.rows = facts: needs whole matrices, and model.shard and DeepSpeed split them.")
    if settings.weight_decay:
        raise ConfigError(
            f"learn.rows = facts: the rows of other tokens stay, and train.weight_decay = {settings.weight_decay:g} "
            "would shrink them. Reset one of the two to its default."
        )


def _check_vocabulary(lm: LanguageModel, settings: TuningSettings, stage: str) -> None:
    changed = factors_of(lm.model, settings.modules, f"{stage}.modules")
    if not any(name in changed for name in groups(lm.model).get("vocabulary", ())):
        raise ConfigError(
            f"{stage}.rows = {settings.rows}: needs the embeddings or the head, because only they have a row per "
            f"token, and {stage}.modules = {settings.modules!r} includes neither. Add head or embeddings to it."
        )


def out_of_loras_reach(model: nn.Module, settings: LoraSettings) -> str | None:
    """Describe the matrices that LoRA does not reach under all-linear; return None if it reaches all.

    For example, it does not reach experts that are fused into one tensor, because peft adapts only modules.
    """
    if settings.target_modules != ALL_LINEAR:
        return None
    everywhere = settings.model_copy(update={"layers": 1.0})  # the layers that it leaves out by choice are no surprise
    return out_of_reach(model, lora.check_targets(model, everywhere))
