"""Estimate what an update takes, from numbers alone: memory by part, steps, seconds, and whether it fits.

For a stage that trains N numbers, in bytes and seconds (docs/plan.md has an example):

    memory    weights + kept + the optimiser's states (AdamW: 8 N) + the step's peak, which includes gradients (4 N)
    seconds   FLOPs / rate + (3 x weights a pass + 28 N + 2 x states a step) / bandwidth + operations x latency
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

GB = 1e9
FLOAT32 = 4
# Bytes moved through memory per trained number and step, besides the optimiser's states: the optimiser reads the weight
# and the gradient and writes the weight (12), clipping reads the gradient twice and writes it (12), backward (4).
MOVED_PER_TRAINED = 28
PASSES_OVER_WEIGHTS = 3  # one forward, two backward
CLOSE = 1.23  # planned and measured peaks were within this factor (docs/benchmarks.md)
# Memory of Python, torch and transformers while they train; for cuda, of its context and libraries.
RUNTIME_BYTES = {"cpu": 0.85e9, "cuda": 1.0e9}


@dataclass(frozen=True)
class Step:
    """One pass over one micro-batch. `peak_bytes` is the most memory in use besides the weights, gradients included."""

    tokens: int
    peak_bytes: int
    flops: int
    operations: int


@dataclass(frozen=True)
class Load:
    """The size of a stage. `trained` is 0 if it only reads; `tokens` counts one pass over the texts.

    `kept_bytes` are kept on the device, besides the weights. `host_bytes` are kept on the CPU, which may be the
    device. `base_bytes` are kept on the CPU too or, if the CPU trains, in a file. `states_bytes` can leave a GPU if
    they are `paged`.
    """

    name: str
    how: str
    texts: int
    tokens: int
    passes: int
    batch_size: int
    micro_batch_size: int
    weights_bytes: int
    trained: int = 0
    kept_bytes: int = 0
    host_bytes: int = 0
    largest_layer_bytes: int = 0
    step: Step | None = None
    answer_steps: int = 0  # steps of generation; each makes one token for every prompt of a batch
    states_bytes: int = 0
    base_bytes: int = 0
    paged: bool = False
    answer_bytes: int = 0  # of generation: the keys and values of a batch, and the other tensors in use

    @property
    def steps(self) -> int:
        """Number of optimiser steps, or of batches if the stage only reads."""
        return self.passes * math.ceil(self.texts / self.batch_size)


@dataclass(frozen=True)
class Devices:
    """The devices to run on. With `shard`, they divide weights, gradients and states; else each holds all of them."""

    kind: str
    memory_bytes: float | None
    number: int = 1
    shard: bool = False


@dataclass(frozen=True)
class Speed:
    """The speed of a device. A bandwidth or latency of None is ignored."""

    flops: float
    bandwidth: float | None = None
    latency: float | None = None
    source: str = "given"


@dataclass(frozen=True)
class StagePlan:
    """A stage and what it takes on each device; `memory` has the bytes of each part."""

    name: str
    how: str
    texts: int
    steps: int
    tokens: int
    trained: int
    memory: dict[str, float]
    host_bytes: float
    flops: float | None
    seconds: float | None

    @property
    def peak_bytes(self) -> float:
        """The sum of all parts."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """The plan of an update. `advice` says what would fit if this does not; `notes` says what was assumed."""

    model: str
    method: str
    parameters: int
    facts: int
    stages: tuple[StagePlan, ...]
    disk: dict[str, float]
    devices: Devices
    speed: Speed | None = None
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, object] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> float:
        """The most memory that a device needs at once."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> float:
        """The most main memory that one process needs at once for copies of weights; 0 if the device is the CPU."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """True if every stage fits the device; None if the device's memory is not known."""
        return None if self.devices.memory_bytes is None else self.peak_bytes <= self.devices.memory_bytes

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages; None if no rate is known or a stage could not be traced."""
        each = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(each) if len(each) == len(self.stages) else None

    def as_dict(self) -> dict[str, object]:
        """Return the plan and its totals as a dict for JSON."""
        sums = {"peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes, "fits": self.fits}
        stages = [asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages]
        return asdict(self) | sums | {"seconds": self.seconds, "stages": stages}


def plan_stage(load: Load, devices: Devices, speed: Speed | None = None) -> StagePlan:
    """Return what a stage takes on each device; FLOPs and seconds are None if no step could be traced."""
    flops = seconds = None
    if load.step is not None:
        flops = load.step.flops / load.step.tokens * load.tokens * load.passes / devices.number
        seconds = None if speed is None else _seconds(load, load.step, devices, speed, flops)
    host_bytes = load.host_bytes + load.base_bytes + (load.states_bytes if load.paged else 0)
    return StagePlan(
        name=load.name,
        how=load.how,
        texts=load.texts,
        steps=load.steps,
        tokens=load.tokens * load.passes,
        trained=load.trained,
        memory=_memory(load, devices),
        # Main memory is counted separately only if the device has memory of its own.
        host_bytes=0 if devices.kind == "cpu" else host_bytes / (devices.number if devices.shard else 1),
        flops=flops,
        seconds=seconds,
    )


def _memory(load: Load, devices: Devices) -> dict[str, float]:
    share = devices.number if devices.shard else 1
    gradients = FLOAT32 * load.trained
    leaves = load.paged and devices.kind != "cpu"
    peak = load.step.peak_bytes if load.step else gradients
    parts: dict[str, float] = {
        "runtime": RUNTIME_BYTES.get(devices.kind, RUNTIME_BYTES["cuda"]),
        "weights": load.weights_bytes / share,
        "kept": (load.kept_bytes + (load.host_bytes if devices.kind == "cpu" else 0)) / share,
        "optimizer": 0 if leaves else load.states_bytes / share,
        "gradients": gradients / share,
        # What the step's peak holds besides gradients: often little, because the peak is often near the step's end.
        "activations": max(0, peak - gradients, load.answer_bytes),
    }
    if devices.number > 1 and devices.shard:
        parts["gathered"] = 2 * load.largest_layer_bytes  # one layer in use, the next on its way
    elif devices.number > 1:
        parts["buckets"] = gradients  # DDP's own copy, which is sent during the backward pass
    return parts


def _seconds(load: Load, step: Step, devices: Devices, speed: Speed, flops: float) -> float:
    micro_steps = load.passes * math.ceil(load.texts / load.micro_batch_size)
    passes = math.ceil(micro_steps / devices.number) + load.answer_steps
    per_pass = PASSES_OVER_WEIGHTS if load.trained else 1
    moved = per_pass * load.weights_bytes * passes
    moved += (MOVED_PER_TRAINED * load.trained + 2 * load.states_bytes) * load.steps
    seconds = flops / speed.flops
    seconds += moved / speed.bandwidth if speed.bandwidth else 0
    return seconds + (step.operations * passes * speed.latency if speed.latency else 0)


# In words -------------------------------------------------------------------------------------------------


def summary_line(plan: Plan) -> str:
    """Return the plan in one line: parameters, facts, steps, memory, and time if it is known."""
    steps = " + ".join(f"{stage.steps:,} steps to {stage.name}" for stage in plan.stages if stage.trained)
    facts = f"{plan.facts:,} fact{'s' * (plan.facts != 1)}"
    line = f"plan: {show_count(plan.parameters)} parameters, {facts}, {steps}"
    line += f", about {show_bytes(plan.peak_bytes)}" + (" a device" if plan.devices.number > 1 else "")
    if plan.seconds is None:
        return line
    return f"{line}, at least {show_seconds(plan.seconds)} of training on the facts and scoring them"


def show_count(number: float) -> str:
    """Format `6738415616` as `6.74 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def show_bytes(number: float) -> str:
    """Format bytes in GB (1e9 bytes), or in MB below 1 GB."""
    if number >= GB:
        return f"{number / GB:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e7 else f"{number / 1e6:.2g} MB"


def show_seconds(seconds: float) -> str:
    """Format seconds in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan as lines for a terminal."""
    parts = list(dict.fromkeys(part for stage in plan.stages for part in stage.memory))
    head = ["stage", "texts", "steps", "tokens", "trained", *parts, "peak", "TFLOP", "time"]
    rows = [head, *(_cells(stage, parts) for stage in plan.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    per = f" on each of {plan.devices.number} devices" if plan.devices.number > 1 else ""
    time = "-"
    if plan.seconds is not None and plan.speed is not None:
        time = f"{show_seconds(plan.seconds)} ({plan.speed.source})"
    return [
        f"{plan.model}: {show_count(plan.parameters)} parameters; {plan.method}; {plan.facts:,} facts",
        "",
        *table,
        "",
        f"memory   {show_bytes(plan.peak_bytes)}{per}{_verdict(plan)}",
        *([f"host     {show_bytes(plan.host_bytes)} of main memory per process"] if plan.host_bytes else []),
        "disk     " + ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.disk.items()),
        f"time     {time}",
        *(f"note     {note}" for note in plan.notes),
        *(f"try      {line}" for line in plan.advice),
    ]


def _cells(stage: StagePlan, parts: Sequence[str]) -> list[str]:
    shown = [show_bytes(stage.memory[part]) if stage.memory.get(part) else "-" for part in parts]
    trained = show_count(stage.trained) if stage.trained else "-"
    tera = "-" if stage.flops is None else f"{stage.flops / 1e12:.3g}"
    time = "-" if stage.seconds is None else show_seconds(stage.seconds)
    counts = [f"{stage.texts:,}", f"{stage.steps:,}", f"{stage.tokens:,}", trained]
    return [stage.name, *counts, *shown, show_bytes(stage.peak_bytes), tera, time]


def _verdict(plan: Plan) -> str:
    if plan.devices.memory_bytes is None:
        return ""
    free = show_bytes(plan.devices.memory_bytes)
    if plan.fits and plan.peak_bytes > plan.devices.memory_bytes / CLOSE:
        return f": just fits in {free}, and the estimate is good to about a sixth"
    return f": fits in {free}" if plan.fits else f": does not fit in {free}"
