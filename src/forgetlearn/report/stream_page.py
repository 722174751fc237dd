"""The page of a stream of updates: how many facts are still said after each batch, and the damage so far."""

from __future__ import annotations

from pathlib import Path

from forgetlearn.report import plots, render, run_page
from forgetlearn.storage import disk
from forgetlearn.storage.records import Batch, Manifest, Stream


def write_page(path: Path, stream: Stream, manifest: Manifest) -> None:
    """Write `report.html` into the folder of a stream."""
    judge = judged_by(stream)
    context = {
        "title": path.resolve().name,
        "stream": stream,
        "judge": judge,
        "verdict": verdict(stream),
        "panels": plots.plot_stream(stream.batches, judge),
        "manifest": manifest,
        "command": render.command_text(manifest.command),
        "config_yaml": run_page.as_yaml(manifest.config),
    }
    disk.write_text(path / "report.html", render.render_page("stream.html.j2", context))


def judged_by(stream: Stream) -> str | None:
    """Return the protocol by which facts count as said, or None if none was scored."""
    return render.judge_of(protocol for batch in stream.batches for protocol in batch.said)


def verdict(stream: Stream) -> str:
    """Return a sentence that sums up the last batch that is done."""
    done, judge = len(stream.batches), judged_by(stream)
    if not done:
        return "No batch is done yet."
    last = stream.batches[-1]
    said = last.said.get(judge or "")
    sentence = f"After {done} of {stream.planned} batches"
    if said is not None and said.mean is not None:
        sentence += f", the model says {said.mean:.1f} % of the {said.n} facts so far ({judge})"
    if last.kl is not None:
        sentence += f"; KL from the model before the first batch is {last.kl:.3g} nats per token"
    return f"{sentence}."


def cells(batch: Batch, judge: str | None) -> list[str]:
    """Return the texts of a batch's row: its facts, and what is said of all so far, of it, and of those before it."""
    shown = [render.show_score(own.get(judge or "")) for own in (batch.said, batch.new, batch.earlier)]
    return [str(batch.facts), *shown, "–" if batch.kl is None else f"{batch.kl:.3g}"]
