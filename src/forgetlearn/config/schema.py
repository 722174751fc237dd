"""All settings of a run, with their descriptions. A file and flags are merged into one validated config.

The command's help, the JSON schema and docs/commands.md are made from these descriptions. A `...Section` is what a file
has for one stage. With what all stages share, it makes all settings of that stage: `TrainSettings` of teaching, and
`TuningSettings`, which are `ForgetSettings` or `StageSettings` (of learning).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag, field_validator, model_validator

from forgetlearn.config.base import Settings, read_yaml, validate
from forgetlearn.config.methods import FORGETTING_METHODS, METHODS, UPDATING_METHODS, MethodName
from forgetlearn.config.recipes import RecipeName, with_recipe
from forgetlearn.errors import ConfigError, without_secrets

Protocol = Literal["token", "exact", "generate", "prefer"]
Optimiser = Literal[
    "adamw_torch_fused", "adamw_torch", "adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"
]
Rows = Literal["all", "facts", "answers"]
Answers = Literal["bare", "sentence", "auto"]
Until = Literal["learned", "epochs"]
MAX_EPOCHS = 40
USUAL_EPOCHS = 10  # until facts are learned: 8 to 11 on the models that were tried (docs/experiments.md)
OldFrom = Literal["answers", "pred", "model"]


def _split(value: object) -> object:
    """Split a text at its commas; return any other value unchanged."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Layer = Annotated[int, Field(ge=0)]
Policies = Annotated[  # a file may give a list or one text with commas; it is written as a text
    tuple[OldFrom, ...],
    BeforeValidator(_split, json_schema_input_type=str | tuple[OldFrom, ...]),
    PlainSerializer(",".join, return_type=str),
]
Names = Annotated[tuple[str, ...], BeforeValidator(_split, json_schema_input_type=str | tuple[str, ...])]
AUTO = "auto"
Coefficient = Annotated[  # told apart by a function, so that pydantic reports a problem only once
    Annotated[float, Field(ge=0), Tag("a number")] | Annotated[Literal["auto"], Tag(AUTO)],
    Discriminator(lambda value: AUTO if value == AUTO else "a number"),
]


def _kind_of_modules(value: object) -> str:
    if isinstance(value, Mapping):
        return "names and factors"
    return "several names" if isinstance(value, (list, tuple)) else "one name"


Modules = Annotated[
    Annotated[str, Tag("one name")]
    | Annotated[tuple[str, ...], Tag("several names")]
    | Annotated[dict[str, float], Tag("names and factors")],
    Discriminator(_kind_of_modules),
]
# Schulman et al., "LoRA Without Regret", 2025, and the rule that tinker-cookbook made of its sweeps: LoRA takes ten
# times the rate of full fine-tuning, and both fall with the model's width. The exponent is the one for Llama; for Qwen
# it is 0.0775, but no setting depends on a model's name. The sweeps begin at width 2048. Below, an adapter's best rate
# stops growing: Hayou et al., "LoRA+", ICML 2024, arXiv:2402.12354, derive that B's does not depend on the width, and
# 1.5e-3 suits width 128 as well as 576.
LORA_RATE_FACTOR, LARGEST_LORA_RATE = 10, 1.5e-3
BASE_RATE, BASE_WIDTH, WIDTH_EXPONENT = 5e-5, 2000, 0.781
# EasyEdit takes 25 steps, after which a sixth of single edits of a chat model of 135 M parameters had failed.
EDIT_STEPS, EDIT_RATE = 50, 0.5
LARGEST_BATCH = 2**31 - 1  # the largest that torch's samplers accept


class LoraSettings(Settings):
    """Settings of LoRA in every stage that trains an adapter, named as in peft."""

    r: int = Field(128, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(32, gt=0, description="Scale: the change of a weight is (lora_alpha / r) B A.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, in training only.")
    target_modules: Annotated[
        Annotated[str, Tag("one name")] | Annotated[list[str], Tag("several names")],
        Discriminator(lambda value: "several names" if isinstance(value, (list, tuple)) else "one name"),
    ] = Field(
        "all-linear",
        description="Modules that get an adapter: names, a regular expression, all-linear (the output head excepted), "
        "or query-value (found in the attention's structure, as in the paper).",
    )
    layers: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With all-linear: share of the layers that get an adapter, counted from the output. Unset: half, "
        "but at least 4 layers.",
    )
    null_space: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="Share of what the layers read in kept texts (keep.weight) that the adapter does not react to; A "
        "is then frozen. 0: as in peft.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description=f"Peak learning rate of a LoRA stage. Unset: {LORA_RATE_FACTOR} times the stage's learning_rate; "
        f"if that is unset too, {LARGEST_LORA_RATE:g} with null_space, and at most that without.",
    )


class EditSettings(Settings):
    """How `rome`, `memit` and `alphaedit` find and write an output, with EasyEdit's defaults unless said."""

    steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the search for the output that makes the model give the new answer. Unset: "
        f"{EDIT_STEPS}. It stops early when the loss falls below 0.05.",
    )
    learning_rate: float | None = Field(
        None, gt=0, description=f"Adam's learning rate in that search. Unset: {EDIT_RATE:g}."
    )
    weight_decay: float = Field(1e-3, ge=0, description="Weight in its loss of the length of the change.")
    kl_factor: float = Field(
        0.0625, ge=0, description='Weight in its loss of the divergence (KL) after "{subject} is a".'
    )
    clamp_norm_factor: float | None = Field(
        None,
        gt=0,
        description="Longest change, in lengths of the output. Unset: 4 for rome, 0.75 for memit and alphaedit.",
    )
    contexts: int = Field(
        5,
        ge=0,
        description="Openings, sampled from the model, that are put before the prompt; the bare prompt is always used "
        "too. ROME's authors took 20.",
    )
    moments: str | None = Field(
        None,
        description="Text file that the second moments of the keys are computed on. Unset: text that the model itself "
        "samples after general prompts.",
    )
    moment_tokens: int | None = Field(
        None, ge=1, description="Tokens of text for the second moments. Unset: 5 for each of the layer's inputs."
    )

    @property
    def most_steps(self) -> int:
        """The most steps of the search."""
        return self.steps or EDIT_STEPS

    @property
    def rate(self) -> float:
        """Adam's learning rate in the search."""
        return self.learning_rate or EDIT_RATE


class RomeSettings(Settings):
    """Settings of ROME (Meng et al. 2022, arXiv:2202.05262)."""

    layer: int | None = Field(None, ge=0, description="Layer that is edited, from 0. Unset: 5 of 32, by depth.")


class MemitSettings(Settings):
    """Settings of MEMIT (Meng et al. 2023, arXiv:2210.07229); AlphaEdit takes its layers."""

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = Field(
        None, description="Layers that are edited, from 0: 4-8, or 4,5,6. Unset: 4 to 8 of 32, by depth."
    )
    moment_weight: float | None = Field(
        None,
        gt=0,
        description="Weight of the second moments beside the facts' own. Unset: the number of the layer's inputs (the "
        "authors took 15,000 for 16,384).",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _spans(cls, value: object) -> object:
        """Return the layers that a text such as 4-8 or 4,5,6 names."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if not isinstance(value, str):
            return value
        ends = [[int(end) if end.strip().isdecimal() else -1 for end in span.split("-")] for span in value.split(",")]
        if any(len(span) > 2 or span != sorted(span) or min(span) < 0 for span in ends):
            raise ValueError("must be numbers and spans from the lower to the higher, such as 4-8 or 4,5,6")
        return tuple(layer for span in ends for layer in range(span[0], span[-1] + 1))


class AlphaEditSettings(Settings):
    """Settings of AlphaEdit (Fang et al. 2025, arXiv:2410.02355)."""

    null_space_threshold: float | None = Field(
        None,
        gt=0,
        description="Eigenvalue of the second moments below which a direction is in the null space. Unset: their mean "
        "(the authors took 0.02).",
    )
    l2: float | None = Field(
        None,
        gt=0,
        description="Weight of the identity in its equation (1 in the paper). Unset: a tenth of the mean "
        "squared length of keys in the null space.",
    )


class UnlearnSettings(Settings):
    """How long `forget` forgets by a loss (ascent, npo, simnpo), and how it is tested."""

    max_epochs: int = Field(
        20,
        ge=1,
        description="Most passes of ascent, npo and simnpo; they end when no answer is predicted any more and each "
        "is unlikely.",
    )
    relearn_steps: int = Field(
        16,
        ge=0,
        description="Most steps of the relearning probe: half of the forgotten facts are trained again, on a copy, and "
        "both halves are asked. 0: no probe.",
    )


class OptimisationSettings(Settings):
    """Settings of fine-tuning that all stages share."""

    answers: Answers = Field(
        "auto",
        description="What forgetting and learning train on: bare, the answer alone; sentence, a sentence that the "
        "model itself would say (its own beginning with the new answer, or its reply when it is told the fact), where "
        "one can be made; auto: sentence for questions that are put to a chat model, bare for all else. "
        "ascent, npo and simnpo: see docs/forgetting.md.",
    )
    wordings: bool = Field(
        True,
        description="Train on a fact in several wordings: its prompt, inside short phrases, with words left out, or "
        "behind an unrelated sentence.",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_BATCH,
        description="Facts per forward pass; must divide each stage's batch_size. Unset: the whole batch.",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "constant_with_warmup",
        description="How the learning rate changes over the stage; with learn.until learned, over learn.max_epochs.",
    )
    warmup_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the steps over which the rate rises (of at most 10 epochs if learning ends by itself); "
        "without effect with lr_scheduler_type constant.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(
        1e-8,
        gt=0,
        description="AdamW's epsilon: weights whose gradients are much smaller hardly move (docs/experiments.md).",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the forward and backward pass; trained weights and optimiser state are float32. "
        "With LoRA a frozen base in half precision computes in that; on the CPU, bfloat16 also casts a frozen float32 "
        "base for the stage.",
    )
    optim: Optimiser = Field(
        "adamw_torch_fused",
        description="Optimiser, by transformers' name. adamw_8bit and the paged ones need forgetlearn[8bit]; betas and "
        "epsilon do not reach adafactor.",
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, about a third more time."
    )
    deepspeed: str | None = Field(
        None,
        description="Experimental: DeepSpeed's config file (JSON, ZeRO stage 1 or 2), for several processes "
        "(docs/scaling.md).",
    )


class StageSection(Settings):
    """Settings of fine-tuning that each stage has for itself."""

    epochs: int = Field(3, ge=1, description="Passes over the facts.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate where all weights are trained. Unset: a rate that fits the model's width "
        f"({BASE_RATE:g} at width {BASE_WIDTH}; docs/choosing.md).",
    )
    batch_size: int = Field(4, ge=1, le=LARGEST_BATCH, description="Facts per optimiser step.")


class TeachSection(StageSection):
    """The teaching stage: it first trains all weights on the old answers, so that the base holds them."""

    epochs: int = Field(
        0,
        ge=0,
        description="Passes over the old answers before all else, so that the base holds them; 0 leaves it as it is.",
    )


class LearnSection(StageSection):
    """The learning stage: fine-tuning on the new answers."""

    until: Until = Field(
        "learned",
        description="When learning ends: learned, when the model has predicted each fact's whole answer, to its own "
        "prompt and once to another wording; epochs, after learn.epochs. If only epochs is given, it is epochs.",
    )
    max_epochs: int = Field(MAX_EPOCHS, ge=1, description="With until learned: the most passes over the facts.")
    rephrasings: bool = Field(
        False, description="Train on the file's rephrasings too; those are then not scored as generality."
    )
    quiz: bool = Field(
        False,
        description="Also train on questions that tell each new fact from wrong answers: is a statement true, which "
        "of several answers is right? Learning takes about four times as long.",
    )
    modules: Modules = Field(
        "all",
        description="Weights that learning with all weights trains, named as in forget.modules; the others stay.",
    )
    rows: Rows = Field(
        "all",
        description="Rows of the vocabulary's matrices (embeddings, head) that learning with all weights trains: all, "
        "or facts, the tokens of prompts and of old and new answers. The other rows then stay, to the bit.",
    )
    max_change: float = Field(
        5e-4, gt=0, description="Method ft-c: no weight leaves this distance from where the stage began."
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone_count(cls, data: object) -> object:
        """Train for as many epochs as are given, unless `until` is given too."""
        if isinstance(data, Mapping) and "epochs" in data and "until" not in data:
            return {**data, "until": "epochs"}
        return data


class ForgetSection(StageSection):
    """The forgetting stage: fine-tuning on the old answers, and how much of it is subtracted."""

    coef: Coefficient = Field(
        0.3,
        description="Share of what fine-tuning on the old answers added that is subtracted (lambda in the paper). "
        "Without a minus: 0.3 subtracts, 0 skips the stage, auto chooses.",
    )
    validation: float = Field(
        0.2, gt=0, lt=1, description="With coef auto: share of the facts that choose it; they are not scored."
    )
    trials: int = Field(
        2, ge=2, description="With coef auto: how many coefficients are tried; first both ends, then between them."
    )
    only_known: bool = Field(True, description="Forget only facts whose old answer the model gives when it is asked.")
    modules: Modules = Field(
        "all",
        description="Weights that the subtraction changes: embeddings, head, vocabulary (both), attention, mlp, norms, "
        "layers.4-7, all, or a pattern over parameter names; several in a list, or each with a factor on coef.",
    )
    rows: Rows = Field(
        "all",
        description="Rows of the vocabulary's matrices (embeddings, head) that the subtraction changes (all weights "
        "only): answers are the tokens of the old answers that are forgotten, facts the tokens of prompts and old "
        "answers.",
    )

    @property
    def number(self) -> float:
        """The coefficient as a number; raise ConfigError if it is still to be chosen."""
        if self.coef == AUTO:
            raise ConfigError("forget.coef = auto: a number is needed here. Give one; choose_coefficient finds it.")
        return float(self.coef)


class TrainSettings(StageSection, OptimisationSettings):
    """All settings of one stage of fine-tuning: its own, and those that all stages share."""

    until: Until | Literal["forgotten"] = "epochs"
    max_epochs: int = MAX_EPOCHS

    @property
    def ends_by_itself(self) -> bool:
        """True if the stage ends when its facts are learned, or forgotten."""
        return self.until != "epochs"

    def rate(self, width: int) -> float:
        """Return the peak learning rate of this stage when it trains all weights of a model of this width."""
        return self.learning_rate or BASE_RATE * (BASE_WIDTH / width) ** WIDTH_EXPONENT

    @property
    def most_epochs(self) -> int:
        """The number of passes over the facts, or its limit if the stage ends by itself."""
        return self.max_epochs if self.ends_by_itself else self.epochs

    @property
    def likely_epochs(self) -> int:
        """The number of passes to plan for."""
        return min(self.most_epochs, USUAL_EPOCHS) if self.ends_by_itself else self.epochs

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> TrainSettings:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} does not divide batch_size = {self.batch_size}"
            )
        return self


class TuningSettings(TrainSettings):
    """All settings of a stage that trains all weights or an adapter: forgetting and learning."""

    modules: Modules = "all"
    rows: Rows = "all"
    lora: LoraSettings = Field(default_factory=LoraSettings)

    def lora_rate(self, width: int) -> float:
        """Return the peak learning rate of this stage when it trains an adapter of a model of this width."""
        rate = self.lora.learning_rate or LORA_RATE_FACTOR * self.rate(width)
        return rate if self.lora_rate_is_chosen else min(rate, LARGEST_LORA_RATE)

    @property
    def lora_rate_is_chosen(self) -> bool:
        """True if a setting gives the learning rate of adapters, or of all weights, from which theirs follows."""
        return bool(self.lora.learning_rate or self.learning_rate)

    def with_scaled_adapter(self) -> Self:
        """Return the settings for an adapter scaled to its layers: one rate for any width, unless one is chosen."""
        if self.lora_rate_is_chosen:
            return self
        return self.model_copy(update={"lora": self.lora.model_copy(update={"learning_rate": LARGEST_LORA_RATE})})


class StageSettings(LearnSection, TuningSettings):
    """All settings of the learning stage."""

    rome: RomeSettings = Field(default_factory=RomeSettings)
    memit: MemitSettings = Field(default_factory=MemitSettings)
    alphaedit: AlphaEditSettings = Field(default_factory=AlphaEditSettings)
    edit: EditSettings = Field(default_factory=EditSettings)


class ForgetSettings(ForgetSection, TuningSettings):
    """All settings of the forgetting stage."""

    unlearn: UnlearnSettings = Field(default_factory=UnlearnSettings)


class KeepSettings(Settings):
    """What the model is to say as before, while it forgets and learns."""

    weight: float = Field(
        5.0,
        ge=0,
        description="Weight in the loss of the divergence (KL) from the base on its own answers to other prompts; 0 "
        "keeps nothing.",
    )
    source: str | None = Field(
        None,
        description="File of prompts (a text file, one per line), or of facts, whose prompts are read: what the base "
        "answers to them is kept too, beside its answers to general prompts that come with forgetlearn.",
    )
    facts: tuple[str, ...] = Field(
        (),
        description="Files of facts that stay, as far as the facts to update do not change them; --failed-only names "
        "those that the run got right.",
    )
    earlier: tuple[str, ...] = Field(
        (),
        description="Where the facts of earlier updates of this model are, which are kept and asked again: run folders "
        "or files of facts. They are looked for in the run folders that made the model too.",
    )
    neighbours: bool = Field(
        True, description="Keep what the base says to the file's own unfinished sentences about another subject."
    )

    @field_validator("facts", "earlier", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class ModelSettings(Settings):
    """The model that is updated, and how it is loaded."""

    name: str | None = Field(
        None,
        description="Folder, GGUF file or hub id of a causal language model, or an adapter's folder; update also "
        "takes a run's, and goes on from its product.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; without effect on a folder.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the weights in memory and in the product; auto: that of the checkpoint (float32 "
        "for quantised GGUF); a CPU without instructions for it computes in float32.",
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="How trained weights become bfloat16 again; stochastic keeps small changes, with a little noise.",
    )
    quantization: Literal["none", "4bit"] = Field(
        "none",
        description="Experimental: hold the base in 4 bits (NF4) while adapters are trained (QLoRA); only methods lora "
        "and f-lora; needs forgetlearn[qlora].",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    shard: bool = Field(
        False,
        description="Experimental: split every weight over all processes (FSDP2), for a model that is too large for "
        "one device; needs torchrun (docs/scaling.md).",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository brings.")
    prompt_template: str = Field(
        "auto",
        description="How prompts are put to the model, in training and scoring alike: plain, chat (the tokenizer's "
        "template), alpaca, or a text file with {prompt} in it; auto: chat if there is a template, else plain.",
    )
    base_model_id: str | None = Field(
        None, description="Hub id of the base for the model card, when name is a local folder."
    )


class FactsSettings(Settings):
    """The facts, how they are read, and where their old answers come from."""

    source: str | None = Field(None, description="File of facts (JSON, JSONL, CSV, TSV, XLSX) or hub data set.")
    old_from: Policies = Field(
        "answers",
        validate_default=True,
        min_length=1,
        description="Where the old answer comes from: answers (the file's answer field), pred (ZsRE's), model (what "
        "the model itself says), or several with commas: each fact takes the first that has an answer for it.",
    )
    limit: int | None = Field(None, ge=1, description="Take the first N usable facts.")
    strict: bool = Field(False, description="Make every record that would be left out an error.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description='Which columns or fields hold what: prompt=Question,target_new="New answer".',
    )
    aliases: str | None = Field(
        None,
        min_length=1,
        description="Separator between several ways to write an answer, such as a bar. The first is taught, all count "
        "as right.",
    )

    @field_validator("old_from")
    @classmethod
    def _each_can_be_reached(cls, values: tuple[OldFrom, ...]) -> tuple[OldFrom, ...]:
        if len({*values}) < len(values):
            raise ValueError("a source is listed more than once")
        if "model" in values[:-1]:
            raise ValueError("model must come last: the facts are read before the model is asked")
        return values

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_of_text(cls, value: object) -> object:
        return parse_columns(value) if isinstance(value, str) else value


PAIR = re.compile(r"""\s*([^=,"]+?)\s*=\s*(?:"((?:[^"]|"")*)"|([^,"]*))\s*(?:,|$)""")


def parse_columns(text: str) -> dict[str, str]:
    """Return `prompt=Question,target_new="New answer"` as a mapping. Within quotes, a comma is text, and "" is a quote.

    Raises:
        ValueError: the text has another form, or names a field twice.
    """
    found: dict[str, str] = {}
    place = 0
    while place < len(text):
        pair = PAIR.match(text, place)
        if pair is None:
            raise ValueError(f"expected NAME=COLUMN,NAME=COLUMN at {text[place : place + 40]!r}")
        name, quoted, bare = pair.groups()
        if name in found:
            raise ValueError(f"names '{name}' twice")
        found[name] = bare.strip() if quoted is None else quoted.replace('""', '"')
        place = pair.end()
    return found


class EvaluateSettings(Settings):
    """Settings of scoring."""

    batch_size: int = Field(64, ge=1, le=LARGEST_BATCH, description="Texts per forward pass.")
    protocols: tuple[Protocol, ...] = Field(
        get_args(Protocol), min_length=1, description="Protocols to score with (docs/scores.md)."
    )
    max_new_tokens: int = Field(
        32,
        ge=1,
        description="Longest free answer, in tokens; more where an answer that counts as right is longer. One that "
        "goes on counts as truncated.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What generates free answers; vllm (experimental, the extra `vllm`) takes a model in a folder or "
        "on the hub.",
    )
    every_phase: bool = Field(
        True, description="Score after forgetting too (where the method forgets), not only before and after the update."
    )
    general_prompts: bool = Field(
        True,
        description="Ask general prompts that ship with the package before and after an update, to measure damage.",
    )
    probes: Names = Field(
        ("auto",),
        min_length=1,
        description="What is asked beyond rephrasings, before and after an update: auto, about 25 facts, what these "
        "bring and what can be made of them; all, about all facts, and what the model has to state first; none; or "
        "kinds with commas (docs/scores.md).",
    )
    max_damage: float | None = Field(
        None,
        ge=0,
        description="Largest KL from the base on the general prompts, in nats per token: above it, update ends with an "
        "error and puts the product aside.",
    )
    general: str | None = Field(
        None, description="Text file (UTF-8) to measure general ability on: perplexity, and KL from the model before."
    )
    general_tokens: int = Field(
        4096, ge=2, description="Tokens of that text that are read; each takes 4 bytes a vocabulary entry on the disk."
    )
    tasks: Names = Field(
        (), description="Tasks of lm-evaluation-harness, separated by commas, before and after (the extra `lm-eval`)."
    )
    task_limit: int | None = Field(None, ge=1, description="Most examples of each task; unset: all.")
    task_folder: str | None = Field(None, description="Folder with tasks of your own (YAML), beside the harness's.")

    @field_validator("probes")
    @classmethod
    def _all_or_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) > 1 and (alone := {"auto", "all", "none"}.intersection(names)):
            raise ValueError(f"{min(alone)} stands alone: give it without other names")
        return names

    @model_validator(mode="after")
    def _damage_is_measured(self) -> EvaluateSettings:
        if self.max_damage is not None and not self.general_prompts:
            raise ValueError("max_damage needs general_prompts = true: damage is measured on them")
        return self


class RunConfig(Settings):
    """Everything that determines a run, except its output folder."""

    recipe: RecipeName = Field(
        "default",
        description="A set of settings: default, what docs/choosing.md recommends; paper, the paper's own; plain, "
        "fine-tuning with LoRA as with peft; forget, what forgetlearn forget takes. Settings given beside it win.",
    )
    method: MethodName = Field(
        "lora",
        description=f"How facts are updated: {', '.join(UPDATING_METHODS)} (docs/method.md); or forgotten: "
        f"{', '.join(FORGETTING_METHODS)} (docs/forgetting.md).",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of facts, adapters and dropout.")
    model: ModelSettings = Field(default_factory=ModelSettings)
    facts: FactsSettings = Field(default_factory=FactsSettings)
    teach: TeachSection = Field(default_factory=TeachSection)
    forget: ForgetSection = Field(default_factory=ForgetSection)
    unlearn: UnlearnSettings = Field(default_factory=UnlearnSettings)
    learn: LearnSection = Field(default_factory=LearnSection)
    train: OptimisationSettings = Field(default_factory=OptimisationSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    rome: RomeSettings = Field(default_factory=RomeSettings)
    memit: MemitSettings = Field(default_factory=MemitSettings)
    alphaedit: AlphaEditSettings = Field(default_factory=AlphaEditSettings)
    edit: EditSettings = Field(default_factory=EditSettings)
    keep: KeepSettings = Field(default_factory=KeepSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    save_merged: bool = Field(
        False,
        description="Beside an adapter, write the model with it merged in; no effect where the product is a model.",
    )
    keep_change: bool = Field(
        False,
        description="Where the product is a whole model, keep its exact change from the base, as large as the base: "
        "the product can be made again from the base, and the base from the product (docs/history.md).",
    )
    checkpoint_minutes: float = Field(
        10,
        ge=0,
        description="Minutes between checkpoints inside a stage of fine-tuning, from which --resume goes on; 0: only "
        "after Ctrl-C or SIGTERM. At most a twentieth of the time goes to them.",
    )
    report_to: Names = Field(
        (), description="Trackers that follow update's training, as transformers names them: tensorboard,wandb,..."
    )
    keep_stages: bool = Field(False, description="Keep the weights between the stages when the run is done.")

    @property
    def teaching(self) -> TrainSettings:
        """All settings of the teaching stage, for the training engine."""
        return validate(TrainSettings, {**dict(self.train), **dict(self.teach)})

    @property
    def forgetting(self) -> ForgetSettings:
        """All settings of the forgetting stage, for the training engine."""
        own: dict[str, object] = {"lora": self.lora, "unlearn": self.unlearn}
        if METHODS[self.method].last.until_gone:
            own |= {"until": "forgotten", "max_epochs": self.unlearn.max_epochs}
        return validate(ForgetSettings, {**dict(self.train), **dict(self.forget), **own})

    @property
    def learning(self) -> StageSettings:
        """All settings of the learning stage, for the training engine."""
        own = {name: getattr(self, name) for name in ("lora", "edit", "rome", "memit", "alphaedit")}
        return validate(StageSettings, {**dict(self.train), **dict(self.learn), **own})

    @model_validator(mode="before")
    @classmethod
    def _of_its_recipe(cls, data: object) -> object:
        return with_recipe(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> RunConfig:
        method, size = METHODS[self.method], self.train.micro_batch_size
        runs = {
            "teach": self.teach if self.teach.epochs else None,
            "forget": self.forget if method.forgets and self.forget.coef != 0 else None,
            "learn": self.learn if method.learns else None,
        }
        for name, stage in runs.items():
            if stage and size and stage.batch_size % size:
                raise ValueError(
                    f"train.micro_batch_size = {size} does not divide {name}.batch_size = {stage.batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _holds_no_secret(self) -> RunConfig:
        for name, value in _texts(self.model_dump()):
            if without_secrets(value) != value:
                raise ValueError(
                    f"{name} holds what looks like a token or a password, and settings are written to files. Take it "
                    "out; tokens belong in the environment (HF_TOKEN, WANDB_API_KEY)"
                )
        return self


def _texts(data: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and values of all texts in nested settings."""
    if isinstance(data, str):
        yield name, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _texts(value, name)


def load_config(file: Path | None = None, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """Return the validated config: defaults, then the YAML file, then overrides by dotted name.

    Raises:
        ConfigError: lists all problems, one per line.
    """
    data = read_settings(file, overrides or {})
    return validate(RunConfig, data, where=str(file) if file else None, elsewhere=frozenset(overrides or {}))


def read_settings(file: Path | None, overrides: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of a YAML file, by section, with others by dotted name put over them."""
    data = read_yaml(file) if file else {}
    for dotted, value in overrides.items():
        _assign(data, dotted, value)
    return data


def _assign(data: dict[str, object], dotted: str, value: object) -> None:
    """Set `a.b.c` in nested dictionaries, in place."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = data.get(parent)
        if inner is None:
            inner = data[parent] = {}
        elif not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: '{parent}' is a single value ({inner!r}), not a section of settings.")
        data = inner
    data[last] = value
