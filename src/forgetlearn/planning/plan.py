"""Plan an update before anything is trained or downloaded in full."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from forgetlearn.config.methods import KINDS, METHODS
from forgetlearn.config.schema import ModelSettings, RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError
from forgetlearn.facts import FactSet
from forgetlearn.models.batches import SMALL_MODEL
from forgetlearn.models.language_model import LanguageModel, may_hold_float32, parameter_count, slow_dtypes
from forgetlearn.models.loading import pick_device
from forgetlearn.models.onednn import fast_linear_layers
from forgetlearn.models.texts import check_texts
from forgetlearn.planning.estimate import (
    FLOAT32,
    GB,
    Devices,
    Load,
    Plan,
    Speed,
    StagePlan,
    counts_line,
    plan_stage,
    show_bytes,
    show_range,
    show_seconds,
    summary_line,
)
from forgetlearn.planning.loads import loads_of, spread_of, staged, train_loads
from forgetlearn.planning.outline import Outline, outline_of
from forgetlearn.planning.texts import counts_of
from forgetlearn.storage.records import Manifest

log = logging.getLogger("forgetlearn")
MEASURE = "measure"
WITH_ADAPTER = {"f-ft": "f-lora", "f-lora-ft": "f-lora", "ft": "lora"}  # methods of the same purpose
MUCH_FASTER = 2 / 3  # of the time
EFFICIENCY = 0.7  # share of a GPU's measured matrix rate that a step reaches (docs/plan.md)


@torch.inference_mode(False)  # it traces a training step
def plan_update(
    config: RunConfig,
    facts: FactSet,
    *,
    outline: Outline | None = None,
    devices: Devices | None = None,
    rate: str | Speed | None = None,
    compare: bool = False,
) -> Plan:
    """Plan an update of these facts with these settings, without reading the model's weights.

    `rate` is the speed of training, or its text, see `speed_of`; without it, the plan has no time. With
    `compare`, it says if an adapter would train much faster.

    Raises:
        ModelError: the model's config or tokenizer cannot be read, see `load_model`.
        ConfigError: no model is named, or a stage's settings do not fit the model.
        FactError: the model cannot be trained on a text of a fact, see `check_texts`.
    """
    devices = devices or devices_here(config)
    if outline is None:
        outline = _as_held(outline_of(config.model), config.model, devices)
        if outline.encoder is not None:
            check_texts(outline.encoder, facts)
    loads, notes = loads_of(outline, Stages(config), facts, devices.kind)
    if isinstance(rate, str):
        dtype = outline.computes_in(METHODS[config.method].last)
        speed: Speed | None = speed_of(rate, [plan_stage(load, devices) for load in loads], config, devices, dtype)
    else:
        speed = rate
    skeleton = outline.skeleton()
    parameters = parameter_count(skeleton.model)
    held = sum((outline.stored or {}).values())
    if outline.stored and abs(held - parameters) > 0.01 * parameters:
        notes = [f"its files hold {held:,} numbers, a model of its config {parameters:,}; the plan uses these", *notes]
    plan = Plan(
        model=outline.name,
        method=config.method,
        parameters=parameters,
        facts=len(facts),
        stages=tuple(plan_stage(load, devices, speed) for load in loads),
        disk=_disk(config, loads, skeleton.weights_bytes, parameters, devices),
        devices=devices,
        speed=speed,
        notes=(*outline.notes, *notes),
        inputs={"stored": outline.stored, "dtype": str(outline.dtype).removeprefix("torch.")},
    )
    if plan.fits is False:
        return replace(plan, advice=tuple(_advice(loads, devices, outline, config, facts)))
    if compare and speed is not None and (line := _faster(plan, loads, outline, config, facts, speed)):
        return replace(plan, advice=(line,))
    return plan


def _as_held(outline: Outline, settings: ModelSettings, devices: Devices) -> Outline:
    """Return the outline of a model as `load_model` would hold its weights on these devices."""
    parameters = parameter_count(outline.skeleton().model)
    slow = slow_dtypes([outline.dtype], devices.kind, parameters) and not devices.shard
    return replace(outline, in_float32=bool(slow) and may_hold_float32(settings, parameters))


def _faster(
    plan: Plan, loads: Sequence[Load], outline: Outline, config: RunConfig, facts: FactSet, speed: Speed
) -> str | None:
    """Return a line on the adapter method of the same purpose if it trains in less than MUCH_FASTER of the time."""
    other = WITH_ADAPTER.get(config.method)
    if other is None or config.teach.epochs:
        return None
    changed = Stages(config.model_copy(update={"method": other}))
    read = next((load.step for load in loads if not load.trained), None)
    tried = train_loads(outline, changed, facts, plan.devices.kind, read)[0]
    own = [stage.seconds for load, stage in zip(loads, plan.stages, strict=True) if load.trained]
    ours, theirs = _total(own), _total([plan_stage(load, plan.devices, speed).seconds for load in tried])
    if ours is None or theirs is None or theirs >= MUCH_FASTER * ours:
        return None
    return f"--method {other}: trains in about {show_seconds(theirs)} instead of {show_seconds(ours)}"


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _disk(
    config: RunConfig, loads: Sequence[Load], own_bytes: int, parameters: int, devices: Devices
) -> dict[str, float]:
    """Return the bytes of the run folder, by part. Weights between stages and checkpoints are removed at the end."""
    forgets = next((load for load in loads if load.name == "forget"), None)
    learns = next((load for load in loads if load.name == "learn"), None)
    adapter = METHODS[config.method].makes_adapter
    if learns is None and not METHODS[config.method].learns:
        learns, forgets = forgets, None  # what forgets makes the product
    if learns is None:  # a method that changes no weight makes no product
        return {}
    frozen = forgets.trained if forgets and KINDS[forgets.how].adapter else 0
    disk: dict[str, float] = {"product": FLOAT32 * (learns.trained + frozen) if adapter else own_bytes}
    if forgets:
        disk["between stages"] = FLOAT32 * (frozen or parameters)
    if forgets and forgets.base_bytes and devices.kind == "cpu":
        disk["base, while forgetting"] = forgets.base_bytes
    # Trained weights and the optimiser's states. A checkpoint is complete before the previous one is removed.
    disk["checkpoints"] = 2 * max(FLOAT32 * load.trained + load.states_bytes for load in loads)
    if config.teach.epochs:
        disk["taught base"] = own_bytes
    if config.save_merged and adapter:
        disk["merged"] = own_bytes
    if config.keep_change and not adapter:
        disk["change"] = own_bytes
    return disk


def _advice(
    loads: Sequence[Load], devices: Devices, outline: Outline, config: RunConfig, facts: FactSet
) -> Iterator[str]:
    """Yield each alternative that fits, with its memory; if none does, one line that says so."""
    found = False
    for words, changed, model, others in _alternatives(config, outline, devices):
        tried = loads_of(model, Stages(changed), facts, devices.kind)[0] if changed else loads
        peak = max(plan_stage(load, others).peak_bytes for load in tried)
        if peak <= (devices.memory_bytes or 0):
            found = True
            yield f"{words}: {show_bytes(peak)}"
    if not found:
        yield "nothing that was tried fits: take more or larger devices, or a smaller model"


def _alternatives(
    config: RunConfig, outline: Outline, devices: Devices
) -> Iterator[tuple[str, RunConfig | None, Outline, Devices]]:
    """Yield (flags, the config that they result in, the model, the devices); the config is None if it is unchanged."""
    if any((config.train.micro_batch_size or stage.batch_size) > 1 for stage in (config.forget, config.learn)):
        train = config.train.model_copy(update={"micro_batch_size": 1})
        yield "--set train.micro_batch_size=1", config.model_copy(update={"train": train}), outline, devices
    lora = WITH_ADAPTER.get(config.method)
    if lora and config.teach.epochs == 0:
        adapter = config.model_copy(update={"method": lora})
        yield f"--method {lora}", adapter, outline, devices
        if outline.dtype == torch.float32 or outline.in_float32:
            half = replace(outline, dtype=torch.bfloat16, in_float32=False)
            yield f"--method {lora} --set model.dtype=bfloat16", adapter, half, devices
    start = 2 * devices.number if devices.shard else max(2, devices.number)
    for number in (start, 2 * start, 4 * start):
        yield f"--gpus {number} --shard", None, outline, replace(devices, number=number, shard=True)


# Devices and their speed ----------------------------------------------------------------------------------


def devices_here(config: RunConfig, *, number: int = 1, memory_gb: float | None = None, shard: bool = False) -> Devices:
    """Return the devices to plan for: this machine's, unless their memory is given."""
    asked = config.model.device
    if memory_gb is not None:  # the device need not be in this machine
        return Devices("cuda" if asked == "auto" else asked, memory_gb * GB, number, shard)
    kind = pick_device(asked).type
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else psutil.virtual_memory().available
    return Devices(kind, float(free), number, shard)


def measured_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Speed:
    """Return a device's speed, from briefly timing matrix products, copies and its smallest operation."""
    side = 4096 if device.type == "cuda" else 768
    block = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(block)
    bandwidth = 2 * block.numel() * block.itemsize / _seconds_of(lambda: target.copy_(block), seconds)
    small = torch.ones(8, device=device)
    operation = _seconds_of(lambda: small + small, seconds / 3)
    if device.type == "cpu":
        # Where products in half precision are faster, the rest of a step outlasts them: by their speed an update of
        # SmolLM2 was planned at 70 to 100 s, by float32's at 3 to 5 minutes. It took 6.
        rate, reading = min(_rate_of_layers(kind, seconds) for kind in {torch.float32, dtype})
        reading = max(reading, bandwidth / 4)  # threads that wait for another program's core read nothing
        source = f"measured on this cpu: {rate / 1e12:.3g} TFLOP/s of layers' products, {bandwidth / GB:.3g} GB/s"
        return Speed(rate, bandwidth, operation, source, reading)
    one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rate = 2 * side**3 / _seconds_of(lambda: one @ two, seconds)
    source = (
        f"measured on this {device.type}: {rate / 1e12:.3g} TFLOP/s of matrix products, of which {EFFICIENCY:.0%} are "
        f"assumed, {bandwidth / GB:.3g} GB/s"
    )
    return Speed(EFFICIENCY * rate, bandwidth, operation, source)


@torch.inference_mode()
def _rate_of_layers(dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """Return the rate of a CPU's products with weights, FLOP/s, and the bytes of weights that it reads a second.

    A model's weights do not stay in the cache from one pass to the next, which halves the rate. So products of few and
    of many rows are timed over more weights than a cache holds, and a line is laid through both.
    """
    few, many = 16, 256
    weights = [torch.randn(1536, 768).to(dtype) for _ in range(32)]
    rows = torch.randn(many, 768).to(dtype)
    with fast_linear_layers():
        layers = [_layer(weight) for weight in weights]
        short, long = (_seconds_of(partial(_pass, layers, rows[:number]), seconds) for number in (few, many))
    numbers = sum(weight.numel() for weight in weights)
    a_row = max(long - short, 0.1 * long) / (many - few)  # on a busy machine either may take long
    alone = max(short - few * a_row, 0.1 * short)
    return 2 * numbers / a_row, numbers * weights[0].itemsize / alone


def _pass(layers: Sequence[nn.Module], rows: Tensor) -> list[Tensor]:
    return [layer(rows) for layer in layers]


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _seconds_of(run: Callable[[], object], seconds: float) -> float:
    """Return the median seconds of one call, from calls repeated for about `seconds`."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def speed_of(
    text: str, planned: Sequence[StagePlan], config: RunConfig, devices: Devices, dtype: torch.dtype = torch.float32
) -> Speed:
    """Return the speed for a rate: `400` is TFLOP/s per device, `12000tokens/s` is training on all devices together.

    `measure` times this device, for weights in this dtype. Raise ConfigError for any other text, or if no stage has
    FLOPs to convert tokens with.
    """
    if text == MEASURE:
        in_bfloat16 = config.train.dtype == "bfloat16"
        return measured_speed(torch.device(devices.kind), torch.bfloat16 if in_bfloat16 else dtype)
    plain = text.strip().lower().replace(" ", "")
    try:
        rate = float(plain.removesuffix("tokens/s").removesuffix("tflop/s").removesuffix("tflops"))
    except ValueError:
        rate = -1
    if not 0 < rate < math.inf:
        raise ConfigError(f"--rate {text}: expected TFLOP/s (400) or tokens a second (12000tokens/s).")
    if not plain.endswith("tokens/s"):
        return Speed(rate * 1e12, source=f"at {rate:g} TFLOP/s, as given")
    trained = [stage for stage in planned if stage.trained and stage.flops]
    if not trained:
        raise ConfigError(f"--rate {text}: the model could not be traced; give TFLOP/s.")
    per_token = sum(stage.flops or 0 for stage in trained) / sum(stage.tokens for stage in trained)
    return Speed(rate * per_token, source=f"at {rate:g} tokens/s of training, as given")


# In the log of an update ----------------------------------------------------------------------------------


def plan_line(
    lm: LanguageModel, facts: FactSet, config: RunConfig, n_processes: int = 1
) -> tuple[str, dict[str, object]]:
    """Return a line about an update of a model in memory, and its figures for the manifest.

    Small models get no figures for memory and time: tracing one takes longer than these are worth.
    """
    if parameter_count(lm.model) < SMALL_MODEL:
        return _counts(lm, facts, config), {}
    dtype = max(Counter(lm.dtypes.values()).items(), key=lambda item: item[1])[0]
    outline = Outline(lm.name, lm.model.config, lm.encoder, dtype, in_float32=lm.in_float32)
    try:
        devices = devices_here(config, number=n_processes, shard=config.model.shard)
        plan = plan_update(config, facts, outline=outline, devices=devices, rate=MEASURE)
    except Exception as error:  # the model may not be built from its config alone, which is no reason not to update it
        return f"{_counts(lm, facts, config)}; memory is not known ({type(error).__name__})", {}
    if plan.fits is False:
        log.warning("memory: about %s are needed; forgetlearn plan says what would fit", show_bytes(plan.peak_bytes))
    figures = {"peak_memory_gb": round(plan.peak_bytes / GB, 3), "seconds": plan.seconds}
    return summary_line(plan), figures | {"seconds_range": plan.seconds_range}


def _counts(lm: LanguageModel, facts: FactSet, config: RunConfig) -> str:
    """Return the numbers of parameters, facts and steps, in words."""
    parameters, stages = parameter_count(lm.model), Stages(config)
    if stages.method.closed_form:
        return f"{counts_line(parameters, len(facts), {})} to write into the weights"
    steps: dict[str, tuple[int, int]] = {}
    for stage, texts, passes, _ in staged(stages, *counts_of(lm.encoder, stages, facts)):
        number = passes * math.ceil(texts.number / stage.settings.batch_size)
        low, high = spread_of(stage)
        steps[stage.name] = round(low * number), round(high * number)
    return counts_line(parameters, len(facts), steps)


def took(manifest: Manifest, device: torch.device) -> str:
    """Return one line on a finished run: the seconds of its stages and this process's peak memory, beside the plan."""
    planned = manifest.plan
    line = f"took {show_seconds(sum(stage.seconds for stage in manifest.stages.values()))}"
    if planned.get("seconds_range"):
        line += f" (planned {show_range(*planned['seconds_range'])})"
    line += f", at most {show_bytes(manifest.peak_memory_gb * GB)}"
    if device.type == "cuda":
        line += f" and {show_bytes(torch.cuda.max_memory_allocated(device))} on the device"
    return line + (f" (planned {show_bytes(planned['peak_memory_gb'] * GB)})" if planned else "")
