"""The page of a reproduction of the paper: each of its figures beside ours, and the signs of its gains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forgetlearn.report import plots, render, run_page
from forgetlearn.report.paper_table import QUANTITIES, PaperReport, Sign, Verdict
from forgetlearn.storage import disk
from forgetlearn.storage.records import Manifest

PAGE = "paper.html"
CLASSES: Mapping[Verdict, str] = {"confirmed": "up", "contradicted": "down", "open": "dim"}


def write_page(path: Path, report: PaperReport, manifest: Manifest) -> None:
    """Write `paper.html` into the folder of a reproduction."""
    context = {
        "title": path.resolve().name,
        "report": report,
        "manifest": manifest,
        "command": render.command_text(manifest.command),
        "config_yaml": run_page.as_yaml(manifest.config),
        "verdict": verdict(report),
        "quantities": QUANTITIES,
        "classes": CLASSES,
        "parts_named": {part: named(part) for part in sorted({sign.part for sign in report.signs} | _tables(report))},
        "edits": sorted({number for row in report.times for number in (*row.seconds, *row.paper_seconds)}),
        "seconds": _seconds,
        "gains": [plots.plot_gains(title, signs) for title, signs in _gains(report).items()],
        "distances": [plots.plot_distances(each, named(each.part)) for each in report.distances],
        "curves": [plots.plot_forgetting(each, named(each.part)) for each in report.curves],
    }
    disk.write_text(path / PAGE, render.render_page("paper.html.j2", context))


def named(part: str) -> str:
    """Return a part's name for people: "Table 1" for table1."""
    return f"{part[:-1].capitalize()} {part[-1]}"


def verdict(report: PaperReport) -> str:
    """Return one sentence that sums up how many of the paper's signs were found again."""
    if not report.signs:
        return "No difference here has a counterpart in the paper."
    counts = [f"{count} {name}" for name in CLASSES if (count := report.count(name))]
    one = " With one seed, intervals are over facts alone." if len(report.seeds) == 1 else ""
    return f"{len(report.signs)} differences in the paper: {', '.join(counts)} here.{one}"


def _tables(report: PaperReport) -> set[str]:
    return {table.part for table in report.scores}


def _gains(report: PaperReport) -> dict[str, list[Sign]]:
    """Return the signs of each table of scores, by its title."""
    found: dict[str, list[Sign]] = {}
    for sign in report.signs:
        if sign.part in _tables(report):
            found.setdefault(f"{named(sign.part)}, {sign.data}: gain in points", []).append(sign)
    return found


def _seconds(seconds: float | None, ratio: float | None) -> str:
    """Format seconds, and how many times full fine-tuning's they are."""
    if seconds is None:
        return "–"
    shown = f"{seconds:.3g}" if seconds < 99 else f"{seconds:,.0f}"
    return shown + (f" (× {ratio:.3g})" if ratio is not None else "")
