"""Each kind of stage as a class that changes a model. `config.methods` says which method uses which kind.

To add a kind, add a row to `config.methods.KINDS`, and a class to `STAGE_KINDS`, here or in a file of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from forgetlearn.config.methods import KindName
from forgetlearn.config.schema import (
    EvaluateSettings,
    ForgetSettings,
    Modules,
    StageSettings,
    TrainSettings,
    TuningSettings,
)
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import Fact
from forgetlearn.method import editing, in_context
from forgetlearn.models import lora, module_names, null_space
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.models.language_model import LanguageModel, editable_module, layer_list, width
from forgetlearn.models.modules import factors_of, groups, mlp_output, only_rows
from forgetlearn.runtime import processes, sharding
from forgetlearn.training.finetune import StageLog, finetune
from forgetlearn.training.objectives import Ascent, AscentUntilGone, Npo, Objective, SimNpo
from forgetlearn.training.schedule import Kept
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Variant
from forgetlearn.weights import task_vector
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
# Share of the rate of learning: raising a loss leads to no minimum that would slow it. At the full rate, forgetting
# eight facts of a chat model of 135 M parameters took 8 steps, with KL 0.13 (ascent) and 0.31 (npo) on general prompts.
UNTIL_GONE_PACE = 0.3
Pairs = Sequence[tuple[str, str]]  # prompts with answers


class Lesson(NamedTuple):
    """A prompt with the answer to train on. Its beginning `given` is shown to the model, but not trained on."""

    prompt: str
    answer: str
    given: str = ""

    def encoded(self, encoder: Encoder) -> Encoded:
        """Return the text, of which only what is trained on counts as the answer. Raise as `Encoder.encode` does."""
        text = encoder.encode(self.prompt, self.answer, end=True)
        return text.after(encoder.encode(self.prompt, self.given)) if self.given.strip() else text


@dataclass(frozen=True)
class Lessons:
    """What a stage trains on: for each fact, its prompt with its answer, and other wordings of both.

    `kept` are texts that the model is to say as before. `facts` are the facts themselves, for kinds that write them by
    a formula. `quiz` are lists of questions about the facts, trained on and to be learned beside them.
    """

    of_facts: Sequence[Sequence[Lesson]]
    kept: Kept | None = None
    facts: Sequence[Fact] = ()
    quiz: Sequence[Sequence[Lesson]] = ()

    @property
    def lists(self) -> list[Sequence[Lesson]]:
        """All that is trained on: the facts, then the quiz."""
        return [*self.of_facts, *self.quiz]


class StageKind:
    """The plain kind: train the base's own weights in float32, and subtract from them. Subclasses are other kinds."""

    def ready(self, lm: LanguageModel) -> None:
        """Fold adapters, of earlier updates and of forgetting, into the base, in float32.

        Half precision would lose small steps.
        """
        fold_in(lm, lora.EARLIER, lora.FORGET)
        lm.to_float32()

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Return the model, in which only the weights that the stage trains require gradients.

        `name` is the name of the new adapter, if the kind makes one. `modules` are the weights of the base to train.
        """
        model.requires_grad_(True)
        if modules != module_names.ALL:
            trained = factors_of(model, modules, "learn.modules")
            for parameter, weight in model.named_parameters():
                weight.requires_grad_(parameter in trained)
        return model

    def training(self, settings: TrainSettings, width: int) -> tuple[TrainSettings, Variant]:
        """Return the settings to train a model of this width with, and how that differs from plain fine-tuning."""
        return settings, Variant()

    def fit(
        self, lm: LanguageModel, lessons: Lessons, settings: TrainSettings, seed: int, stage_io: StageIO
    ) -> StageLog:
        """Make the model give the lessons' answers: by fine-tuning, unless a kind overrides this."""
        facts = [tuple(lesson.encoded(lm.encoder) for lesson in own) for own in lessons.lists]
        settings, variant = self.training(settings, width(lm.model))
        objective = variant.objective
        if objective.needs_reference:
            objective = objective.referring_to(_log_likelihoods(lm, (text for own in facts for text in own)))
        variant = replace(variant, kept=lessons.kept, objective=objective)
        options = {"seed": seed, "pad_id": lm.pad_id}
        return finetune(lm.model, facts, settings, **options, device=lm.device, variant=variant, stage_io=stage_io)

    def copy_base(self, lm: LanguageModel, points: Path | None, *, in_memory: bool) -> StateDict | None:
        """Return a copy of the weights to subtract from. On the CPU, a large copy is on disk unless `in_memory`."""
        if in_memory or lm.device.type != "cpu":
            return task_vector.snapshot(lm.model)
        return task_vector.snapshot_on_disk(lm.model, points)

    def state(self, lm: LanguageModel, name: str) -> dict[str, Tensor]:
        """Return the weights that differ from the base, for reading only: all weights, or the named adapter's."""
        return sharding.parts(lm.model)

    def put_state(self, lm: LanguageModel, settings: ForgetSettings, state: StateDict) -> None:
        """Load a `state` from the forgetting stage into the base."""
        self.ready(lm)
        task_vector.load_into(lm.model, state)

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Turn the tuned model into the forgotten one: `base - coef * (tuned - base)` in the chosen modules and rows.

        `tokens` are the tokens that `settings.rows` selects.
        """
        assert base is not None, "copy_base returned it"
        factors = factors_of(lm.model, settings.modules)
        forgotten = task_vector.subtracted(base, sharding.parts(lm.model), settings.number, factors)
        if settings.rows != "all":
            vocabulary = groups(lm.model)["vocabulary"]
            forgotten = only_rows(base, forgotten, vocabulary, tokens)
        task_vector.load_into(lm.model, forgotten)

    def finish(self, lm: LanguageModel, stage_log: StageLog, seed: int) -> StageLog:
        """Turn the trained model into the product: round it, once, to the dtypes that the base was loaded in."""
        return replace(stage_log, rounding=lm.to_own_dtypes(seed))

    def put_product(self, lm: LanguageModel, settings: StageSettings, state: StateDict) -> None:
        """Turn the base, or the forgotten model, into the product that has this `state`."""
        to_own_form(lm)
        task_vector.load_into(lm.model, state)

    def asked(
        self, lm: LanguageModel, facts: Sequence[Fact], scored: Sequence[Fact], settings: EvaluateSettings
    ) -> Sequence[Fact]:
        """Return the scored facts as the product is asked them; `facts` are all that the update is about."""
        return scored

    def save_product(self, lm: LanguageModel, folder: Path, base_name: str) -> None:
        """Write the product in a form that other programs can load. An adapter names its base."""
        lm.save(folder)


class Adapter(StageKind):
    """Train a LoRA adapter beside the frozen base. Forgetting multiplies it by -coef."""

    def ready(self, lm: LanguageModel) -> None:
        """Do nothing: the base, and frozen adapters of earlier updates and of forgetting, stay unchanged."""

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Attach the adapter."""
        assert isinstance(settings, TuningSettings), "teaching trains no adapter"
        adapted: nn.Module = lora.attach(model, settings.lora, name, seed)
        return adapted

    def training(self, settings: TrainSettings, width: int) -> tuple[TrainSettings, Variant]:
        """Return the settings with the learning rate of adapters."""
        assert isinstance(settings, TuningSettings), "teaching trains no adapter"
        return settings.model_copy(update={"learning_rate": settings.lora_rate(width)}), Variant()

    def fit(
        self, lm: LanguageModel, lessons: Lessons, settings: TrainSettings, seed: int, stage_io: StageIO
    ) -> StageLog:
        """Train the adapter, after it was turned away from what the layers read in kept texts."""
        assert isinstance(settings, TuningSettings), "teaching trains no adapter"
        if lessons.kept and settings.lora.null_space and not lm.is_sharded:
            name, share = lora.trained_name(lm.model), settings.lora.null_space
            facts = [own[0].encoded(lm.encoder) for own in lessons.lists]
            remaining = null_space.turn_away(
                lm.model, name, lessons.kept.texts, facts, share, pad_id=lm.pad_id, device=lm.device
            )
            settings = settings.with_scaled_adapter()
            log.info(
                "the adapter can use %.0f %% of the directions that its layers read; kept texts take the rest",
                100 * remaining,
            )
        return super().fit(lm, lessons, settings, seed, stage_io)

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
        lora.activate(lm.model, lora.names(lm.model))

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Multiply the adapter "forget" by -coef, and freeze it."""
        lora.scale(lm.model, lora.FORGET, -settings.number, factors_of(lm.model, settings.modules))
        lora.activate(lm.model, lora.names(lm.model))

    def finish(self, lm: LanguageModel, stage_log: StageLog, seed: int) -> StageLog:
        """Combine the adapters into one, "default", which includes earlier updates and the forgetting."""
        lora.compose(lm.model, lora.names(lm.model))
        return stage_log

    def put_product(self, lm: LanguageModel, settings: StageSettings, state: StateDict) -> None:
        """Attach the adapter "default" with these factors."""
        lm.model = lora.attach(lm.model, settings.lora, lora.LEARN, seed=0)
        lora.compose(lm.model, lora.names(lm.model))
        lora.set_weights(lm.model, state)

    def save_product(self, lm: LanguageModel, folder: Path, base_name: str) -> None:
        """Write the adapter in peft's format, and the tokenizer."""
        lora.save(lm.model, lora.PRODUCT, folder, base_name)
        if processes.is_main():
            lm.tokenizer.save_pretrained(folder)


class OneModule(StageKind):
    """Train one module, which is chosen from the model's structure."""

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Make only that module require gradients."""
        model.requires_grad_(False)
        model.get_submodule(editable_module(model)).requires_grad_(True)
        return model


class Bounded(StageKind):
    """Keep every weight within `max_change` of its value before the stage."""

    def training(self, settings: TrainSettings, width: int) -> tuple[TrainSettings, Variant]:
        """Return the settings, and `max_change` as the bound on the change of a weight."""
        assert isinstance(settings, StageSettings), "a kind of learning"
        return settings, Variant(max_change=settings.max_change)


class OwnLoss(StageKind):
    """Forget by a loss of its own on the old answers, such as gradient ascent. Nothing is subtracted."""

    def __init__(self, objective: Objective, pace: float = 1.0) -> None:
        self.objective, self.pace = objective, pace

    def training(self, settings: TrainSettings, width: int) -> tuple[TrainSettings, Variant]:
        """Return the settings, with the rate times `coef` (Adam ignores the scale of a loss), and the loss."""
        assert isinstance(settings, ForgetSettings), "a kind of forgetting"
        rate = self.pace * settings.number * settings.rate(width)
        return settings.model_copy(update={"learning_rate": rate}), Variant(self.objective)

    def copy_base(self, lm: LanguageModel, points: Path | None, *, in_memory: bool) -> StateDict | None:
        """Return None: nothing is subtracted."""
        return None

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Do nothing: the training itself has forgotten."""


class AdapterByOwnLoss(Adapter):
    """Train a LoRA adapter to forget by a loss of its own. Nothing is subtracted."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def training(self, settings: TrainSettings, width: int) -> tuple[TrainSettings, Variant]:
        """Return the settings, with the rate of adapters times `coef`, and the loss."""
        assert isinstance(settings, ForgetSettings), "a kind of forgetting"
        rate = UNTIL_GONE_PACE * settings.number * settings.lora_rate(width)
        return settings.model_copy(update={"learning_rate": rate}), Variant(self.objective)

    def subtract(
        self, lm: LanguageModel, settings: ForgetSettings, base: StateDict | None, tokens: Collection[int]
    ) -> None:
        """Freeze the adapter: the training itself has forgotten."""
        lora.activate(lm.model, [lora.FORGET])


def _log_likelihoods(lm: LanguageModel, texts: Iterable[Encoded]) -> dict[Encoded, float]:
    """Return log p of each text's whole answer, in nats, as the model is now."""
    means = Scorer(lm, name="before forgetting").likelihoods({text: text for text in texts})
    return {text: mean * len(text.answer_ids) for text, mean in means.items()}


class ClosedForm(StageKind):
    """Write the facts into the weights by a formula. Nothing is fine-tuned."""

    def __init__(self, write: editing.Write, layers: editing.Layers) -> None:
        self.write, self.layers = write, layers

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Make only the edited matrices require gradients, so that a traced step covers the layers above them."""
        assert isinstance(settings, StageSettings), "a kind of learning"
        model.requires_grad_(False)
        for layer in self.layers(len(layer_list(model)[1]), settings):
            model.get_submodule(mlp_output(model, layer)).requires_grad_(True)
        return model

    def fit(
        self, lm: LanguageModel, lessons: Lessons, settings: TrainSettings, seed: int, stage_io: StageIO
    ) -> StageLog:
        """Write the facts; the log has a row for each."""
        assert isinstance(settings, StageSettings), "a kind of learning"
        lm.model.eval()  # no dropout
        return self.write(lm, lessons.facts, settings, seed, stage_io)


class InContext(StageKind):
    """Change no weight: the fact itself precedes whatever is asked about it."""

    def ready(self, lm: LanguageModel) -> None:
        """Do nothing: the base stays as it is."""

    def prepare(
        self, model: nn.Module, settings: TrainSettings, name: str, seed: int, modules: Modules = module_names.ALL
    ) -> nn.Module:
        """Freeze all weights."""
        return model.requires_grad_(False)

    def fit(
        self, lm: LanguageModel, lessons: Lessons, settings: TrainSettings, seed: int, stage_io: StageIO
    ) -> StageLog:
        """Do nothing: there is nothing to train."""
        return StageLog(())

    def finish(self, lm: LanguageModel, stage_log: StageLog, seed: int) -> StageLog:
        """Do nothing: the product is the base, which `asked` shows the facts to."""
        return stage_log

    def asked(
        self, lm: LanguageModel, facts: Sequence[Fact], scored: Sequence[Fact], settings: EvaluateSettings
    ) -> list[Fact]:
        """Return the scored facts, with each preceding everything that is asked about it."""
        return in_context.with_own_fact(scored)


class Retrieval(InContext):
    """Change no weight: the nearest of all new facts precedes whatever is asked, even if that is another one."""

    def asked(
        self, lm: LanguageModel, facts: Sequence[Fact], scored: Sequence[Fact], settings: EvaluateSettings
    ) -> list[Fact]:
        """Return the scored facts, with the nearest of `facts` before everything that is asked."""
        return in_context.with_nearest_fact(lm, facts, scored, settings)


STAGE_KINDS: Mapping[KindName, StageKind] = {
    "all weights": StageKind(),
    "lora": Adapter(),
    "one module": OneModule(),
    "bounded": Bounded(),
    "ascent": OwnLoss(Ascent()),
    "ascent until gone": OwnLoss(AscentUntilGone(), UNTIL_GONE_PACE),
    "lora ascent": AdapterByOwnLoss(AscentUntilGone()),
    "npo": OwnLoss(Npo(), UNTIL_GONE_PACE),
    "lora npo": AdapterByOwnLoss(Npo()),
    "simnpo": OwnLoss(SimNpo(), UNTIL_GONE_PACE),
    "lora simnpo": AdapterByOwnLoss(SimNpo()),
    "rome": ClosedForm(editing.rome, editing.rome_layers),
    "memit": ClosedForm(editing.memit, editing.memit_layers),
    "alphaedit": ClosedForm(editing.alphaedit, editing.memit_layers),
    "in context": InContext(),
    "retrieval": Retrieval(),
}


def fold_in(lm: LanguageModel, *names: str) -> None:
    """Add the adapters of these names to the base's weights, in float32, and remove all adapters, if there are any."""
    if hasattr(lm.model, "peft_config"):
        lm.to_float32()
        for name in names:
            lora.fold_in(lm.model, name)
        lm.model = lora.detach(lm.model)


def to_own_form(lm: LanguageModel) -> None:
    """Remove adapters, and return to the dtypes that the base was loaded in."""
    if hasattr(lm.model, "peft_config"):
        lm.model = lora.detach(lm.model)
    lm.to_own_dtypes()
