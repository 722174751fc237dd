"""Numbers to plots: inline SVG by matplotlib, in the colours of the page that shows them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from forgetlearn.report.render import QUESTIONS, show_score
from forgetlearn.storage import records

STAGES = ("teach", "forget", "learn")
# Colours of plots stand for the page's own, so that they follow it into dark mode and print.
PAGE_COLOURS = {"#000000": "currentColor", "#262626": "currentColor", "#ffffff": "var(--page)"}
FIRST, SECOND, LINE, DIM = "#010101", "#020202", "#030303", "#040404"
OF_MARKS = tuple(f"#0a000{place}" for place in range(8))
PAGE_COLOURS |= {colour: f"var(--m{place})" for place, colour in enumerate(OF_MARKS)}
PAGE_COLOURS |= {FIRST: "var(--accent)", SECOND: "var(--second)", LINE: "var(--line)", DIM: "var(--dim)"}
# Markers of matplotlib and of the text that explains them; the first two are for plain fine-tuning.
MARKS = (("s", "■"), ("D", "◆"), ("o", "●"), ("^", "▲"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
PLOTTED_STEPS = 500


class Style(NamedTuple):
    """How a method looks in every plot of a page."""

    colour: str
    marker: str
    sign: str
    place: int


class Point(NamedTuple):
    """A row of the table in a trade-off plot; lines go along `order`."""

    x: float
    y: float
    order: tuple[float, float]


class Panel(NamedTuple):
    """Scores against the coefficient: methods that forget as lines, plain ones as levels."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]
    plain: Mapping[str, Mapping[str, Any]]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A colour and a marker for each name; the plain methods always have the first two."""
    plain = {"ft": 0, "lora": 1}
    others = [name for name in names if name not in plain]
    places = {name: plain.get(name, 2 + (others.index(name) if name in others else 0) % 6) for name in names}
    return {name: Style(OF_MARKS[place], *MARKS[place], place) for name, place in places.items()}


def plot_scores(summary: Mapping[str, Any], phases: Sequence[str]) -> list[Markup]:
    """A small plot per quantity, as SVG elements: its mean and interval in each phase. None for a single phase."""
    plots = []
    for quantity in QUESTIONS if len(phases) > 1 else ():
        lines = {
            protocol: [summary["phases"][phase].get(quantity, {}).get(protocol) for phase in phases]
            for protocol in ("agreement", "token", "generate")
        }
        lines = {
            name: cells for name, cells in lines.items() if any(cell and cell["mean"] is not None for cell in cells)
        }
        if lines:
            plots.append(_plot_phases(quantity, lines, phases))
    return plots


def plot_retention(updates: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What of each earlier update still holds, oldest first, as an SVG element. None for a single one."""
    lines = {protocol: [update["scores"].get(protocol) for update in updates] for protocol in ("token", "generate")}
    lines = {name: cells for name, cells in lines.items() if any(cell and cell["mean"] is not None for cell in cells)}
    numbers = [str(update["update"]) for update in updates]
    return _plot_phases("retention", lines, numbers) if len(updates) > 1 and lines else None


def _plot_phases(quantity: str, lines: Mapping[str, Sequence[Any]], phases: Sequence[str]) -> Markup:
    figure, axes = _figure(2.3, 1.9)
    for protocol, cells in lines.items():
        free = protocol == "generate"
        found = [(place, cell) for place, cell in enumerate(cells) if cell and cell["mean"] is not None]
        at = [place + (0.09 if free else -0.09) * (len(lines) > 1) for place, _found in found]
        means, bounds = _with_bounds([cell for _place, cell in found])
        colour = SECOND if free else FIRST
        axes.plot(at, means, color=LINE, lw=1, zorder=1)
        marks = axes.errorbar(
            at, means, bounds, fmt="o", ms=4.5, color=colour, mfc="#ffffff" if free else colour, lw=1.2
        )
        for part in (marks[0], *marks[2]):
            part.set_clip_on(False)
    axes.set_xticks(range(len(phases)), phases)
    axes.set_xlim(-0.4, len(phases) - 0.6)
    axes.set_yticks([0, 50, 100])
    axes.set_ylim(-3, 103)
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(
        quantity + (" (lower is better)" if quantity == "residue" else ""), loc="left", fontsize=9, fontweight="bold"
    )
    words = [f"{name} {', '.join(show_score(cell) for cell in cells)}" for name, cells in lines.items()]
    return _svg(figure, quantity, f"{quantity} in percent, {', '.join(phases)}: {'; '.join(words)}")


def plot_losses(logs: Path) -> Markup | None:
    """Training loss of the stages, one after the other on one axis of steps, as an SVG element."""
    files = {name: file for name in STAGES if (file := logs / f"{name}.jsonl").is_file()}
    curves = {name: records.read_rows(records.Step, file) for name, file in files.items()}
    curves = {name: rows for name, rows in curves.items() if rows}
    if not curves:
        return None
    figure, axes = _figure(4.6, 1.9)
    start = 0
    for name, rows in curves.items():
        steps, losses = _thinned([row["step"] for row in rows], [row["loss"] for row in rows])
        at = [start + step for step in steps]
        axes.plot(at, losses, color=FIRST, lw=0.6, alpha=0.35)
        axes.plot(at, running_mean(losses, max(3, len(losses) // 20)), color=FIRST, lw=1.6)
        if start:
            axes.axvline(start + 0.5, color=LINE, lw=1)
        end = start + rows[-1]["step"]
        axes.text(
            (start + end) / 2,
            1.03,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=8.5,
            fontweight="bold",
        )
        start = end
    axes.set_xlim(0, start + 1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    ends = [
        f"{name} {rows[0]['loss']:.3g} to {rows[-1]['loss']:.3g} in {rows[-1]['step']} steps"
        for name, rows in curves.items()
    ]
    return _svg(figure, "loss", f"Training loss: {'; '.join(ends)}")


def plot_trade_off(
    x_name: str,
    y_name: str,
    lines: Mapping[str, Mapping[str, Sequence[Point]]],
    front: Sequence[Point],
    looks: Mapping[str, Style],
) -> Markup:
    """One quantity against another, a line per method and tag; rings around the points of the front."""
    figure, axes = _figure(4.6, 3.4)
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
    axes.set_title(y_name, loc="left", fontsize=9, fontweight="bold")
    axes.margins(0.08)
    _open_frame(axes)
    ends = [f"{name} {points[-1].x:.1f}, {points[-1].y:.1f}" for name, own in lines.items() for points in own.values()]
    return _svg(figure, f"{x_name} {y_name}", f"{y_name} against {x_name}, last point of each line: {'; '.join(ends)}")


def plot_coefficients(panel: Panel, looks: Mapping[str, Style]) -> Markup:
    """Means with 95 % intervals against the coefficient, on a logarithmic scale; plain methods as dashed levels."""
    figure, axes = _figure(2.9, 2.2)
    coefs = sorted({coef for points in panel.lines.values() for coef, _cell in points})
    span = max(math.log10(coefs[-1] / coefs[0]), 0.5)
    for place, (name, points) in enumerate(panel.lines.items()):
        shift = 0.03 * span * (place - (len(panel.lines) - 1) / 2)  # lines of equal height stay apart
        at = [math.log10(coef) + shift for coef, _cell in points]
        means, bounds = _with_bounds([cell for _coef, cell in points])
        look = looks[name]
        marks = axes.errorbar(
            at, means, bounds, fmt=f"-{look.marker}", ms=4.5, color=look.colour, lw=1.1, elinewidth=0.8
        )
        for part in (marks[0], *marks[2]):
            part.set_clip_on(False)
    for name, cell in panel.plain.items():
        axes.axhline(cell["mean"], ls="--", lw=1.1, color=looks[name].colour)
    axes.set_xticks([math.log10(coef) for coef in coefs], [f"{coef:g}" for coef in coefs])
    axes.set_xlim(math.log10(coefs[0]) - 0.12 * span, math.log10(coefs[-1]) + 0.12 * span)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xlabel(panel.unit, fontsize=8, color=DIM)
    _open_frame(axes)
    words = [
        f"{name} " + ", ".join(f"{coef:g}: {cell['mean']:.1f}" for coef, cell in points)
        for name, points in panel.lines.items()
    ]
    words += [f"{name} {cell['mean']:.1f}" for name, cell in panel.plain.items()]
    return _svg(figure, panel.title + panel.unit, f"{panel.title}, {panel.unit}, by coefficient: {'; '.join(words)}")


def plot_training(title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], looks: Mapping[str, Style]) -> Markup:
    """Running means of the loss over the steps, a line per name; a name without a look is written beside its line."""
    figure, axes = _figure(4.6, 1.9)
    for place, (name, rows) in enumerate(curves.items()):
        look = looks.get(name)
        steps, losses = _thinned([row["step"] for row in rows], [row["loss"] for row in rows])
        means = running_mean(losses, max(3, len(losses) // 20))
        colour = look.colour if look else (FIRST, SECOND, DIM)[place % 3]
        axes.plot(steps, means, "--" if look and look.place < 2 else "-", color=colour, lw=1.4)
        if not look:
            at = (0.99, 0.9 - 0.11 * place)
            axes.text(*at, name, transform=axes.transAxes, ha="right", fontsize=8, color=colour)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _open_frame(axes)
    ends = [f"{name} {rows[0]['loss']:.3g} to {rows[-1]['loss']:.3g}" for name, rows in curves.items() if rows]
    return _svg(figure, title, f"Loss of {title}: {'; '.join(ends)}")


def _open_frame(axes: Any) -> None:
    """Lines across instead of a frame."""
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def _with_bounds(cells: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far their intervals reach below and above; nowhere where there is none."""
    means = [float(cell["mean"]) for cell in cells]
    ends = [(cell["low"], cell["high"]) if cell["low"] is not None else (cell["mean"],) * 2 for cell in cells]
    return means, [[abs(mean - own[end]) for mean, own in zip(means, ends, strict=True)] for end in (0, 1)]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with its neighbours, `width` in all; fewer at the ends, as many on each side."""
    means = []
    for place in range(len(values)):
        reach = min(width // 2, place, len(values) - 1 - place)
        near = values[place - reach : place + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _thinned(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most PLOTTED_STEPS points, each the mean of as many steps: a long run's plot stays small."""
    size = -(-len(steps) // PLOTTED_STEPS)
    chunks = [slice(start, start + size) for start in range(0, len(steps), size)]
    means = ([sum(values[c]) / len(values[c]) for c in chunks] for values in (steps, losses))
    return next(means), next(means)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure without pyplot, which would keep global state; transparent, without a frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=DIM)
    return figure, axes


def _svg(figure: Any, name: str, words: str) -> Markup:
    """The SVG element alone, in the page's colours and fonts; `words` are for those who cannot see it."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and neither date nor random ids make two reports of one run differ.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style .*?</style>|<g (id=\"[^\"]*\")?>(?=\s*</g>)", "", text, flags=re.DOTALL
    )
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # the same in every figure; nothing refers to them
    for colour, own in PAGE_COLOURS.items():
        text = text.replace(colour, own)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 role=\"img\">", text, count=1, flags=re.DOTALL)
    label = Markup("<title>{}</title>").format(words)
    start = text.index(">") + 1
    return Markup(text[:start]) + label + Markup(text[start:].replace("<text ", '<text fill="currentColor" '))
