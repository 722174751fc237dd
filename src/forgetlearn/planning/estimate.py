"""What an update will take, from numbers alone: memory by part, steps, seconds, disk, and whether it fits.

Bytes and seconds of a stage, with N numbers that are trained (docs/plan.md has them with an example):

    memory    weights + kept + the optimiser's states (AdamW: 8 N) + the step's peak, in which gradients (4 N) are
    seconds   FLOPs / rate + (3 x weights a pass + 28 N + 2 x states a step) / bandwidth + operations x latency
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GB = 1e9
FLOAT32 = 4
# Bytes that pass through memory for a trained number in a step, beside the optimiser's states: it reads weight and
# gradient and writes the weight (12), clipping reads the gradient twice and writes it (12), backward writes it (4).
MOVED_PER_TRAINED = 28
PASSES_OVER_WEIGHTS = 3  # forward, and twice backward
CLOSE = 1.23  # planned and measured peaks were within this factor (docs/benchmarks.md)
# Python with torch and transformers, and what they load and keep while they train; CUDA's context and libraries.
RUNTIME_BYTES = {"cpu": 0.85e9, "cuda": 1.0e9}


@dataclass(frozen=True)
class Step:
    """One pass over one micro-batch: `peak_bytes` is the most that is alive beside the weights, gradients included."""

    tokens: int
    peak_bytes: int
    flops: int
    operations: int


@dataclass(frozen=True)
class Load:
    """What a stage consists of. `trained` is 0 where nothing learns; `tokens` are those of one pass over the texts.

    `kept_bytes` lie beside the weights on the device, `host_bytes` on the CPU, which may be the device, and
    `base_bytes` there too or, where the CPU trains, in a file. `states_bytes` leave a GPU where they are `paged`.
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
    answer_steps: int = 0  # of generation, one token for a batch each
    states_bytes: int = 0
    base_bytes: int = 0
    paged: bool = False
    answer_bytes: int = 0  # of generation: a batch's keys and values, and what else is alive then

    @property
    def steps(self) -> int:
        """Optimiser steps; batches where nothing learns."""
        return self.passes * math.ceil(self.texts / self.batch_size)

    @property
    def micro_steps(self) -> int:
        """Passes through the model."""
        return self.passes * math.ceil(self.texts / self.micro_batch_size)


@dataclass(frozen=True)
class Devices:
    """Where it will run; `shard` splits weights, gradients and states over the devices, else each holds all of them."""

    kind: str
    memory_bytes: float | None
    number: int = 1
    shard: bool = False


@dataclass(frozen=True)
class Speed:
    """How fast a device is; a bandwidth or latency of None is left out of the sum."""

    flops: float
    bandwidth: float | None = None
    latency: float | None = None
    source: str = "given"


@dataclass(frozen=True)
class StagePlan:
    """A stage with what it takes on each device; `memory` is by part, in bytes."""

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
        """All parts together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What an update will take. `advice` says what would fit where this does not; `notes` what was guessed."""

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
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> float:
        """Most memory that a device needs at once."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> float:
        """Most memory beside the device's own that one process needs at once, in copies of weights."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits a device; None where its memory is not known."""
        return None if self.devices.memory_bytes is None else self.peak_bytes <= self.devices.memory_bytes

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where no rate is known or a stage could not be traced."""
        each = [stage.seconds for stage in self.stages]
        return None if None in each else sum(seconds for seconds in each if seconds is not None)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        sums = {"peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes, "fits": self.fits}
        stages = [asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages]
        return asdict(self) | sums | {"seconds": self.seconds, "stages": stages}


def plan_stage(load: Load, devices: Devices, speed: Speed | None = None) -> StagePlan:
    """What a stage takes on each device."""
    flops = _flops(load, devices)
    return StagePlan(
        name=load.name,
        how=load.how,
        texts=load.texts,
        steps=load.steps,
        tokens=load.tokens * load.passes,
        trained=load.trained,
        memory=_memory(load, devices),
        host_bytes=_host_bytes(load, devices),
        flops=flops,
        seconds=None if speed is None or flops is None else _seconds(load, devices, speed, flops),
    )


def _host_bytes(load: Load, devices: Devices) -> float:
    """Bytes of the machine's own memory, where the device has another."""
    if devices.kind == "cpu":
        return 0
    paged = load.states_bytes if load.paged else 0
    return (load.host_bytes + load.base_bytes + paged) / (devices.number if devices.shard else 1)


def _memory(load: Load, devices: Devices) -> dict[str, float]:
    """Bytes on each device, by part."""
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
        # What a step has beside the gradients at its worst moment; that is often near its end, when it is little.
        "activations": max(0, peak - gradients, load.answer_bytes),
    }
    if devices.number > 1 and devices.shard:
        parts["gathered"] = 2 * load.largest_layer_bytes  # one layer in use, the next on its way
    elif devices.number > 1:
        parts["buckets"] = gradients  # DDP's own copy, which is sent while the backward pass goes on
    return parts


def _flops(load: Load, devices: Devices) -> float | None:
    """Of the whole stage on each device; None where no step could be traced."""
    if load.step is None:
        return None
    return load.step.flops / load.step.tokens * load.tokens * load.passes / devices.number


def _seconds(load: Load, devices: Devices, speed: Speed, flops: float) -> float:
    assert load.step is not None, "there are FLOPs"
    passes = math.ceil(load.micro_steps / devices.number) + load.answer_steps
    per_pass = PASSES_OVER_WEIGHTS if load.trained else 1
    moved = per_pass * load.weights_bytes * passes
    moved += (MOVED_PER_TRAINED * load.trained + 2 * load.states_bytes) * load.steps
    seconds = flops / speed.flops
    seconds += moved / speed.bandwidth if speed.bandwidth else 0
    return seconds + (load.step.operations * passes * speed.latency if speed.latency else 0)


def summary_line(plan: Plan) -> str:
    """The plan in one line: parameters, facts, steps, memory, time where it is known."""
    trained = [stage for stage in plan.stages if stage.trained]
    steps = " + ".join(f"{stage.steps:,} to {stage.name}" for stage in trained)
    line = (
        f"plan: {show_count(plan.parameters)} parameters, {plan.facts:,} fact{'s' * (plan.facts != 1)}, {steps} steps"
    )
    line += f", about {show_bytes(plan.peak_bytes)}" + (" a device" if plan.devices.number > 1 else "")
    return line + (f", about {show_seconds(plan.seconds)}" if plan.seconds is not None else "")


def show_count(number: float) -> str:
    """`6738415616` as `6.74 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def show_bytes(number: float) -> str:
    """Gigabytes (1e9 bytes), or megabytes where there are few."""
    if number >= GB:
        return f"{number / GB:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e7 else f"{number / 1e6:.2g} MB"


def show_seconds(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan_lines(plan: Plan) -> list[str]:
    """The plan for a terminal."""
    parts = list(dict.fromkeys(part for stage in plan.stages for part in stage.memory))
    head = ["stage", "texts", "steps", "tokens", "trained", *parts, "peak", "TFLOP", "time"]
    rows = [head, *(_cells(stage, parts) for stage in plan.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [f"{plan.model}: {show_count(plan.parameters)} parameters; {plan.method}; {plan.facts:,} facts", ""]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    per = f" on each of {plan.devices.number} devices" if plan.devices.number > 1 else ""
    lines += ["", f"memory   {show_bytes(plan.peak_bytes)}{per}{_verdict(plan)}"]
    if plan.host_bytes:
        lines += [
            f"host     {show_bytes(plan.host_bytes)} of the machine's own memory a process, for copies of weights"
        ]
    lines += ["disk     " + ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.disk.items())]
    known = plan.seconds is not None and plan.speed is not None
    lines += [
        f"time     {show_seconds(plan.seconds or 0)} ({plan.speed.source})" if known and plan.speed else "time     -"
    ]
    return [*lines, *(f"note     {note}" for note in plan.notes), *(f"try      {line}" for line in plan.advice)]


def _cells(stage: StagePlan, parts: Sequence[str]) -> list[str]:
    memory: Mapping[str, float] = stage.memory
    shown = [show_bytes(memory[part]) if memory.get(part) else "-" for part in parts]
    trained = show_count(stage.trained) if stage.trained else "-"
    tera = "-" if stage.flops is None else f"{stage.flops / 1e12:.3g}"
    time = "-" if stage.seconds is None else show_seconds(stage.seconds)
    counts = [f"{stage.texts:,}", f"{stage.steps:,}", f"{stage.tokens:,}", trained]
    return [stage.name, *counts, *shown, show_bytes(stage.peak_bytes), tera, time]


def _verdict(plan: Plan) -> str:
    if plan.fits is None or plan.devices.memory_bytes is None:
        return ""
    there = show_bytes(plan.devices.memory_bytes)
    if plan.fits and plan.peak_bytes > plan.devices.memory_bytes / CLOSE:
        return f": just fits in {there}, and the estimate is good to about a sixth"
    return f": fits in {there}" if plan.fits else f": does not fit in {there}"
