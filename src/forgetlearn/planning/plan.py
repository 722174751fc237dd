"""What an update will take, before anything is downloaded in full or trained: config, headers and facts to a plan."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError

from forgetlearn.config.methods import METHODS, How
from forgetlearn.config.schema import AUTO, RunConfig, StageSettings, TrainSettings, TuningSettings
from forgetlearn.errors import ConfigError, FactError, ForgetLearnError, ModelError
from forgetlearn.evaluation.scoring import MARGIN_TOKENS
from forgetlearn.facts import Fact, FactSet
from forgetlearn.method.core import out_of_loras_reach
from forgetlearn.method.keeping import read_keep
from forgetlearn.models.batches import GPU_ROW_TOKENS, ROW_TOKENS, SMALL_MODEL, shared_rows
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.models.language_model import LanguageModel, context_length, parameter_count, pick_device, read_outline
from forgetlearn.models.texts import check_texts
from forgetlearn.planning.estimate import (
    FLOAT32,
    GB,
    Devices,
    Load,
    Plan,
    Speed,
    StagePlan,
    plan_stage,
    show_bytes,
    show_count,
    show_seconds,
    summary_line,
)
from forgetlearn.planning.trace import Skeleton
from forgetlearn.weights.checkpoint_folder import INDEX, WHOLE, CheckpointFolder
from forgetlearn.weights.task_vector import SMALL_BYTES, TORCH

T = TypeVar("T")
log = logging.getLogger("forgetlearn")
MOST_ENCODED = 2000  # facts whose tokens are counted; a sample stands for more
MEASURE = "measure"
WORD_TOKENS = 1.5  # tokens a word, where no tokenizer can be had
EFFICIENCY = 0.7  # of the measured matrix rate that a step reaches beside what is counted apart (docs/plan.md)


@dataclass(frozen=True)
class Outline:
    """A model as far as it can be known without its weights; `stored` is None where no headers could be read."""

    name: str
    config: Any
    encoder: Encoder | None
    dtype: torch.dtype
    stored: dict[str, int] | None = None  # numbers by dtype, as safetensors spells it
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def skeleton(self, dtype: torch.dtype | None = None) -> Skeleton:
        """The model without numbers, in its own dtype or another."""
        return Skeleton(self.config, dtype or self.dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Texts:
    """What a stage reads: some of its texts, and how many there are of them in all."""

    sample: tuple[Encoded, ...]
    number: int

    @property
    def tokens(self) -> int:
        """Tokens of all of them, going by the sample."""
        return round(sum(len(text.ids) for text in self.sample) / len(self.sample) * self.number)

    def largest_batch(self, size: int, passes: int, seed: int = 0) -> list[Encoded]:
        """The batch with the most tokens that random orders of these texts make."""
        draw, size = random.Random(seed), min(size, self.number)
        batches = [draw.choices(self.sample, k=size) for _ in range(passes * math.ceil(self.number / size))]
        return max(batches, key=lambda batch: sum(len(text.ids) for text in batch))

    def fullest_row(self, size: int, room: int) -> list[Encoded]:
        """The texts of the row of scoring that has the most tokens."""
        texts = dict(enumerate(self.sample))
        rows = [[texts[key] for key in row] for row in shared_rows(texts, size, room)]
        return max(rows, key=lambda row: sum(len(text.ids) for text in row))


@torch.inference_mode(False)  # it traces a training step
def plan_update(
    config: RunConfig,
    facts: FactSet,
    *,
    outline: Outline | None = None,
    devices: Devices | None = None,
    rate: str | None = None,
) -> Plan:
    """What an update of these facts with these settings will take; the model's weights are not read.

    `rate` is how fast it trains, see `speed_of`; without it no time is told.

    Raises:
        ModelError: the model's config or tokenizer cannot be read, see `load_model`.
        ConfigError: no model is named, or a stage's settings do not fit the model.
        FactError: a fact holds a text that the model cannot be trained on, see `check_texts`.
    """
    if outline is None:
        outline = outline_of(config)
        if outline.encoder is not None:
            check_texts(outline.encoder, facts)
    devices = devices or devices_here(config)
    loads, notes = _loads(outline, config, facts, devices.kind)
    speed = speed_of(rate, [plan_stage(load, devices) for load in loads], config, devices) if rate else None
    stages = tuple(plan_stage(load, devices, speed) for load in loads)
    skeleton = outline.skeleton()
    parameters = sum(weight.numel() for weight in skeleton.model.parameters())
    plan = Plan(
        model=outline.name,
        method=config.method,
        parameters=parameters,
        facts=len(facts),
        stages=stages,
        disk=_disk(config, loads, skeleton.weights_bytes, parameters, devices),
        devices=devices,
        speed=speed,
        notes=(*outline.notes, *_header_notes(outline, parameters), *notes),
        inputs={"stored": outline.stored, "dtype": str(outline.dtype).removeprefix("torch.")},
    )
    if plan.fits is False:
        return replace(plan, advice=tuple(_advice(loads, devices, outline, config, facts)))
    return plan


def foresee(lm: LanguageModel, facts: FactSet, config: RunConfig, n_processes: int = 1) -> tuple[str, dict[str, Any]]:
    """One line of what an update of a model in memory will take, and its figures for the manifest.

    Memory and time are told for a model of some size only: tracing a small one takes longer than they matter.
    """
    if parameter_count(lm.model) < SMALL_MODEL:
        return counts_line(lm, facts, config), {}
    dtype = max(Counter(lm.dtypes.values()).items(), key=lambda item: item[1])[0]
    outline = Outline(lm.name, lm.model.config, lm.encoder, dtype)
    try:
        devices = devices_here(config, number=n_processes, shard=config.model.shard)
        plan = plan_update(config, facts, outline=outline, devices=devices, rate=MEASURE)
    except Exception as error:  # of a model in memory that its config alone does not make: no reason not to update it
        return f"{counts_line(lm, facts, config)}; memory is not known ({type(error).__name__})", {}
    if plan.fits is False:
        log.warning("memory: about %s are needed; forgetlearn plan says what would fit", show_bytes(plan.peak_bytes))
    return summary_line(plan), {"peak_memory_gb": round(plan.peak_bytes / GB, 3), "seconds": plan.seconds}


def counts_line(lm: LanguageModel, facts: FactSet, config: RunConfig) -> str:
    """Parameters, facts and steps in words."""
    nothing = Texts((), _held(facts)), Texts((), len(facts))
    steps = [
        f"{passes * math.ceil(texts.number / settings.batch_size):,} to {name}"
        for name, _how, settings, texts, passes, _before in _stages(config, *nothing)
    ]
    return f"plan: {show_count(parameter_count(lm.model))} parameters, {len(facts):,} facts, {' + '.join(steps)} steps"


def took(manifest: Mapping[str, Any], device: torch.device) -> str:
    """What a finished run took, in a line: the seconds of all its stages, and the most memory of this process."""
    seconds = sum(stage["seconds"] for stage in manifest["stages"].values())
    line = f"took {show_seconds(seconds)}, at most {show_bytes(manifest['peak_memory_gb'] * GB)}"
    if device.type == "cuda":
        line += f" and {show_bytes(torch.cuda.max_memory_allocated(device))} on the device"
    foreseen = manifest.get("plan")
    return line + (f" (planned {show_bytes(foreseen['peak_memory_gb'] * GB)})" if foreseen else "")


def outline_of(config: RunConfig) -> Outline:
    """The model that the config names, from its config, tokenizer and safetensors headers.

    Raises:
        ModelError: see `load_model`.
    """
    settings = config.model
    name = str(settings.name)
    model_config, tokenizer, notes = read_outline(settings)
    stored, why_not = _stored(name, settings.revision)
    encoder = None
    if tokenizer is not None:
        rows = getattr(model_config.get_text_config(), "vocab_size", None)
        encoder = Encoder(tokenizer, settings.prompt_template, context_length(model_config), rows)
    dtype = _dtype(settings.dtype, model_config, stored)
    return Outline(name, model_config, encoder, dtype, stored, settings.trust_remote_code, (*notes, *why_not))


def devices_here(config: RunConfig, *, number: int = 1, memory_gb: float | None = None, shard: bool = False) -> Devices:
    """The devices to plan for: those of this machine, unless their memory is given."""
    asked = config.model.device
    if memory_gb is not None:  # of a device that need not be here
        return Devices("cuda" if asked == "auto" else asked, memory_gb * GB, number, shard)
    kind = pick_device(asked).type
    return Devices(kind, _memory_there(kind), number, shard)


def _memory_there(kind: str) -> float | None:
    if kind == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines)
    return 1024.0 * int(told["MemAvailable"].split()[0])


def measured_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Speed:
    """The device's rate of matrix products, its copies and its smallest operation, each timed for a moment."""
    side = 4096 if device.type == "cuda" else 768
    one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = _each(lambda: one @ two, device, seconds)
    block = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(block)
    copy = _each(lambda: target.copy_(block), device, seconds)
    small = torch.ones(8, device=device)
    operation = _each(lambda: small + small, device, seconds / 3)
    rate = 2 * side**3 / product
    bandwidth = 2 * block.numel() * block.itemsize / copy
    source = (
        f"measured on this {device.type}: {rate / 1e12:.3g} TFLOP/s of matrix products, of which {EFFICIENCY:.0%} are "
        f"reckoned with, {bandwidth / GB:.3g} GB/s"
    )
    return Speed(EFFICIENCY * rate, bandwidth, operation, source)


def _each(run: Any, device: torch.device, seconds: float) -> float:
    """Seconds of one call, the median of several rounds."""
    rounds: list[float] = []
    run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 3:
        _wait(device)
        start = time.perf_counter()
        for _ in range(4):
            run()
        _wait(device)
        rounds.append((time.perf_counter() - start) / 4)
    return sorted(rounds)[len(rounds) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed_of(text: str, stages: Sequence[StagePlan], config: RunConfig, devices: Devices) -> Speed:
    """`400` is TFLOP/s that training reaches on a device, `12000tokens/s` what all train on; `measure` times this one.

    Raises:
        ConfigError: it is none of them, or no stage has FLOPs to turn tokens into.
    """
    if text == MEASURE:
        halves = config.learn.dtype == "bfloat16"
        return measured_speed(torch.device(devices.kind), torch.bfloat16 if halves else torch.float32)
    plain = text.strip().lower().replace(" ", "")
    in_tokens = plain.endswith("tokens/s")
    number = plain.removesuffix("tokens/s").removesuffix("tflop/s").removesuffix("tflops")
    try:
        rate = float(number)
    except ValueError:
        rate = -1
    if not 0 < rate < math.inf:
        raise ConfigError(f"--rate {text}: expected TFLOP/s (400) or tokens a second (12000tokens/s).")
    if not in_tokens:
        return Speed(rate * 1e12, source=f"at {rate:g} TFLOP/s, as given")
    trained = [stage for stage in stages if stage.trained and stage.flops]
    if not trained:
        raise ConfigError(f"--rate {text}: the model could not be traced; give TFLOP/s.")
    per_token = sum(stage.flops or 0 for stage in trained) / sum(stage.tokens for stage in trained)
    return Speed(rate * per_token, source=f"at {rate:g} tokens/s of training, as given")


# From the config to loads ------------------------------------------------------------------------


def _loads(outline: Outline, config: RunConfig, facts: FactSet, kind: str) -> tuple[list[Load], list[str]]:
    """A load per stage, in their order, on a kind of device, and what was guessed."""
    notes: list[str] = []
    chosen = list(facts)[:: max(1, math.ceil(len(facts) / MOST_ENCODED))]
    encode = _Encode(outline.encoder)
    waiting = frozenset(facts.to_ask)  # answers that are not known yet: taken to be as long as the new ones
    olds = [(f.prompt, f.ground_truth or f.target_new) for f in chosen if f.ground_truth or f.id in waiting]
    old = Texts(tuple(encode.pairs(olds)), _held(facts))
    new = Texts(tuple(encode.pairs((f.prompt, f.target_new) for f in chosen)), len(facts))
    read = Texts(tuple(encode.pairs(_read(chosen))), round(sum(1 for _ in _read(chosen)) * len(facts) / len(chosen)))
    if outline.encoder is None:
        notes.append(f"no tokenizer could be had: {WORD_TOKENS} tokens a word are assumed")
    elif len(chosen) < len(facts):
        notes.append(f"tokens are those of {len(chosen):,} of the {len(facts):,} facts, scaled up")
    loads: list[Load] = []
    for name, how, settings, texts, passes, frozen in _stages(config, old, new):
        load, problem = _train_load(outline, name, how, settings, texts, passes, frozen)
        if how == "lora" and isinstance(settings, TuningSettings):
            left = out_of_loras_reach(outline.skeleton().model, [(how, settings)])
            notes += [left] if left else []
        if (name, how) == ("forget", "all weights"):
            load = _with_base(load, config)
            if config.forget.keep:  # what it measured stays beside the weights
                loads.append(_keep_load(load, config, facts, outline, encode))
                load = replace(load, host_bytes=load.host_bytes + FLOAT32 * load.trained)
        loads.append(load)
        notes += [problem] if problem else []
    if config.forget.only_known and METHODS[config.method].forgets and config.teach.epochs == 0:
        notes.append("forgetting takes only facts that the model holds (forget.only_known); all are reckoned with")
    if config.evaluate.engine == "vllm":
        notes.append("answers are reckoned as those of transformers; vLLM takes what is free of a GPU for a while")
    load, problem = _score_load(outline, config, read, chosen, len(facts), kind)
    loads.append(load)
    notes += [problem] if problem else []
    return loads, list(dict.fromkeys(notes))


def _stages(
    config: RunConfig, old: Texts, new: Texts
) -> Iterator[tuple[str, How, TrainSettings, Texts, int, list[TuningSettings]]]:
    """Name, kind, settings, texts, passes and LoRA stages before, of what is trained."""
    method = METHODS[config.method]
    forgets = method.forgets is not None and config.forget.coef != 0 and old.number > 0
    if config.teach.epochs and old.number > 0:
        yield "teach", "all weights", config.teach, old, config.teach.epochs, []
    if forgets and method.forgets is not None:
        yield "forget", method.forgets, config.forget, old, config.forget.epochs, []
    before: list[TuningSettings] = [config.forget] if forgets and method.forgets == "lora" else []
    trials = config.forget.trials if forgets and config.forget.coef == AUTO and config.forget.search == "full" else 1
    yield "learn", method.learns, config.learn, new, config.learn.epochs * trials, before


def _train_load(
    outline: Outline,
    name: str,
    how: How,
    settings: TrainSettings,
    texts: Texts,
    passes: int,
    frozen: Sequence[TuningSettings],
) -> tuple[Load, str | None]:
    """The load of a stage, and what kept its step from being traced."""
    skeleton = outline.skeleton(outline.dtype if how == "lora" else torch.float32)
    trained = skeleton.prepare(how, settings, frozen)
    micro = settings.micro_batch_size or settings.batch_size
    step, problem = _traced(lambda: skeleton.train_step(texts.largest_batch(micro, passes), settings, pad_id=0))
    load = Load(
        name=name,
        how=how,
        texts=texts.number,
        tokens=texts.tokens,
        passes=passes,
        batch_size=settings.batch_size,
        micro_batch_size=micro,
        weights_bytes=skeleton.weights_bytes,
        trained=trained,
        kept_bytes=FLOAT32 * trained if how == "bounded" else 0,
        largest_layer_bytes=skeleton.largest_layer_bytes,
        step=step,
        states_bytes=skeleton.states_bytes(settings.optim),
        paged=settings.optim.startswith("paged"),
    )
    return load, problem


def _with_base(load: Load, config: RunConfig) -> Load:
    """Forgetting with the base beside it, for the subtraction: on the CPU, or in a file where the CPU trains."""
    in_memory = config.forget.coef == AUTO or load.weights_bytes < SMALL_BYTES
    if in_memory:
        return replace(load, host_bytes=load.weights_bytes)
    return replace(load, base_bytes=load.weights_bytes)


def _keep_load(forget: Load, config: RunConfig, facts: FactSet, outline: Outline, encode: _Encode) -> Load:
    """Measuring the facts to keep: one more fine-tuning, or the gradient of each text, kept and forgotten."""
    kept = read_keep(config.forget, facts)
    texts = list(encode.pairs((fact.prompt, fact.ground_truth or "") for fact in kept))
    tokens = sum(len(text.ids) for text in texts)
    if config.forget.keep_by == "projection":
        return replace(forget, name="keep", how="projection", texts=len(texts), tokens=tokens)
    skeleton = outline.skeleton(torch.float32)
    trained = skeleton.prepare("all weights", config.forget)
    longest = max(texts, key=lambda text: len(text.ids))
    step, _problem = _traced(lambda: skeleton.train_step([longest], StageSettings(batch_size=1), pad_id=0))
    return replace(
        forget,
        name="keep",
        how="fisher",
        texts=forget.texts + len(texts),
        tokens=forget.tokens + tokens,
        passes=1,
        batch_size=1,
        micro_batch_size=1,
        states_bytes=0,
        host_bytes=forget.host_bytes + 2 * FLOAT32 * trained,  # the squares of both
        step=step,
    )


def _score_load(
    outline: Outline, config: RunConfig, read: Texts, chosen: Sequence[Fact], n_facts: int, kind: str
) -> tuple[Load, str | None]:
    """Scoring in all phases, and the answers that are generated, as long as they may be."""
    method, size = METHODS[config.method], config.evaluate.batch_size
    forgets = method.forgets is not None and config.forget.coef != 0
    phases = 2 + (forgets and config.evaluate.every_phase)
    asked = {prompt for fact in chosen for prompt in (fact.prompt, *fact.rephrase_prompts)}
    batches = math.ceil(len(asked) * n_facts / len(chosen) / size) if "generate" in config.evaluate.protocols else 0
    longest = config.evaluate.max_new_tokens
    rooms = [max(longest, len(text.answer_ids) + MARGIN_TOKENS) for text in read.sample] or [longest]
    skeleton = outline.skeleton(torch.float32 if method.learns != "lora" else None)
    row = read.fullest_row(size, ROW_TOKENS.get(kind, GPU_ROW_TOKENS))
    step, problem = _traced(lambda: skeleton.read_step(row))
    if problem:  # a model that takes no such mask
        step, problem = _traced(lambda: skeleton.read_step(row, shared=False))
    answers = None
    if batches or (forgets and config.forget.only_known):  # what is known is asked too
        widest = max(text.n_prompt_tokens for text in read.sample)
        prompts = min(size, round(len(asked) * n_facts / len(chosen)))
        answers, problem = _traced(lambda: skeleton.answer_bytes(prompts, widest, max(rooms)))
    load = Load(
        name="score",
        how=f"{phases} phases",
        texts=read.number,
        tokens=read.tokens,
        passes=phases,
        batch_size=size,
        micro_batch_size=size,
        weights_bytes=skeleton.weights_bytes,
        step=step,
        answer_steps=round(phases * batches * sum(rooms) / len(rooms)),
        answer_bytes=answers or 0,
    )
    return load, problem


def _traced(trace: Callable[[], T]) -> tuple[T | None, str | None]:
    """What was traced, or why there is nothing: a model of another kind may ask for numbers, and there are none."""
    try:
        return trace(), None
    except ForgetLearnError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        return None, f"a step of this model cannot be traced, so activations and time are left out: {reason}"


def _held(facts: FactSet) -> int:
    """Return the number of facts that can be forgotten, including those the model has still to be asked about."""
    return len(facts.to_ask) + sum(1 for fact in facts if fact.ground_truth)


def _read(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Pairs that scoring reads."""
    for fact in facts:
        for prompt in (fact.prompt, *fact.rephrase_prompts):
            yield prompt, fact.target_new
            if fact.ground_truth:
                yield prompt, fact.ground_truth
        yield from ((probe.prompt, probe.answer) for probe in fact.locality)


class _Encode:
    """Pairs to token ids, or to as many as their words stand for where there is no tokenizer."""

    def __init__(self, encoder: Encoder | None) -> None:
        self.encoder = encoder

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Encoded]:
        for prompt, answer in pairs:
            try:
                yield self.encoder.encode(prompt, answer, end=True) if self.encoder else _by_words(prompt, answer)
            except FactError:  # of a text that is only scored, where it counts as errored
                continue


def _by_words(prompt: str, answer: str) -> Encoded:
    before, after = (max(1, round(WORD_TOKENS * len(text.split()))) for text in (prompt, answer))
    return Encoded((0,) * (1 + before + after + 1), 1 + before)


# What the files say -------------------------------------------------------------------------------


def _stored(name: str, revision: str | None) -> tuple[dict[str, int] | None, list[str]]:
    """Numbers by dtype from the headers of a folder, the hub's cache or the hub; or why there are none."""
    folder = Path(name)
    if not folder.is_dir():
        cached = (try_to_load_from_cache(name, file, revision=revision) for file in (WHOLE, INDEX))
        found = next((Path(path).parent for path in cached if isinstance(path, str)), None)
        if found is None:
            return _stored_on_hub(name, revision)
        folder = found
    try:
        counts: Counter[str] = Counter()
        for entry in CheckpointFolder(folder).entries.values():
            counts[entry.dtype] += entry.n_entries
    except ModelError as error:
        if Path(name).is_dir():
            raise
        return None, [f"the headers in the hub's cache cannot be read ({error}); sizes are those of the config"]
    return dict(counts), []


def _stored_on_hub(name: str, revision: str | None) -> tuple[dict[str, int] | None, list[str]]:
    try:
        counts = get_safetensors_metadata(name, revision=revision).parameter_count
        return {str(dtype): n for dtype, n in counts.items()}, []
    except NotASafetensorsRepoError:
        return None, [f"{name} has no safetensors on the hub, which update needs; sizes are those of its config"]
    except Exception as error:  # of the network, the hub and its answers: nothing in common
        return None, [f"no headers from the hub ({type(error).__name__}); sizes are those of the config"]


def _dtype(wanted: str, config: Any, stored: dict[str, int] | None) -> torch.dtype:
    """The dtype that the weights are loaded in: as transformers takes it."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    told = getattr(config, "dtype", None)
    if isinstance(told, torch.dtype):
        return told
    floats = {name: n for name, n in (stored or {}).items() if name in TORCH and TORCH[name].is_floating_point}
    return TORCH[max(floats, key=lambda name: floats[name])] if floats else torch.float32


def _header_notes(outline: Outline, parameters: int) -> list[str]:
    there = sum((outline.stored or {}).values())
    if not outline.stored or abs(there - parameters) <= 0.01 * parameters:
        return []
    return [f"its files hold {there:,} numbers, a model of its config {parameters:,}; reckoned with the config's"]


def _disk(
    config: RunConfig, loads: Sequence[Load], own_bytes: int, parameters: int, devices: Devices
) -> dict[str, float]:
    """Bytes that the run folder takes, by part; weights between stages and checkpoints go in the end."""
    learns = next(load for load in loads if load.name == "learn")
    forgets = next((load for load in loads if load.name == "forget"), None)
    frozen = forgets.trained if forgets and forgets.how == "lora" else 0
    disk: dict[str, float] = {"product": own_bytes}
    if learns.how == "lora":
        disk["product"] = FLOAT32 * (learns.trained + frozen)
    if forgets:
        disk["between stages"] = FLOAT32 * (frozen or parameters)
    if forgets and forgets.base_bytes and devices.kind == "cpu":
        disk["base, while forgetting"] = forgets.base_bytes
    # Trained weights and the optimiser's states; the next one is whole before the last one goes.
    disk["checkpoints"] = 2 * max(FLOAT32 * load.trained + load.states_bytes for load in loads)
    if config.teach.epochs:
        disk["taught base"] = own_bytes
    if config.save_merged and learns.how == "lora":
        disk["merged"] = own_bytes
    if config.keep_change and learns.how != "lora":
        disk["change"] = own_bytes
    return disk


# What to change -----------------------------------------------------------------------------------


def _advice(
    loads: Sequence[Load], devices: Devices, outline: Outline, config: RunConfig, facts: FactSet
) -> Iterator[str]:
    """What fits, each tried by reckoning it; or that nothing does."""
    found = False
    for words, changed, others in _alternatives(config, devices):
        tried = _loads(outline, changed, facts, devices.kind)[0] if changed else loads
        peak = max(plan_stage(load, others).peak_bytes for load in tried)
        if peak <= (devices.memory_bytes or 0):
            found = True
            yield f"{words}: {show_bytes(peak)}"
    if not found:
        yield "nothing that was tried fits: take more or larger devices, or a smaller model"


def _alternatives(config: RunConfig, devices: Devices) -> Iterator[tuple[str, RunConfig | None, Devices]]:
    """In words, the config (None: as it is) and the devices."""
    own = {stage: getattr(config, stage) for stage in ("forget", "learn")}
    if any((stage.micro_batch_size or stage.batch_size) > 1 for stage in own.values()):
        one = {name: stage.model_copy(update={"micro_batch_size": 1}) for name, stage in own.items()}
        words = "--set forget.micro_batch_size=1 --set learn.micro_batch_size=1"
        yield words, config.model_copy(update=one), devices
    lora = {"f-ft": "f-lora", "f-lora-ft": "f-lora", "ft": "lora"}.get(config.method)
    if lora and config.teach.epochs == 0:
        half = config.model.model_copy(update={"dtype": "bfloat16"})
        yield f"--method {lora}", config.model_copy(update={"method": lora}), devices
        if config.model.dtype == "float32":
            words = f"--method {lora} --set model.dtype=bfloat16"
            yield words, config.model_copy(update={"method": lora, "model": half}), devices
    start = 2 * devices.number if devices.shard else max(2, devices.number)
    for number in (start, 2 * start, 4 * start):
        yield f"--gpus {number} --shard", None, replace(devices, number=number, shard=True)
