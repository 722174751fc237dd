"""Print to the terminal. Text from outside is escaped, so that it cannot control the terminal.

Heavy imports are inside the functions. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from forgetlearn.errors import plain, some, without_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from forgetlearn.facts import FactSet
    from forgetlearn.products.inspect import Tally
    from forgetlearn.report.paper_table import PaperReport
    from forgetlearn.report.render import Interval
    from forgetlearn.report.run_page import Overview
    from forgetlearn.storage.records import Stream, Summary

MOST_UPDATES = 10  # earlier updates that get a line each


def say(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print lines. Escape control characters and any that the encoding lacks, and remove secrets from errors.

    `nl=False` leaves out the line break at the end.
    """
    stream = sys.stderr if err else sys.stdout
    shown = "\n".join(map(plain, (without_secrets(str(text)) if err else str(text)).split("\n")))
    encoding = stream.encoding or "utf-8"
    typer.echo(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, nl=nl)


class PlainLines(logging.Formatter):
    """Formats log lines, which may contain names and texts from outside."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message without secrets, with control characters escaped."""
        return "\n".join(map(plain, without_secrets(super().format(record)).split("\n")))


def print_facts(found: FactSet) -> None:
    """Print what was read and what was left out, then the first three facts."""
    records = f"{found.records} record{'s' * (found.records != 1)}"
    if found.records != found.in_source:
        records += f" with {found.in_source} facts"
    say(
        f"{found.source}: {records}, {found.read} read, {found.used} used "
        f"(reader {found.reader}, --old-from {','.join(found.old_from)})"
        + (f", {found.stripped} answers stripped of outer white space" if found.stripped else "")
    )
    for line in _account(found):
        say(plain(line))
    if len(found) > 3:
        say(f"\nthe first 3 of {len(found)} facts:")
    for fact in found[:3]:
        say(f"\n{fact.id}  {plain(fact.prompt)}")
        say(f"  old  {_answers(fact.old_answers)}\n  new  {_answers(fact.new_answers)}")
        for prompt in fact.rephrase_prompts:
            say(f"  also asked as  {plain(prompt)}")
        for probe in fact.locality:
            say(f"  only checked   {plain(probe.prompt)} -> {plain(probe.answer)}")


def _answers(answers: Sequence[str]) -> str:
    """Format an answer with its aliases."""
    if not answers:
        return "(none)"
    return plain(answers[0]) + (f"  (or: {some(answers[1:])})" if len(answers) > 1 else "")


def _account(found: FactSet) -> list[str]:
    """Describe how a source was read, what was left out or reinterpreted, and what is missing."""
    from forgetlearn.facts import NOTES, REASONS, describe_old_answers

    lines = [f"read as {found.read_as}"] if found.read_as else []
    for what, counts in (("fact", found.left_out), ("locality probe", found.left_out_probes)):
        for reason, count in counts.items():
            records = some([item.record for item in found.left_out_records if item.reason == reason])
            plural = "s" * (count != 1)
            lines.append(f"left out: {count} {what}{plural} (record{plural} {records}), {reason}. {REASONS[reason]}")
    lines += [NOTES[note][count != 1].format(count) for note, count in found.noted.items()]
    if found.with_aliases:
        lines.append(f"facts with several ways to write an answer: {found.with_aliases}")
    lines += describe_old_answers(found.old_counts, found.without_old, len(found.to_ask))
    if n := found.without_new_answer:
        first = "" if n == len(found) else f" (first: {next(f.place for f in found if not f.target_new)})"
        lines.append(f"no new answer: {n} of {len(found)} facts{first}; they can be scored and forgotten, not learned")
    if found.ignored_fields:
        unread = [f"{name} ({count})" for name, count in found.ignored_fields.items()]
        lines.append(f"fields that are not read (number of values): {some(unread, 30)}")
    if not found.to_ask and not any(fact.ground_truth for fact in found):
        lines.append("no fact has an old answer: nothing can be forgotten (methods f-...), all can be learned")
    if not any(fact.rephrase_prompts for fact in found):
        lines.append("no fact has a rephrasing: generality will not be scored")
    if not any(fact.locality for fact in found):
        lines.append("no fact has a locality prompt: what else changes is measured with general prompts alone")
    return lines


def print_result(found: Overview, output: Path, product: Path | None = None) -> None:
    """Print the scores and the verdict of a run, and where its product and its report are."""
    print_scores(found)
    _print_retention(found.summary)
    made = "" if product is None else f"\nproduct  {product}"
    say(f"\n{found.verdict}{made}\nreport   {output / 'report.html'}")


def print_scores(found: Overview) -> None:
    """Print the summary of a run."""
    for line in found.account:
        say(plain(line))
    print_table(found.table, "phase", found.columns)
    for name, cells in found.general:
        shown = (f"{phase} {cell}" for phase, cell in zip(found.measured, cells, strict=True) if cell)
        say(plain(f"{name}: {', '.join(shown)}"))
    if found.probes:
        _print_probes(found)
    for sentence in found.changed:
        say(plain(f"changed most: {sentence}"))
    if found.warning:
        say(plain(f"WARNING: {found.warning}"))


def _print_probes(found: Overview) -> None:
    """Print the matrix of probes: for each phase the percent of facts that get the new answer, if any, and the old."""
    from forgetlearn.report.probes import ask_for_new
    from forgetlearn.report.render import show_score

    named = [f"{line.probe} ({line.protocol})" for line in found.probes]
    width = max(map(len, named))
    with_new = ask_for_new(found.summary.probes)
    heads = (f"{f'{phase}: new':>15}{'old':>7}" if with_new else f"{f'{phase}: old':>18}" for phase in found.probed)
    say(f"{'beyond rephrasings':<{width}}{'n':>6}{''.join(heads)}")
    for name, line in zip(named, found.probes, strict=True):
        cells = (
            f"{show_score(new):>15}{show_score(old):>7}" if with_new else f"{show_score(old):>18}"
            for new, old in zip(line.new, line.old, strict=True)
        )
        say(plain(f"{name:<{width}}{line.n:>6}{''.join(cells)}"))


def print_table(
    rows: Sequence[tuple[str, Sequence[Interval | None]]], first: str, columns: Sequence[tuple[str, str]]
) -> None:
    """Print a table with a column per quantity and protocol, as plain lines that a person, a log or `awk` can read."""
    from forgetlearn.report.render import show_score

    widths = [max(len(quantity), len(protocol)) for quantity, protocol in columns]
    name_width = max([len(first), *(len(name) for name, _cells in rows)])
    quantities, protocols = ([column[index] for column in columns] for index in (0, 1))
    lines = [(first, quantities), ("", protocols)]
    lines += [(name, [show_score(cell) for cell in cells]) for name, cells in rows]
    for name, shown in lines:
        cells = "  ".join(text.rjust(width) for text, width in zip(shown, widths, strict=True))
        say(f"{name:<{name_width}}  {cells}")


def _print_retention(summary: Summary) -> None:
    """Print whether earlier updates still hold, a line each; of many, only their mean."""
    from forgetlearn.report.render import show_score

    def shown(scores: Mapping[str, Interval]) -> str:
        return ", ".join(f"{name} {show_score(cell, interval=True)}" for name, cell in scores.items())

    if len(summary.retention) > MOST_UPDATES:
        means = next(own["retention"] for own in reversed(summary.phases.values()) if "retention" in own)
        number = sum(row.facts for row in summary.retention)
        say(f"{len(summary.retention)} earlier updates: retention of {number} facts: {shown(means)}")
        return
    for row in summary.retention:
        say(plain(f"update {row.update}, {row.source}: retention of {row.facts} facts: {shown(row.scores)}"))


def print_stream(found: Stream) -> None:
    """Print how many facts are said after each batch of a stream, and the damage so far."""
    from forgetlearn.report import stream_page

    judge = stream_page.judged_by(found)
    lines = [["batch", "facts", "said so far", "of it", "of earlier", "KL"]]
    lines += [[batch.folder, *stream_page.cells(batch, judge)] for batch in found.batches]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *others in lines:
        cells = "  ".join(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        say(f"{name:<{widths[0]}}  {cells}")


def print_paper(report: PaperReport) -> None:
    """Print the tables of scores of a reproduction, the paper's figures in brackets, and the signs of its gains."""
    for table in report.scores:
        say(f"{table.part}, {table.data}: percent, in brackets the paper's")
        say(" " * 12 + "".join(f"{name:>16}" for name in table.rows[0].paper))
        for row in table.rows:
            cells = "".join(f"{_beside(row.ours.get(name), row.paper[name]):>16}" for name in row.paper)
            say(f"{row.method:<12}{cells}")
        say("")
    for sign in report.signs:
        say(plain(sign.sentence))


def _beside(ours: Interval | None, paper: float | None) -> str:
    """Format our score, with the paper's in brackets."""
    from forgetlearn.report.render import show_score

    return f"{show_score(ours)} [{'–' if paper is None else f'{paper:.1f}'}]"


def print_tallies(rows: list[tuple[str, Tally]]) -> None:
    """Print a table of tallies, without empty columns."""
    shown = [(name, tally.as_dict()) for name, tally in rows]
    columns = ["tensors", "numbers", "norm", "rms", "relative", "cosine", "share_changed", "share_survived"]
    columns = [column for column in columns if any(numbers[column] is not None for _name, numbers in shown)]
    width = max(len(name) for name, _cells in shown)
    say(" " * width + "".join(f"{column.replace('_', ' '):>15}" for column in columns))
    for name, numbers in shown:
        cells = (
            "" if numbers[c] is None else f"{numbers[c]:,}" if type(numbers[c]) is int else f"{numbers[c]:.4g}"
            for c in columns
        )
        say(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
