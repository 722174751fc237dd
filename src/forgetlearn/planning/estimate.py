"""Estimate what an update takes, from numbers alone: memory by part, steps, seconds, and whether it fits.

In bytes and seconds, for a stage that trains N numbers, and for one that only asks (docs/plan.md):

    memory    weights + kept + the optimiser's states (AdamW: 8 N) + the step's peak, which includes gradients (4 N)
    training  FLOPs / rate + weights moved, three times a pass / their bandwidth
              + (3 x bytes made + 28 N + 2 x states a step) / bandwidth + operations x latency
    asking    the same for one forward pass per row of texts, batch of prompts, and token of a batch's answers
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

GB = 1e9
FLOAT32 = 4
# Bytes moved through memory per trained number and step, besides the optimiser's states: the optimiser reads the weight
# and the gradient and writes the weight (12), clipping reads the gradient twice and writes it (12), backward (4).
MOVED_PER_TRAINED = 28
MOVED_PER_MADE = 3  # what an operation makes lies in memory that is first cleared, then written, then read
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
    made_bytes: int = 0  # of all that its operations made


@dataclass(frozen=True)
class Answering:
    """What answers take: `prompts` is the traced reading of a batch of prompts.

    Each new token of an answer reads `key_bytes` for every token before it, and computes the output head.
    """

    prompts: Step
    key_bytes: int  # keys and values of a token
    body_flops: int  # of `prompts`, without the head
    head_flops: int  # of one token

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one token of one answer."""
        return self.body_flops / self.prompts.tokens + self.head_flops

    @property
    def made_per_token(self) -> float:
        """Bytes that operations make for one token of one answer, besides its keys and values."""
        return self.prompts.made_bytes / self.prompts.tokens

    def bytes_of(self, read: int, held: int) -> int:
        """Return the bytes in use besides the weights while a batch is answered that reads and holds these tokens."""
        return self.prompts.peak_bytes * read // self.prompts.tokens + self.key_bytes * max(0, held - read)


@dataclass(frozen=True)
class Asking:
    """What a model is asked: `texts` that it reads in `rows`, and `prompts` that it answers in `batches`.

    `answer_tokens` are those of all answers, `answer_steps` the forward passes that make them, and `context_tokens` the
    tokens before each of them. `most_read` and `most_held` are the most tokens of a batch, before and after answering.
    """

    texts: int = 0
    read_tokens: float = 0
    rows: float = 0
    prompts: int = 0
    prompt_tokens: float = 0
    batches: float = 0
    answer_tokens: float = 0
    answer_steps: float = 0
    context_tokens: float = 0
    most_read: int = 0
    most_held: int = 0

    def __add__(self, other: Asking) -> Asking:
        found = {}
        for each in fields(self):
            own, others = getattr(self, each.name), getattr(other, each.name)
            found[each.name] = max(own, others) if each.name.startswith("most_") else own + others
        return Asking(**found)

    @property
    def passes(self) -> float:
        """Number of forward passes."""
        return self.rows + self.batches + self.answer_steps

    @property
    def tokens(self) -> float:
        """Number of tokens that are read or made."""
        return self.read_tokens + self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Load:
    """The size of a stage. `trained` is 0 if it only asks; `tokens` counts one pass over the texts.

    `asking` is what the model is asked in it, beside training. `spread` are the fewest and the most steps that it is
    likely to take, as shares of those planned.

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
    step: Step | None = None  # of training, or of reading
    asking: Asking = Asking()
    read: Step | None = None  # of `asking`, where `step` is of training
    answering: Answering | None = None
    spread: tuple[float, float] = (1, 1)
    states_bytes: int = 0
    base_bytes: int = 0
    paged: bool = False

    @property
    def steps(self) -> int:
        """Number of optimiser steps, or of forward passes if the stage only asks."""
        return self.passes * math.ceil(self.texts / self.batch_size) if self.trained else math.ceil(self.asking.passes)


@dataclass(frozen=True)
class Devices:
    """The devices to run on. With `shard`, they divide weights, gradients and states; else each holds all of them."""

    kind: str
    memory_bytes: float | None
    number: int = 1
    shard: bool = False


@dataclass(frozen=True)
class Speed:
    """The speed of a device. A bandwidth or latency of None is ignored.

    `weights_bandwidth` is that at which products of few rows read weights, if it is not the bandwidth.
    """

    flops: float
    bandwidth: float | None = None
    latency: float | None = None
    source: str = "given"
    weights_bandwidth: float | None = None


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
    spread: tuple[float, float] = (1, 1)

    @property
    def peak_bytes(self) -> float:
        """The sum of all parts."""
        return sum(self.memory.values())

    @property
    def step_range(self) -> tuple[int, int]:
        """The fewest and the most steps that are likely."""
        return round(self.steps * self.spread[0]), round(self.steps * self.spread[1])


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

    @property
    def seconds_range(self) -> tuple[float, float] | None:
        """The fewest and the most seconds that are likely; None if `seconds` is."""
        if self.seconds is None:
            return None
        low, high = (sum((stage.seconds or 0) * stage.spread[end] for stage in self.stages) for end in (0, 1))
        return low, high

    def as_dict(self) -> dict[str, object]:
        """Return the plan and its totals as a dict for JSON."""
        sums = {"peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes, "fits": self.fits}
        stages = [asdict(stage) | {"peak_bytes": stage.peak_bytes} for stage in self.stages]
        times = {"seconds": self.seconds, "seconds_range": self.seconds_range}
        return asdict(self) | sums | times | {"stages": stages}


def plan_stage(load: Load, devices: Devices, speed: Speed | None = None) -> StagePlan:
    """Return what a stage takes on each device; FLOPs and seconds are None if no step could be traced."""
    works = [*_training(load), *_asking(load)]
    known = [work for work in works if work is not None]
    flops = seconds = None
    if len(known) == len(works):
        flops = sum(work.flops for work in known) / devices.number
        seconds = None if speed is None else sum(_seconds(work, load.weights_bytes, devices, speed) for work in known)
    host_bytes = load.host_bytes + load.base_bytes + (load.states_bytes if load.paged else 0)
    return StagePlan(
        name=load.name,
        how=load.how,
        texts=load.texts,
        steps=load.steps,
        tokens=load.tokens * load.passes if load.trained else round(load.asking.tokens),
        trained=load.trained,
        memory=_memory(load, devices),
        # Main memory is counted separately only if the device has memory of its own.
        host_bytes=0 if devices.kind == "cpu" else host_bytes / (devices.number if devices.shard else 1),
        flops=flops,
        seconds=seconds,
        spread=load.spread,
    )


def _memory(load: Load, devices: Devices) -> dict[str, float]:
    share = devices.number if devices.shard else 1
    gradients = FLOAT32 * load.trained
    leaves = load.paged and devices.kind != "cpu"
    peak = load.step.peak_bytes if load.step else gradients
    asked = load.asking
    answers = load.answering.bytes_of(asked.most_read, asked.most_held) if load.answering and asked.batches else 0
    parts: dict[str, float] = {
        "runtime": RUNTIME_BYTES.get(devices.kind, RUNTIME_BYTES["cuda"]),
        "weights": load.weights_bytes / share,
        "kept": (load.kept_bytes + (load.host_bytes if devices.kind == "cpu" else 0)) / share,
        "optimizer": 0 if leaves else load.states_bytes / share,
        "gradients": gradients / share,
        # What the step's peak holds besides gradients: often little, because the peak is often near the step's end.
        "activations": max(0, peak - gradients, answers),
    }
    if devices.number > 1 and devices.shard:
        parts["gathered"] = 2 * load.largest_layer_bytes  # one layer in use, the next on its way
    elif devices.number > 1:
        parts["buckets"] = gradients  # DDP's own copy, which is sent during the backward pass
    return parts


@dataclass(frozen=True)
class _Work:
    """FLOPs, forward passes (three times the work with `trains`), and the bytes moved besides weights."""

    flops: float
    passes: float
    operations: float  # of one pass
    moved: float
    updated: float = 0  # bytes that the optimiser moves, on every device
    trains: bool = False


def _training(load: Load) -> Iterator[_Work | None]:
    """Yield the work of all steps; None if no step could be traced."""
    if not load.trained:
        return
    if load.step is None:
        yield None
        return
    share = load.tokens * load.passes / load.step.tokens
    made = max(0, load.step.made_bytes - FLOAT32 * load.trained)  # without gradients, which the optimiser moves
    updated = (MOVED_PER_TRAINED * load.trained + 2 * load.states_bytes) * load.steps
    passes = load.passes * math.ceil(load.texts / load.micro_batch_size)
    moved = MOVED_PER_MADE * made * share
    yield _Work(load.step.flops * share, passes, load.step.operations, moved, updated, trains=True)


def _asking(load: Load) -> Iterator[_Work | None]:
    """Yield the work of reading texts and of answering prompts; None for what could not be traced."""
    asked, read = load.asking, load.read or (None if load.trained else load.step)
    if asked.rows:
        yield None if read is None else _of_tokens(read, asked.read_tokens, asked.rows)
    if asked.batches:
        answering = load.answering
        if answering is None:
            yield None
            return
        yield _of_tokens(answering.prompts, asked.prompt_tokens, asked.batches)
        made = answering.made_per_token * asked.answer_tokens + answering.key_bytes * asked.context_tokens
        flops = answering.flops_per_token * asked.answer_tokens
        yield _Work(flops, asked.answer_steps, answering.prompts.operations, MOVED_PER_MADE * made)


def _of_tokens(step: Step, tokens: float, passes: float) -> _Work:
    share = tokens / step.tokens
    return _Work(step.flops * share, passes, step.operations, MOVED_PER_MADE * step.made_bytes * share)


def _seconds(work: _Work, weights_bytes: float, devices: Devices, speed: Speed) -> float:
    passes = math.ceil(work.passes / devices.number)
    weights = (PASSES_OVER_WEIGHTS if work.trains else 1) * weights_bytes * passes
    reading = speed.weights_bandwidth or speed.bandwidth
    seconds = work.flops / devices.number / speed.flops
    seconds += weights / reading if reading else 0
    seconds += (work.moved / devices.number + work.updated) / speed.bandwidth if speed.bandwidth else 0
    return seconds + (work.operations * passes * speed.latency if speed.latency else 0)


# In words -------------------------------------------------------------------------------------------------


def summary_line(plan: Plan) -> str:
    """Return the plan in one line: parameters, facts, steps, memory, and time if it is known."""
    line = counts_line(plan.parameters, plan.facts, {s.name: s.step_range for s in plan.stages if s.trained})
    line += f", about {show_bytes(plan.peak_bytes)}" + (" a device" if plan.devices.number > 1 else "")
    return line if plan.seconds_range is None else f"{line}, about {show_range(*plan.seconds_range)}"


def counts_line(parameters: int, facts: int, steps: Mapping[str, tuple[int, int]]) -> str:
    """Return the beginning of a plan in one line: parameters, facts, and the range of steps of each stage."""
    line = f"plan: {show_count(parameters)} parameters, {facts:,} fact{'s' * (facts != 1)}"
    shown = " + ".join(f"{show_steps(fewest_and_most)} to {name}" for name, fewest_and_most in steps.items())
    return f"{line}, {shown}" if shown else line


def show_steps(fewest_and_most: tuple[int, int]) -> str:
    """Format a number of steps, or a range of them, which is rounded."""
    low, high = map(_two_digits, fewest_and_most)
    if low == high:
        return f"{fewest_and_most[1]:,} steps"
    return f"about {low:,} to {high:,} steps"


def _two_digits(number: int) -> int:
    return int(float(f"{number:.2g}"))


def show_range(low: float, high: float) -> str:
    """Format a range of seconds, as "6 to 9 min" or "50 s to 2 min"."""
    (one, unit), (other, last) = (show_seconds(seconds).split() for seconds in (low, high))
    if one == other and unit == last:
        return f"{one} {unit}"
    return f"{one} to {other} {unit}" if unit == last else f"{one} {unit} to {other} {last}"


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
    if plan.seconds_range is not None and plan.speed is not None:
        time = f"{show_range(*plan.seconds_range)} ({plan.speed.source})"
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
