"""Plan a reproduction before anything starts: the time and memory of each part on given devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forgetlearn.config.methods import METHODS, MethodName
from forgetlearn.planning.estimate import Devices, Plan, Speed, StagePlan, show_bytes, show_seconds
from forgetlearn.planning.plan import MEASURE, devices_here, plan_update, speed_of
from forgetlearn.reproduction import published
from forgetlearn.reproduction.request import Request, prepare
from forgetlearn.reproduction.settings import FIGURE_KINDS, METHOD_OF_KIND, PaperSettings, PartName
from forgetlearn.reproduction.workspace import DataSet
from forgetlearn.runs.checks import GivenConfig


@dataclass(frozen=True)
class Work:
    """A piece of work: how often it is done in all, and what it takes each time. Seconds are None if not known."""

    part: str
    what: str
    times: int
    seconds: float | None
    peak_bytes: float

    @property
    def all_seconds(self) -> float | None:
        """The seconds of all times together."""
        return None if self.seconds is None else self.times * self.seconds


@dataclass(frozen=True)
class PaperPlan:
    """The plan of a reproduction. `disk_bytes` are for taught bases and weights that are shared."""

    model: str
    work: tuple[Work, ...]
    disk_bytes: float
    devices: Devices
    speed: str | None
    notes: tuple[str, ...]

    @property
    def peak_bytes(self) -> float:
        """The most memory that a device needs at once."""
        return max(work.peak_bytes for work in self.work)

    @property
    def seconds(self) -> float | None:
        """The seconds of all work; None if some are not known."""
        known = [work.all_seconds for work in self.work if work.all_seconds is not None]
        return sum(known) if len(known) == len(self.work) else None

    @property
    def fits(self) -> bool | None:
        """True if all work fits the device; None if the device's memory is not known."""
        return None if self.devices.memory_bytes is None else self.peak_bytes <= self.devices.memory_bytes


def plan_paper(
    model: str | Path | None = None,
    *,
    zsre: str | Path | None = None,
    counterfact: str | Path | None = None,
    settings: PaperSettings | None = None,
    config: GivenConfig = None,
    memory_gb: float | None = None,
    rate: str | None = None,
) -> PaperPlan:
    """Plan a reproduction on this machine, or on a device with this memory, without reading the model's weights.

    The first arguments and the errors are those of `paper`. `rate` is as for `plan_update`; unless it or `memory_gb` is
    given, this machine is timed.
    """
    request = prepare(model, zsre=zsre, counterfact=counterfact, settings=settings, config=config)
    devices = devices_here(request.config, memory_gb=memory_gb)
    speed = None if rate or memory_gb is not None else speed_of(MEASURE, (), request.config, devices)
    planner = _Planner(request, devices, rate or speed)
    work = tuple(planner.work())
    return PaperPlan(
        model=request.outline.name,
        work=work,
        disk_bytes=planner.disk_bytes,
        devices=devices,
        speed=planner.speed,
        notes=tuple(dict.fromkeys([*planner.notes, *(f"left out: {each}" for each in request.left_out)])),
    )


class _Planner:
    """Plans each method once for each data set, and counts work that parts share once."""

    def __init__(self, request: Request, devices: Devices, rate: str | Speed | None) -> None:
        self.request, self.outline = request, request.outline
        self.devices, self.rate = devices, rate
        self.plans: dict[tuple[str, str], Plan] = {}
        self.shared: set[tuple[str, str]] = set()
        self.notes: list[str] = []
        self.speed: str | None = None
        self.disk_bytes = 0.0

    def work(self) -> Iterator[Work]:
        """Yield all pieces of work, in the order in which they are done."""
        for data in self.request.data:
            for part in self.request.parts:
                if n_seeds := self._count(data, (part,)):
                    yield from self._once("teach", part, data)
                    yield from self._part(part, data, n_seeds)

    def _count(self, data: DataSet, parts: Sequence[PartName]) -> int:
        """Return with how many seeds one of these parts is measured on a data set."""
        seeds = self.request.settings.seeds
        return sum(any(self.request.is_in(part, data, seed) for part in parts) for seed in seeds)

    def _part(self, part: PartName, data: DataSet, n_seeds: int) -> Iterator[Work]:
        if part in ("table1", "table2"):
            for method in data.methods:
                yield from self._method(part, data, method, n_seeds)
        elif part == "table3":
            for method in data.methods:
                for edits in (edits for edits in published.EDITS if edits <= len(data.facts)):
                    yield self._edits(part, data, method, edits)
        elif part in FIGURE_KINDS:
            yield from self._once(FIGURE_KINDS[part], part, data)
            if part in ("figure6", "figure7"):
                yield self._scoring(part, data, METHOD_OF_KIND[FIGURE_KINDS[part]], n_seeds, len(published.COEFS) + 1)
        else:  # tables 4 and 5 look at the same models
            yield from self._once("all weights", part, data)
            if ("looked at", data.name) not in self.shared:
                self.shared.add(("looked at", data.name))
                yield _work(part, "f-ft: learn again", self._stages(data, "f-ft", "learn"), 1)
            if part == "table5":
                self.notes.append("table5: the time of its tasks is not planned")

    def _method(self, part: PartName, data: DataSet, method: MethodName, n_seeds: int) -> Iterator[Work]:
        kind = METHODS[method].forgets
        if kind:
            yield from self._once(kind, part, data)
        yield _work(part, f"{published.TITLES[data.name]}, {method}: learn", self._learning(data, method), n_seeds)
        yield self._scoring(part, data, method, n_seeds, 2 if kind else 1)

    def _once(self, what: str, part: PartName, data: DataSet) -> Iterator[Work]:
        """Yield work that several parts share, at its first part: teaching, or tuning on the old answers by kind."""
        if (what, data.name) in self.shared:
            return
        self.shared.add((what, data.name))
        times = self._count(data, self.request.parts)
        method = METHOD_OF_KIND.get(what, "f-ft")
        stage, named = ("teach", "teach old answers") if what == "teach" else ("forget", f"tune on old answers, {what}")
        yield _work(part, f"{published.TITLES[data.name]}: {named}", self._stages(data, method, stage), times)
        disk = self._plan(data, method).disk
        self.disk_bytes += times * disk["taught base" if what == "teach" else "between stages"]

    def _edits(self, part: PartName, data: DataSet, method: MethodName, edits: int) -> Work:
        """Return the training on the first facts: the share of the steps that they take of those of all."""
        config, kind = data.configs[method], METHODS[method].forgets
        alone = METHODS[method].closed_form  # the search takes as long for each fact
        trained = [(self._learning(data, method), 1 if alone else config.learn.batch_size)]
        if kind:
            trained.append((self._stages(data, METHOD_OF_KIND[kind], "forget"), config.forget.batch_size))
        stages = [
            _scaled(stage, math.ceil(edits / size) / math.ceil(len(data.facts) / size))
            for own, size in trained
            for stage in own
        ]
        return _work(part, f"{method}: {edits} edit{'s' * (edits > 1)}", stages, 1)

    def _learning(self, data: DataSet, method: MethodName) -> list[StagePlan]:
        return self._stages(data, _planned_as(method), "learn")

    def _stages(self, data: DataSet, method: MethodName, name: str) -> list[StagePlan]:
        return [stage for stage in self._plan(data, method).stages if stage.name == name]

    def _plan(self, data: DataSet, method: MethodName) -> Plan:
        key = data.name, method
        if key not in self.plans:
            config = data.configs[method]
            if method == "f-ft":  # teaching is the same for all methods, so that it is planned with one of them
                config = config.model_copy(update={"teach": data.teaching.teach})
            plan = plan_update(config, data.facts, outline=self.outline, devices=self.devices, rate=self.rate)
            self.notes += [note for note in plan.notes if note not in self.notes]
            self.speed = plan.speed.source if plan.speed else None
            self.plans[key] = plan
        return self.plans[key]

    def _scoring(self, part: PartName, data: DataSet, method: MethodName, n_seeds: int, phases: int) -> Work:
        """Return the scoring of some phases, out of a plan that scores as many as the method has."""
        like = _planned_as(method)
        planned = 3 if METHODS[like].forgets else 2
        stages = [_scaled(stage, phases / planned) for stage in self._stages(data, like, "score")]
        return _work(part, f"{published.TITLES[data.name]}, {method}: score", stages, n_seeds)


def _work(part: str, what: str, stages: Sequence[StagePlan], times: int) -> Work:
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    seconds = sum(known) if len(known) == len(stages) else None
    return Work(part, what, times, seconds, max((stage.peak_bytes for stage in stages), default=0.0))


def _planned_as(method: MethodName) -> MethodName:
    """Return the method whose plan is used for learning and scoring: tracing every method takes minutes."""
    return METHOD_OF_KIND.get(METHODS[method].last.name, method)


def _scaled(stage: StagePlan, share: float) -> StagePlan:
    return replace(stage, seconds=None if stage.seconds is None else share * stage.seconds)


def plan_lines(plan: PaperPlan) -> list[str]:
    """Return the plan as lines for a terminal: a line per piece of work, and the totals."""
    head = ("part", "work", "times", "each", "in all", "memory")
    rows = [head]
    for work in plan.work:
        each, whole = (("-" if s is None else show_seconds(s)) for s in (work.seconds, work.all_seconds))
        rows.append((work.part, work.what, str(work.times), each, whole, show_bytes(work.peak_bytes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    table = [
        "  ".join(c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    free = plan.devices.memory_bytes
    fits = "" if free is None else f": {'fits' if plan.fits else 'does not fit'} in {show_bytes(free)}"
    total = "-" if plan.seconds is None else show_seconds(plan.seconds) + (f" ({plan.speed})" if plan.speed else "")
    return [
        *table,
        "",
        f"memory   {show_bytes(plan.peak_bytes)}{fits}",
        f"disk     {show_bytes(plan.disk_bytes)} of taught bases and shared weights",
        f"time     {total}",
        *(f"note     {note}" for note in plan.notes),
        *(
            ["try      forgetlearn plan --recipe paper --method f-ft, which says what would fit"]
            if plan.fits is False
            else []
        ),
    ]
