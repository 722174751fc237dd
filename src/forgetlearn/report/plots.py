"""Plots as inline SVG, drawn by matplotlib in the colours of the page that shows them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from forgetlearn.evaluation.statistics import Estimate
from forgetlearn.report.paper_table import Curve, Distances, Sign
from forgetlearn.report.render import QUESTIONS, Interval, show_score
from forgetlearn.storage.records import Batch, Retained, Step, Summary, load_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

STAGES = ("teach", "forget", "learn")
# Each colour in a plot is a placeholder for a CSS colour of the page, so that plots follow dark mode and print.
PAGE_COLOURS = {"#000000": "currentColor", "#262626": "currentColor", "#ffffff": "var(--page)"}
FIRST, SECOND, LINE, DIM = "#010101", "#020202", "#030303", "#040404"
OF_MARKS = tuple(f"#0a000{place}" for place in range(8))
PAGE_COLOURS |= {colour: f"var(--m{place})" for place, colour in enumerate(OF_MARKS)}
PAGE_COLOURS |= {FIRST: "var(--accent)", SECOND: "var(--second)", LINE: "var(--line)", DIM: "var(--dim)"}
# A matplotlib marker and the sign for it in the text; the first two are for plain fine-tuning.
MARKS = (("s", "■"), ("D", "◆"), ("o", "●"), ("^", "▲"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
PLOTTED_STEPS = 500


class Style(NamedTuple):
    """The colour and marker of a method in every plot of a page."""

    colour: str
    marker: str
    sign: str
    place: int


class Point(NamedTuple):
    """A row of the table as a point in a trade-off plot; lines connect points by `order`."""

    x: float
    y: float
    order: tuple[float, float]


class Panel(NamedTuple):
    """Scores against the coefficient: a line for each method that forgets, a level for each plain method."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    plain: Mapping[str, Estimate]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a colour and a marker for each name; the plain methods always get the first two."""
    plain = {"ft": 0, "lora": 1}
    others = [name for name in names if name not in plain]
    places = {name: plain.get(name, 2 + (others.index(name) if name in others else 0) % 6) for name in names}
    return {name: Style(OF_MARKS[place], *MARKS[place], place) for name, place in places.items()}


def plot_scores(summary: Summary, phases: Sequence[str]) -> list[Markup]:
    """Return an SVG plot of each quantity's mean and interval by phase; an empty list if there is only one phase."""
    plots = []
    for quantity in QUESTIONS if len(phases) > 1 else ():
        cells = [summary.phases[phase].get(quantity, {}) for phase in phases]
        if lines := _lines(cells):
            plots.append(_plot_phases(quantity, lines, phases))
    return plots


def plot_retention(updates: Sequence[Retained]) -> Markup | None:
    """Return an SVG plot of the retention of each earlier update, oldest first; None for fewer than two updates."""
    lines = _lines([update.scores for update in updates])
    numbers = [str(update.update) for update in updates]
    return _plot_phases("retention", lines, numbers) if len(updates) > 1 and lines else None


def plot_stream(batches: Sequence[Batch], protocol: str | None) -> list[Markup]:
    """Return SVG plots over the batches of a stream: the share of facts that are still said, and the damage."""
    plots = []
    said = {"all so far": (FIRST, [batch.said.get(protocol or "") for batch in batches])}
    said["of this batch"] = (SECOND, [batch.new.get(protocol or "") for batch in batches])
    if any(cell and cell.mean is not None for _colour, cells in said.values() for cell in cells):
        figure, axes = _figure(4.6, 2.4, "facts that are said, percent")
        for place, (name, (colour, cells)) in enumerate(said.items()):
            found = [(number, cell) for number, cell in enumerate(cells, 1) if cell and cell.mean is not None]
            means, bounds = _with_bounds([cell for _number, cell in found])
            _plot_by_batch(axes, [number for number, _cell in found], means, bounds if place == 0 else None, colour)
            axes.text(0.99, 0.06 + 0.1 * place, name, transform=axes.transAxes, ha="right", fontsize=8, color=colour)
        axes.set_ylim(-3, 103)
        words = [f"{name} {', '.join(show_score(cell) for cell in cells)}" for name, (_colour, cells) in said.items()]
        plots.append(_svg(figure, "said", f"Facts that are said, in percent by batch: {'; '.join(words)}"))
    if damaged := [(number, batch) for number, batch in enumerate(batches, 1) if batch.kl is not None]:
        figure, axes = _figure(4.6, 2.4, "KL from the model before, nats per token")
        values, bounds = _bars([(batch.kl or 0.0, batch.kl_low, batch.kl_high) for _number, batch in damaged])
        _plot_by_batch(axes, [number for number, _batch in damaged], values, bounds, FIRST)
        axes.set_ylim(bottom=0)
        plots.append(_svg(figure, "kl", f"KL by batch: {', '.join(f'{value:.3g}' for value in values)}"))
    return plots


def _plot_by_batch(
    axes: Axes, at: Sequence[int], means: Sequence[float], bounds: Sequence[Sequence[float]] | None, colour: str
) -> None:
    size = 4.5 if len(at) <= 25 else 2
    if bounds is None:
        axes.plot(at, means, "-o", ms=size, color=colour, mfc="#ffffff", lw=1.1, clip_on=False)
    else:
        _free_bars(axes.errorbar(at, means, bounds, fmt="-o", ms=size, color=colour, lw=1.1, elinewidth=0.8))
    axes.set_xlabel("batch", fontsize=8, color=DIM)
    axes.locator_params(axis="x", integer=True)
    _open_frame(axes)


def _lines(cells: Sequence[Mapping[str, Interval]]) -> dict[str, list[Interval | None]]:
    """Return the cells of each protocol that is plotted; leave out protocols that were never scored."""
    first = "contains" if any("contains" in by_protocol for by_protocol in cells) else "token"
    plotted = ("agreement", first, "generate")
    lines = {protocol: [by_protocol.get(protocol) for by_protocol in cells] for protocol in plotted}
    return {name: own for name, own in lines.items() if any(cell and cell.mean is not None for cell in own)}


def _plot_phases(quantity: str, lines: Mapping[str, Sequence[Interval | None]], phases: Sequence[str]) -> Markup:
    figure, axes = _figure(2.3, 1.9, f"{quantity} (lower is better)" if quantity == "residue" else quantity)
    for protocol, cells in lines.items():
        free = protocol == "generate"
        found = [(place, cell) for place, cell in enumerate(cells) if cell and cell.mean is not None]
        at = [place + (0.09 if free else -0.09) * (len(lines) > 1) for place, _found in found]
        means, bounds = _with_bounds([cell for _place, cell in found])
        colour = SECOND if free else FIRST
        axes.plot(at, means, color=LINE, lw=1, zorder=1)
        face = "#ffffff" if free else colour
        _free_bars(axes.errorbar(at, means, bounds, fmt="o", ms=4.5, color=colour, mfc=face, lw=1.2))
    axes.set_xticks(range(len(phases)), phases)
    axes.set_xlim(-0.4, len(phases) - 0.6)
    axes.set_yticks([0, 50, 100])
    axes.set_ylim(-3, 103)
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    words = [f"{name} {', '.join(show_score(cell) for cell in cells)}" for name, cells in lines.items()]
    return _svg(figure, quantity, f"{quantity} in percent, {', '.join(phases)}: {'; '.join(words)}")


def plot_losses(logs: Path) -> Markup | None:
    """Return an SVG plot of the training loss, stage after stage on one axis of steps; None without logs."""
    files = {name: file for name in STAGES if (file := logs / f"{name}.jsonl").is_file()}
    curves = {name: steps for name, file in files.items() if (steps := load_rows(Step, file))}
    if not curves:
        return None
    figure, axes = _figure(4.6, 1.9)
    start = 0
    for name, log in curves.items():
        numbers, losses = _thinned(log)
        at = [start + number for number in numbers]
        axes.plot(at, losses, color=FIRST, lw=0.6, alpha=0.35)
        axes.plot(at, running_mean(losses, max(3, len(losses) // 20)), color=FIRST, lw=1.6)
        if start:
            axes.axvline(start + 0.5, color=LINE, lw=1)
        end = start + log[-1].step
        frame = axes.get_xaxis_transform()
        axes.text((start + end) / 2, 1.03, name, transform=frame, ha="center", fontsize=8.5, fontweight="bold")
        start = end
    axes.set_xlim(0, start + 1)
    axes.set_ylim(bottom=0)
    _open_frame(axes)
    ends = [f"{name} {log[0].loss:.3g} to {log[-1].loss:.3g} in {log[-1].step} steps" for name, log in curves.items()]
    return _svg(figure, "loss", f"Training loss: {'; '.join(ends)}")


def plot_trade_off(
    x_name: str,
    y_name: str,
    lines: Mapping[str, Mapping[str, Sequence[Point]]],
    front: Sequence[Point],
    looks: Mapping[str, Style],
) -> Markup:
    """Return an SVG plot of one quantity against another: a line per method and tag, and rings around `front`."""
    figure, axes = _figure(4.6, 3.4, y_name)
    for name, own in lines.items():
        for tag, points in own.items():
            look = looks[name]
            xs, ys = [point.x for point in points], [point.y for point in points]
            dash = "--" if look.place < 2 else "-"
            axes.plot(xs, ys, dash, marker=look.marker, ms=5, lw=1.1, color=look.colour, clip_on=False, zorder=3)
            if tag:
                axes.annotate(
                    tag, (xs[-1], ys[-1]), (5, 3), textcoords="offset points", fontsize=7.5, color=look.colour
                )
    axes.plot([p.x for p in front], [p.y for p in front], "o", ms=11, mfc="none", mec="#262626", mew=0.9, clip_on=False)
    axes.set_xlabel(x_name, fontsize=8.5, color=DIM)
    axes.margins(0.08)
    _open_frame(axes)
    ends = [f"{name} {points[-1].x:.1f}, {points[-1].y:.1f}" for name, own in lines.items() for points in own.values()]
    return _svg(figure, f"{x_name} {y_name}", f"{y_name} against {x_name}, last point of each line: {'; '.join(ends)}")


def plot_coefficients(panel: Panel, looks: Mapping[str, Style]) -> Markup:
    """Return an SVG plot of means with 95 % intervals against log(coefficient); plain methods are dashed levels."""
    figure, axes = _figure(2.9, 2.2, panel.title)
    coefs = sorted({coef for points in panel.lines.values() for coef, _cell in points})
    span = max(math.log10(coefs[-1] / coefs[0]), 0.5)
    for place, (name, points) in enumerate(panel.lines.items()):
        shift = 0.03 * span * (place - (len(panel.lines) - 1) / 2)  # keeps lines of equal height apart
        at = [math.log10(coef) + shift for coef, _cell in points]
        means, bounds = _with_bounds([cell for _coef, cell in points])
        look = looks[name]
        fmt, colour = f"-{look.marker}", look.colour
        _free_bars(axes.errorbar(at, means, bounds, fmt=fmt, ms=4.5, color=colour, lw=1.1, elinewidth=0.8))
    for name, cell in panel.plain.items():
        axes.axhline(cell.mean, ls="--", lw=1.1, color=looks[name].colour)
    axes.set_xticks([math.log10(coef) for coef in coefs], [f"{coef:g}" for coef in coefs])
    axes.set_xlim(math.log10(coefs[0]) - 0.12 * span, math.log10(coefs[-1]) + 0.12 * span)
    axes.set_xlabel(panel.unit, fontsize=8, color=DIM)
    _open_frame(axes)
    words = [
        f"{name} " + ", ".join(f"{coef:g}: {cell.mean:.1f}" for coef, cell in points)
        for name, points in panel.lines.items()
    ]
    words += [f"{name} {cell.mean:.1f}" for name, cell in panel.plain.items()]
    return _svg(figure, panel.title + panel.unit, f"{panel.title}, {panel.unit}, by coefficient: {'; '.join(words)}")


def plot_training(title: str, curves: Mapping[str, Sequence[Step]], looks: Mapping[str, Style]) -> Markup:
    """Return an SVG plot of the running mean of the loss, a line per name. Names without a style are labelled."""
    figure, axes = _figure(4.6, 1.9, title)
    for place, (name, log) in enumerate(curves.items()):
        look = looks.get(name)
        steps, losses = _thinned(log)
        means = running_mean(losses, max(3, len(losses) // 20))
        colour = look.colour if look else (FIRST, SECOND, DIM)[place % 3]
        axes.plot(steps, means, "--" if look and look.place < 2 else "-", color=colour, lw=1.4)
        if not look:
            at = (0.99, 0.9 - 0.11 * place)
            axes.text(*at, name, transform=axes.transAxes, ha="right", fontsize=8, color=colour)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _open_frame(axes)
    ends = [f"{name} {log[0].loss:.3g} to {log[-1].loss:.3g}" for name, log in curves.items() if log]
    return _svg(figure, title, f"Loss of {title}: {'; '.join(ends)}")


def plot_gains(title: str, signs: Sequence[Sign]) -> Markup:
    """Return an SVG plot of differences, a line each: ours with its interval, and the paper's as a hollow diamond."""
    figure, axes = _figure(5.2, 0.6 + 0.26 * len(signs), title)
    places = range(len(signs))
    means, bounds = _with_bounds([sign.ours for sign in signs])
    _free_bars(axes.errorbar(means, places, xerr=bounds, fmt="o", ms=4.5, color=OF_MARKS[2], lw=1.2))
    axes.plot([sign.paper for sign in signs], places, "D", ms=5, mfc="none", mec="#262626", mew=1, clip_on=False)
    axes.axvline(0, color=DIM, lw=0.9, zorder=0)
    axes.set_yticks(places, [sign.what for sign in signs])
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_visible(False)
    return _svg(figure, title, f"{title}: {' '.join(sign.sentence for sign in signs)}")


def plot_distances(distances: Distances, name: str) -> Markup:
    """Return an SVG plot of the distance of each matrix, a group per layer; bands mark the paper's."""
    title = f"{name}: forgetting with {'LoRA' if distances.kind == 'lora' else distances.kind}"
    layers = list(dict.fromkeys(each.layer for each in distances.matrices))
    moved = [each for each in distances.matrices if each.ours.mean]
    figure, axes = _figure(4.6, 2.6, title)
    colours = {"attention": OF_MARKS[2], "mlp": OF_MARKS[3]}
    for part, (low, high) in distances.paper.items():
        axes.axhspan(low, high, color=colours[part], alpha=0.15, lw=0)
        axes.text(1.01, high, f"{part}, paper", transform=axes.get_yaxis_transform(), fontsize=7.5, color=colours[part])
    for place, layer in enumerate(layers):
        own = [each for each in moved if each.layer == layer]
        for number, each in enumerate(own):
            at = place + 0.7 * ((number + 0.5) / len(own) - 0.5)
            axes.plot([at], [each.ours.mean], "o" if each.part == "attention" else "^", ms=5, color=colours[each.part])
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    shown = [each.ours.mean for each in moved] + [end for ends in distances.paper.values() for end in ends]
    axes.set_yscale("log")
    axes.set_yticks(ticks := _log_ticks(min(shown), max(shown)), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _open_frame(axes)
    words = [f"layer {each.layer} {each.matrix} {each.ours.mean:.3g}" for each in distances.matrices]
    return _svg(figure, title, f"{title}, distance per matrix: {'; '.join(words)}")


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten that enclose a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [tick for tick in ticks if max((t for t in ticks if t <= low), default=low) <= tick <= 2.5 * high]


def plot_forgetting(curve: Curve, name: str) -> Markup:
    """Return an SVG plot of a forgotten model's scores on the OLD answers, by coefficient; hollow marks: the paper."""
    title = f"{name}: forgetting with {'LoRA' if curve.kind == 'lora' else curve.kind}"
    figure, axes = _figure(4.6, 2.8, title)
    looks = {"reliability": (OF_MARKS[2], "o"), "locality": (OF_MARKS[3], "^")}
    words = []
    for quantity, (colour, marker) in looks.items():
        own = [(point.coef, cell) for point in curve.points if (cell := point.ours.get(quantity))]
        means, bounds = _with_bounds([cell for _coef, cell in own])
        at = [coef for coef, _cell in own]
        _free_bars(axes.errorbar(at, means, bounds, fmt=f"-{marker}", ms=4.5, color=colour, lw=1.2, elinewidth=0.8))
        paper = [(point.coef, point.paper[quantity]) for point in curve.points if quantity in point.paper]
        xs, ys = [coef for coef, _score in paper], [score for _coef, score in paper]
        axes.plot(xs, ys, ":D", ms=5.5, mfc="none", mec=colour, color=colour, lw=0.9, clip_on=False)
        words.append(f"{quantity} " + ", ".join(f"{coef:g}: {cell.mean:.1f}" for coef, cell in own))
    axes.set_ylim(-3, 103)
    axes.set_xlabel("coefficient", fontsize=8, color=DIM)
    _open_frame(axes)
    return _svg(figure, title, f"{title}, in percent by coefficient: {'; '.join(words)}")


def _open_frame(axes: Axes) -> None:
    """Draw horizontal grid lines instead of a frame."""
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def _free_bars(marks: ErrorbarContainer) -> None:
    """Let points and error bars extend beyond the frame."""
    for part in (marks[0], *marks[2]):
        part.set_clip_on(False)


def _with_bounds(cells: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Return the means, and how far each interval extends below and above its mean (0 without an interval)."""
    return _bars([(cell.mean, cell.low, cell.high) for cell in cells if cell.mean is not None])


def _bars(scored: Sequence[tuple[float, float | None, float | None]]) -> tuple[list[float], list[list[float]]]:
    """Return the same for means, each with the ends of its interval."""
    below = [0.0 if low is None else abs(mean - low) for mean, low, _high in scored]
    above = [0.0 if high is None else abs(mean - high) for mean, _low, high in scored]
    return [mean for mean, _low, _high in scored], [below, above]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of `width` values centred on each value; the window shrinks at both ends."""
    means = []
    for place in range(len(values)):
        reach = min(width // 2, place, len(values) - 1 - place)
        near = values[place - reach : place + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _thinned(log: Sequence[Step]) -> tuple[list[float], list[float]]:
    """Return steps and losses of at most PLOTTED_STEPS points, each the mean of a chunk of steps."""
    size = -(-len(log) // PLOTTED_STEPS)
    chunks = [log[start : start + size] for start in range(0, len(log), size)]
    steps = [sum(step.step for step in chunk) / len(chunk) for chunk in chunks]
    return steps, [sum(step.loss for step in chunk) / len(chunk) for chunk in chunks]


def _figure(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Return a transparent figure without a frame. It is made without pyplot, which keeps global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=DIM)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return figure, axes


def _svg(figure: Figure, name: str, words: str) -> Markup:
    """Return the figure as an SVG element in the page's colours and fonts, with `words` as its text alternative."""
    import matplotlib

    buffer = io.StringIO()
    # Keep text as text, and leave out dates and random ids, so that two reports of one run are equal.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style .*?</style>|<g (id=\"[^\"]*\")?>(?=\s*</g>)", "", text, flags=re.DOTALL
    )
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # ids repeat across figures, and nothing refers to them
    for colour, own in PAGE_COLOURS.items():
        text = text.replace(colour, own)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 role=\"img\">", text, count=1, flags=re.DOTALL)
    label = Markup("<title>{}</title>").format(words)
    start = text.index(">") + 1
    return Markup(text[:start]) + label + Markup(text[start:].replace("<text ", '<text fill="currentColor" '))
