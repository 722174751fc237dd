"""A run folder to pages for people: Markdown, and one self-contained HTML file with plots.

Everything is read from the folder, so a report can be made again without the model. Text that comes from
facts or models is escaped: in HTML by jinja2's autoescape, in Markdown by `_cell`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from forgetlearn import metrics, runs
from forgetlearn.errors import RunError

PHASES = ("base", "forgotten", "updated")
COLUMNS = (
    ("reliability", "token"),
    ("generality", "token"),
    ("locality", "agreement"),
    ("residue", "token"),
    ("reliability", "generate"),
    ("generality", "generate"),
    ("residue", "generate"),
)
STAGES = ("teach", "forget", "learn")
SHOWN_FACTS_MARKDOWN = 20
ASSETS = ("page.css", "page.js")
# Control characters but tab and line break, and those that change the direction of text.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
QUESTIONS = {
    "reliability": "does it give the new answer?",
    "generality": "also when asked in other words?",
    "locality": "is everything else as it was?",
    "residue": "does it still give the old answer? (lower is better)",
}
JUDGES = ("generate", "exact", "token", "prefer")  # a fact's state comes from the first of these that was scored
FILTERS = {
    "all": "all",
    "unlearned": "not new",
    "residue": "still old",
    "broken": "broken locality",
    "errored": "errored",
}
TAG_SAYS = {"old": "residue", "errored": "errored"}  # states that a flag would only repeat
# Colours of plots stand for the page's own, so that they follow it into dark mode and print.
PAGE_COLOURS = {"#000000": "currentColor", "#262626": "currentColor", "#ffffff": "var(--page)"}
FIRST, SECOND, LINE, DIM = "#010101", "#020202", "#030303", "#040404"
PAGE_COLOURS |= {FIRST: "var(--accent)", SECOND: "var(--second)", LINE: "var(--line)", DIM: "var(--dim)"}
PLOTTED_STEPS = 500


def write_run(path: Path) -> None:
    """`report.md` and `report.html` of a run folder, from what is in it.

    Raises:
        RunError: the folder holds no finished scores.
    """
    context = load_context(path)
    runs.write_text(path / "report.md", render("report.md.j2", context))
    plots = {"panels": plot_scores(context["summary"], context["phases"]), "losses": plot_losses(path / "logs")}
    runs.write_text(path / "report.html", render_page("report.html.j2", {**context, **plots}))


def write_card(path: Path, product: Path) -> None:
    """The model card of the product, with its scores and the command that made it."""
    runs.write_text(product / "README.md", render("card.md.j2", {**load_context(path), "product": product.name}))


def load_context(path: Path) -> dict[str, Any]:
    """Everything a page shows but the plots, read from the run folder."""
    manifest = runs.RunFolder.open(path).manifest
    if not (path / "summary.json").is_file():
        raise RunError(f"{path}: the run is not finished, so there is nothing to report. Go on with --resume.")
    summary = runs.read_json(path / "summary.json")
    rows = runs.read_rows(path / "facts.jsonl")
    inputs = runs.read_rows(path / "inputs.jsonl")
    phases = [phase for phase in (*PHASES, "model") if phase in summary["phases"]]
    table = score_table(summary, phases)
    facts = fact_table(inputs, rows, phases)
    return {
        "title": path.resolve().name,
        "summary": summary,
        "manifest": manifest,
        "config_yaml": as_yaml(manifest["config"]),
        "command": " ".join(_quoted(word) for word in manifest["command"]),
        "phases": phases,
        "columns": COLUMNS,
        "table": table,
        "quantities": [row for row in zip(COLUMNS, *(cells for _phase, cells in table), strict=True) if any(row[1:])],
        "phase_names": phase_names(phases),
        "questions": QUESTIONS,
        "facts": facts,
        "judged_by": judged_by(rows),
        "filters": FILTERS,
        "counts": {name: sum(name == "all" or name in fact["flags"] for fact in facts) for name in FILTERS},
        "account": account(summary["facts"]),
        "errors": _errors(rows),
        "shown_facts": SHOWN_FACTS_MARKDOWN,
        "verdict": verdict(summary, phases),
    }


def account(facts: Mapping[str, Any]) -> list[str]:
    """What became of the records that were read: a sentence, then a line for each reason to leave some out."""
    sentence = (
        f"{facts['read']} records read from {facts['source']} (reader: {facts['reader']}, old answers from: "
        f"{facts['old_from']}), {facts['used']} used"
    )
    if facts["known"] is not None:
        sentence += f"; the base gave the old answer to {facts['known']}"
    if facts.get("forgotten") is not None:
        sentence += f"; {facts['forgotten']} were forgotten"
    lines = [f"{sentence}."]
    lines += [f"left out, {reason}: {count}" for reason, count in facts["left_out"].items()]
    lines += [f"locality probes left out, {reason}: {count}" for reason, count in facts["left_out_probes"].items()]
    if facts.get("not_read"):
        lines.append(f"fields that were not read: {', '.join(facts['not_read'])}")
    return lines


def render(template: str, context: Mapping[str, Any]) -> str:
    """A template of the package, filled; HTML is autoescaped, a missing name is an error."""
    environment = Environment(
        loader=PackageLoader("forgetlearn"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.filters["cell"] = _cell
    environment.filters["score"] = show_score
    environment.filters["yaml_string"] = json.dumps  # a JSON string is a YAML string
    return environment.get_template(template).render(context)


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """A page with its style and script in it; the policy in its head lets no other script run, and no request."""
    style, script = (resources.files("forgetlearn").joinpath("templates", name).read_text("utf-8") for name in ASSETS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    inlined = {"style": Markup(style), "script": Markup(script), "script_hash": f"sha256-{digest}"}  # our own files
    return render(template, {**context, **inlined})


def show_score(cell: Mapping[str, Any] | None, *, interval: bool = False) -> str:
    """`78.4`, or `78.4 [75.1, 81.5]`; a dash where nothing was scored."""
    if not cell or cell["mean"] is None:
        return "–"
    text = f"{cell['mean']:.1f}"
    return f"{text} [{cell['low']:.1f}, {cell['high']:.1f}]" if interval and cell["low"] is not None else text


def score_table(summary: Mapping[str, Any], phases: Iterable[str]) -> list[tuple[str, list[Any]]]:
    """Phase by phase, a cell for each of COLUMNS."""
    return [
        (phase, [summary["phases"][phase].get(quantity, {}).get(protocol) for quantity, protocol in COLUMNS])
        for phase in phases
    ]


def phase_names(phases: Sequence[str]) -> dict[str, str]:
    """The phases in words: before, after forgetting, after learning."""
    words = {"base": "before", "forgotten": "after forgetting", "updated": "after learning", "model": "now"}
    return {phase: words[phase] for phase in phases}


def judged_by(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The protocol that says which answer a fact has now: free answers where there are some."""
    there = {row["protocol"] for row in rows}
    return next((protocol for protocol in JUDGES if protocol in there), None)


def fact_table(
    inputs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], phases: Sequence[str]
) -> list[dict[str, Any]]:
    """A line per fact: old and new answer, what the model said in each phase, its state, flags and marks."""
    judge = judged_by(rows)
    scored: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        scored.setdefault(row["fact"], {})[row["phase"], row["protocol"]] = row
    return [_fact_line({"ground_truth": None, **fact}, scored.get(fact["id"], {}), phases, judge) for fact in inputs]


def _fact_line(
    fact: dict[str, Any], own: Mapping[tuple[str, str], Mapping[str, Any]], phases: Sequence[str], judge: str | None
) -> dict[str, Any]:
    said = {phase: own.get((phase, "generate"), {}).get("said") for phase in phases}
    last = own.get((phases[-1], judge or ""), {})
    place = own.get((phases[-1], "agreement"), {}).get("locality")
    reasons = [reason for row in own.values() for reason in row["errors"].values()]
    state = _state(last) if last else "not asked"
    flags = {
        "unlearned": state != "new",
        "residue": bool(last.get("residue")),
        "broken": place is not None and place < 1,
        "errored": bool(reasons),
    }
    found = [name for name, is_set in flags.items() if is_set]
    return {
        **fact,
        "said": said,
        "told": {phase: _told(text, fact) for phase, text in said.items()},
        "rephrased": _other_texts(said[phases[-1]], own.get((phases[-1], "generate"), {}).get("said_rephrased")),
        "state": state,
        "flags": found,
        "shown_flags": [name for name in found if name not in ("unlearned", TAG_SAYS.get(state))],
        "reason": reasons[0] if reasons else None,
        "marks": [_mark(quantity, own, phases, judge or "") for quantity in QUESTIONS],
    }


def _state(row: Mapping[str, Any]) -> str:
    """What a fact's answers are now: the new one to its prompt, else the old one anywhere, else another."""
    if row.get("reliability") is None:
        return "errored" if row["errors"] else "not asked"
    if row["reliability"] == 1:
        return "new"
    return "old" if row.get("residue") else "other"


def _told(said: str | None, fact: Mapping[str, Any]) -> str | None:
    """Which of a fact's answers a text is."""
    if said is None:
        return None
    if metrics.same_text(said, fact.get("target_new", "")):
        return "new"
    return "old" if fact["ground_truth"] and metrics.same_text(said, fact["ground_truth"]) else None


def _other_texts(said: str | None, rephrased: Sequence[str | None] | None) -> str:
    """What was said to the rephrasings where it is not what was said to the prompt: `Rome (2), Oslo`."""
    counts = Counter(text for text in rephrased or () if text is not None and text != said)
    return ", ".join(
        f"{text or '(nothing)'} ({count})" if count > 1 else text or "(nothing)" for text, count in counts.items()
    )


def _mark(
    quantity: str, own: Mapping[tuple[str, str], Mapping[str, Any]], phases: Sequence[str], judge: str
) -> dict[str, str]:
    """A quantity of one fact before and now: signs to show, words for them, and whether it got better or worse."""
    protocol = "agreement" if quantity == "locality" else judge
    ends = [own.get((phase, protocol), {}) for phase in dict.fromkeys((phases[0], phases[-1]))]
    values = [row.get(quantity) for row in ends]
    signs = ["!" if quantity in row.get("errors", {}) else _sign(row.get(quantity)) for row in ends]
    shown = ["not scored" if value is None else f"{100 * value:.0f} %" for value in values]
    turn = ""
    before, now = values[0], values[-1]
    if before is not None and now is not None and len(set(signs)) > 1:
        turn = " up" if (now > before) != (quantity == "residue") else " down"
    return {
        "text": "".join(signs),
        "title": f"{quantity} {' → '.join(shown)}",
        "turn": turn,
        "value": "" if now is None else f"{now:.3g}",
    }


def _sign(value: float | None) -> str:
    if value is None:
        return "–"
    return "●" if value == 1 else "◐" if value else "○"


def verdict(summary: Mapping[str, Any], phases: Sequence[str]) -> str:
    """The run in one sentence."""
    last = summary["phases"][phases[-1]]
    used = summary["facts"]["used"]
    generated = last.get("reliability", {}).get("generate") or {}
    token = last.get("reliability", {}).get("token") or {}
    subject = "The model" if phases[-1] == "model" else f"The {phases[-1]} model"
    parts = []
    if generated.get("mean") is not None:
        parts.append(f"gives the new answer to {round(generated['mean'] * generated['n'] / 100)} of {used} prompts")
    elif token.get("mean") is not None:
        parts.append(f"gives {token['mean']:.1f} % of the new answers' tokens (teacher forced)")
    locality = last.get("locality", {}).get("agreement")
    if locality and locality["mean"] is not None and phases[-1] != "base":
        parts.append(f"answers {locality['mean']:.1f} % of unrelated tokens as before")
    residue = last.get("residue", {}).get("generate")
    if residue and residue["mean"] is not None:
        parts.append(f"still gives the old answer to {residue['mean']:.1f} % of prompts and rephrasings")
    if not parts:
        return f"{subject} was scored on {used} facts."
    nothing = "" if summary["coef"] is None or summary["facts"].get("forgotten", 1) else " Nothing was forgotten."
    return f"{subject} " + ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + f"{parts[-1]}.{nothing}"


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


def as_yaml(data: object) -> str:
    """Plain YAML, keys in their own order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _errors(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Facts that could not be scored, with the reason, once each."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for quantity, reason in row["errors"].items():
            found.setdefault((row["fact"], quantity), {"fact": row["fact"], "quantity": quantity, "reason": reason})
    return list(found.values())


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


def _printable(value: object) -> object:
    """What a template prints, with a mark for each character that steers a terminal or reorders a line."""
    if not isinstance(value, str):
        return value
    return type(value)(STEERING.sub("�", value))  # Markup stays Markup


def _cell(text: object) -> str:
    """Text for a Markdown table or line: nothing in it is markup."""
    shown = "" if text is None else str(text)
    for mark in ("\\", "|", "`", "*", "_", "[", "]", "#", "~", "$"):
        shown = shown.replace(mark, f"\\{mark}")
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(STEERING.sub("�", shown).split())


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
