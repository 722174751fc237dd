"""What each kind of stage does to a model: a class per kind, in one table. `config.methods` says which method uses it.

A new kind is a row in `config.methods.KINDS` and a class here, or in a file of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from forgetlearn.config.methods import KindName
from forgetlearn.config.schema import ForgetSettings, Modules, StageSettings, TrainSettings, TuningSettings
from forgetlearn.models import lora, module_names
from forgetlearn.models import modules as selection
from forgetlearn.models.language_model import LanguageModel, editable_module
from forgetlearn.runtime import processes, sharding
from forgetlearn.training.finetune import StageLog, finetune
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Variant
from forgetlearn.weights import task_vector
from forgetlearn.weights.task_vector import StateDict

Pairs = Sequence[tuple[str, str]]  # prompts with answers


class StageKind:
    """The plain kind: train the base's own weights, in float32, and subtract from any of them. Others override."""

    def ready(self, lm: LanguageModel) -> None:
        """Make what an adapter forgot part of the base, in float32: half precision would lose the small steps."""
        fold_in(lm, lora.FORGET)
        lm.to_float32()

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Return the model with what the stage trains, and nothing else, requiring gradients.

        `name` is that of the new adapter, if the kind makes one; `modules` restricts the weights of the base.
        """
        model.requires_grad_(True)
        if modules != module_names.ALL:
            trained = selection.factors(model, modules, "learn.modules")
            for parameter, weight in model.named_parameters():
                weight.requires_grad_(parameter in trained)
        return model

    def training(self, settings: TrainSettings) -> tuple[TrainSettings, Variant]:
        """Return the settings to train with, and where the training departs from plain fine-tuning."""
        return settings, Variant()

    def fit(self, lm: LanguageModel, pairs: Pairs, settings: TrainSettings, seed: int, stage_io: StageIO) -> StageLog:
        """Make the model give these answers to these prompts: by fine-tuning, unless a kind knows another way."""
        texts = [lm.encoder.encode(prompt, answer, end=True) for prompt, answer in pairs]
        settings, variant = self.training(settings)
        options = {"seed": seed, "pad_id": lm.pad_id}
        return finetune(lm.model, texts, settings, **options, device=lm.device, variant=variant, stage_io=stage_io)

    def copy_base(self, lm: LanguageModel, points: Path | None, *, in_memory: bool) -> StateDict | None:
        """Return a copy of the weights to subtract from; a large one on the CPU lies on the disk unless `in_memory`."""
        if in_memory or lm.device.type != "cpu":
            return task_vector.snapshot(lm.model)
        return task_vector.snapshot_on_disk(lm.model, points)

    def state(self, lm: LanguageModel, name: str) -> dict[str, Tensor]:
        """Return what tells the model from its base, to be read: all weights, or those of the adapter of this name."""
        return sharding.parts(lm.model)

    def put_state(self, lm: LanguageModel, settings: ForgetSettings, state: StateDict) -> None:
        """Make the base what it was in forgetting, when `state` returned this."""
        self.ready(lm)
        task_vector.load_into(lm.model, state)

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Make the tuned model the forgotten one: `base - coef * (tuned - base)`, where `modules` and `rows` say so.

        `tokens` are those that `settings.rows` is about.
        """
        assert base is not None, "copy_base returned it"
        factors = selection.factors(lm.model, settings.modules)
        forgotten = task_vector.subtracted(base, sharding.parts(lm.model), settings.number, factors)
        if settings.rows != "all":
            vocabulary = selection.groups(lm.model)["vocabulary"]
            forgotten = selection.only_rows(base, forgotten, vocabulary, tokens)
        task_vector.load_into(lm.model, forgotten)

    def finish(self, lm: LanguageModel, stage_log: StageLog, seed: int) -> StageLog:
        """Make the trained model the product: in the dtypes that the base was loaded in, rounded once."""
        return replace(stage_log, rounding=lm.to_own_dtypes(seed))

    def put_product(self, lm: LanguageModel, settings: StageSettings, state: StateDict) -> None:
        """Make the base, or the forgotten model, the product whose `state` this is."""
        to_own_form(lm)
        task_vector.load_into(lm.model, state)

    def save_product(self, lm: LanguageModel, folder: Path, base_name: str) -> None:
        """Write the product as other programs load it; an adapter names its base."""
        lm.save(folder)


class Adapter(StageKind):
    """Train a LoRA adapter beside the frozen base; forgetting folds -coef into it."""

    def ready(self, lm: LanguageModel) -> None:
        """Leave the base, and a frozen adapter that forgets, as they are."""

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Attach the adapter."""
        assert isinstance(settings, TuningSettings), "teaching trains no adapter"
        adapted: nn.Module = lora.attach(model, settings.lora, name, seed)
        return adapted

    def training(self, settings: TrainSettings) -> tuple[TrainSettings, Variant]:
        """Return the settings with the learning rate of adapters."""
        assert isinstance(settings, TuningSettings), "teaching trains no adapter"
        return settings.model_copy(update={"learning_rate": settings.lora_learning_rate}), Variant()

    def copy_base(self, lm: LanguageModel, points: Path | None, *, in_memory: bool) -> StateDict | None:
        """Return None: the base keeps its weights."""
        return None

    def state(self, lm: LanguageModel, name: str) -> dict[str, Tensor]:
        """Return copies of the adapter's factors."""
        return lora.weights_of(lm.model, name)

    def put_state(self, lm: LanguageModel, settings: ForgetSettings, state: StateDict) -> None:
        """Attach the adapter "forget" with these factors, frozen."""
        lm.model = lora.attach(lm.model, settings.lora, lora.FORGET, seed=0)
        lora.set_weights(lm.model, state)
        lora.activate(lm.model, [lora.FORGET])

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Multiply the adapter "forget" by -coef, and freeze it."""
        lora.scale(lm.model, lora.FORGET, -settings.number, selection.factors(lm.model, settings.modules))
        lora.activate(lm.model, [lora.FORGET])

    def finish(self, lm: LanguageModel, stage_log: StageLog, seed: int) -> StageLog:
        """Make the adapters one, "default", which holds the forgetting too."""
        lora.compose(lm.model, lora.names(lm.model))
        return stage_log

    def put_product(self, lm: LanguageModel, settings: StageSettings, state: StateDict) -> None:
        """Attach the adapter "default" with these factors."""
        lm.model = lora.attach(lm.model, settings.lora, lora.LEARN, seed=0)
        lora.compose(lm.model, lora.names(lm.model))
        lora.set_weights(lm.model, state)

    def save_product(self, lm: LanguageModel, folder: Path, base_name: str) -> None:
        """Write the adapter as peft does, and the tokenizer."""
        lora.save(lm.model, lora.PRODUCT, folder, base_name)
        if processes.is_main():
            lm.tokenizer.save_pretrained(folder)


class OneModule(StageKind):
    """Train one module, which is chosen from the model's structure."""

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Let that module alone require gradients."""
        model.requires_grad_(False)
        model.get_submodule(editable_module(model)).requires_grad_(True)
        return model


class Bounded(StageKind):
    """Keep every weight within `max_change` of where it was."""

    def training(self, settings: TrainSettings) -> tuple[TrainSettings, Variant]:
        """Return the settings, and `max_change` as the bound on how far a weight may move."""
        assert isinstance(settings, StageSettings), "a kind of learning"
        return settings, Variant(max_change=settings.max_change)


class Ascent(StageKind):
    """Climb the loss of the old answers, which forgets them; nothing is subtracted."""

    def training(self, settings: TrainSettings) -> tuple[TrainSettings, Variant]:
        """Return the settings with `coef` times the rate (Adam ignores the scale of a loss), and the loss negated."""
        assert isinstance(settings, ForgetSettings), "a kind of forgetting"
        slower = settings.model_copy(update={"learning_rate": settings.number * settings.learning_rate})
        return slower, Variant(loss_sign=-1)

    def copy_base(self, lm: LanguageModel, points: Path | None, *, in_memory: bool) -> StateDict | None:
        """Return None: nothing is subtracted."""
        return None

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Leave the model as it is."""


STAGE_KINDS: Mapping[KindName, StageKind] = {
    "all weights": StageKind(),
    "lora": Adapter(),
    "one module": OneModule(),
    "bounded": Bounded(),
    "ascent": Ascent(),
}


def fold_in(lm: LanguageModel, name: str) -> None:
    """Add what an adapter holds, if the model carries one, to the base's weights, in float32."""
    if hasattr(lm.model, "peft_config"):
        lm.to_float32()
        lora.fold_in(lm.model, name)
        lm.model = lora.detach(lm.model)


def to_own_form(lm: LanguageModel) -> None:
    """Remove adapters, and return to the dtypes that the base was loaded in."""
    if hasattr(lm.model, "peft_config"):
        lm.model = lora.detach(lm.model)
    lm.to_own_dtypes()
