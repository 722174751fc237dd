"""Draw every method on a real model: what is said in other words against what else stays.

    python bench/methods_picture.py bench/results/methods.jsonl docs/methods.svg

The cells are those of `bench/real_models.py --rows methods`, a line each. Each file of facts has two panels:
above, unrelated prompts; below, other questions about the facts' own subjects. Each method is a point: the mean over
its seeds, with bars from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from forgetlearn.storage import disk
from real_models import METHOD_ROWS

mpl.use("svg")
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["svg.hashsalt"] = "methods"
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend)

TITLES = {"zsre": "ZsRE, questions", "counterfact": "COUNTERFACT, unfinished sentences"}
# Methods that do the same kind of thing share a colour; the default recipe stands alone.
KINDS = {
    "forgetlearn's default": ("default",),
    "fine-tuning until learned": ("ft", "lora", "locft", "ft-c"),
    "forgetting first, then the same": ("f-ft", "f-lora", "f-lora-ft"),
    "editing in closed form": ("rome", "memit", "alphaedit"),
    "facts in the prompt, no update": ("in-context", "retrieval"),
}
COLOURS = ("#d1242f", "#57606a", "#8250df", "#0969da", "#1a7f37")
MARKS = ("*", "s", "o", "^", "D")
ACROSS = {
    "unrelated": "tokens of unrelated answers as before, %",
    "same subject": "other questions on the subject without the new answer, %",
}
UP = "in other words"
WIDEST = 116  # percent, with room for names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for row in disk.read_rows(args.cells):
        facts, _dash, method = row["cell"].rpartition("-seed")[0].partition("-")
        found.setdefault((facts, method), []).append(row)
    panels = [name for name in TITLES if any(facts == name for facts, _method in found)]
    size = {"figsize": (9.5, 6.6), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(ACROSS), len(panels), sharex=True, sharey=True, **size)
    figure.patch.set_facecolor("white")  # a README may be read on a dark page
    for row, (across, meaning) in zip(axes, ACROSS.items(), strict=True):
        for axis, facts in zip(row, panels, strict=True):
            draw(axis, {method: own for (file, method), own in found.items() if file == facts}, across)
            axis.set_xlabel(meaning)
        row[0].set_ylabel("said in other words, %")
    for axis, facts in zip(axes[0], panels, strict=True):
        axis.set_title(TITLES[facts])
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.savefig(args.svg, metadata={"Date": None})
    args.svg.write_text(args.svg.read_text().replace("<svg ", f'<svg role="img" aria-label="{words(found)}" ', 1))


def draw(axis: pyplot.Axes, cells: Mapping[str, Sequence[Mapping[str, float]]], across: str) -> None:
    """Draw the methods of one file of facts; `cells` are theirs, over seeds."""
    axis.set(xlim=(0, WIDEST), ylim=(0, 104))
    axis.set_xticks(range(0, 101, 20))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eaeef2")
    places = []
    for (kind, methods), colour, mark in zip(KINDS.items(), COLOURS, MARKS, strict=True):
        for number, method in enumerate(name for name in methods if name in cells):
            x, y = ([cell[name] for cell in cells[method] if name in cell] for name in (across, UP))
            if not x:
                continue
            axis.errorbar(
                statistics.fmean(x),
                statistics.fmean(y),
                xerr=reach(x),
                yerr=reach(y),
                fmt=mark,
                color=colour,
                markersize=13 if mark == "*" else 6,
                elinewidth=1,
                label=kind if number == 0 else None,
                zorder=3,
            )
            places.append((statistics.fmean(x), statistics.fmean(y), method, colour))
    label(axis, places)


def reach(values: Sequence[float]) -> tuple[tuple[float], tuple[float]]:
    """Return how far the lowest and the highest value are from the mean."""
    mean = statistics.fmean(values)
    return (mean - min(values),), (max(values) - mean,)


def label(axis: pyplot.Axes, places: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each method's name beside its point, where no point and no other name is."""
    width, height = 2.2, 4.2  # of a character and of a line, in the units of the axes
    taken = [(x - 1.5, y - 2, x + 1.5, y + 2) for x, y, _name, _colour in places]
    for x, y, name, colour in sorted(places, key=lambda place: place[1], reverse=True):
        size = width * len(name)
        offers = [
            (left, y + up)
            for up in (0, 4, -4, 7, -7, 10, -10, 13, -13)
            for left in (x + 2.2, x - 2.2 - size, x - size / 2)
            if (up or left != x - size / 2) and 0 <= left <= WIDEST - size and 2 <= y + up <= 102
        ]
        free = [
            (left, at)
            for left, at in offers
            if not any(
                left < right and low < left + size and at - height / 2 < top and bottom < at + height / 2
                for low, bottom, right, top in taken
            )
        ]
        left, at = (free or offers)[0]
        taken.append((left, at - height / 2, left + size, at + height / 2))
        axis.text(left, at, name, color=colour, fontsize=8, va="center", weight="bold" if name == "default" else None)


def words(found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> str:
    """Return the picture in words, for those who cannot see it."""
    names = [(facts, method) for facts in TITLES for method in METHOD_ROWS if (facts, method) in found]
    each = [
        f"{facts} {method} {', '.join(shown(found[facts, method], column) for column in (UP, *ACROSS))}"
        for facts, method in names
    ]
    return f"Percent {UP}, {', '.join(ACROSS.values())}: {'; '.join(each)}".replace(", %", "")


def shown(cells: Sequence[Mapping[str, float]], column: str) -> str:
    """Return the mean of a column, rounded, if it was measured."""
    values = [cell[column] for cell in cells if column in cell]
    return f"{statistics.fmean(values):.0f}" if values else "unknown"


if __name__ == "__main__":
    main()
