"""Numbers to plots: inline SVG by matplotlib, in the colours of the page that shows them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from forgetlearn import runs
from forgetlearn.pages import QUESTIONS, show_score

STAGES = ("teach", "forget", "learn")
# Colours of plots stand for the page's own, so that they follow it into dark mode and print.
PAGE_COLOURS = {"#000000": "currentColor", "#262626": "currentColor", "#ffffff": "var(--page)"}
FIRST, SECOND, LINE, DIM = "#010101", "#020202", "#030303", "#040404"
PAGE_COLOURS |= {FIRST: "var(--accent)", SECOND: "var(--second)", LINE: "var(--line)", DIM: "var(--dim)"}
PLOTTED_STEPS = 500


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


def _plot_phases(quantity: str, lines: Mapping[str, Sequence[Any]], phases: Sequence[str]) -> Markup:
    figure, axes = _figure(2.3, 1.9)
    for protocol, cells in lines.items():
        free = protocol == "generate"
        found = [(place, cell) for place, cell in enumerate(cells) if cell and cell["mean"] is not None]
        at = [place + (0.09 if free else -0.09) * (len(lines) > 1) for place, _found in found]
        means = [cell["mean"] for _place, cell in found]
        ranges = [(cell["low"], cell["high"]) if cell["low"] is not None else (cell["mean"],) * 2 for _, cell in found]
        bounds = [[abs(mean - own[end]) for mean, own in zip(means, ranges, strict=True)] for end in (0, 1)]
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
    curves = {name: runs.read_rows(file) for name in STAGES if (file := logs / f"{name}.jsonl").is_file()}
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
