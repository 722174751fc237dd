"""A run folder to pages for people: Markdown, and one self-contained HTML file with plots.

Everything is read from the folder, so a report can be made again without the model. Text that comes from
facts or models is escaped: in HTML by jinja2's autoescape, in Markdown by `_cell`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from forgetlearn import runs

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
SHOWN_FACTS_MARKDOWN = 20
# Control characters but tab and line break, and those that change the direction of text.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PHASE_COLOURS = {"base": "#8a8f98", "forgotten": "#d08a2e", "updated": "#2f7ed8"}


def write_run(path: Path) -> None:
    """`report.md` and `report.html` of a run folder, from what is in it.

    Raises:
        RunError: the folder holds no finished scores.
    """
    context = load_context(path)
    runs.write_text(path / "report.md", render("report.md.j2", context))
    plots = [plot_scores(context["summary"], context["phases"]), plot_losses(path / "logs")]
    context["plots"] = [plot for plot in plots if plot]
    runs.write_text(path / "report.html", render("report.html.j2", context))


def write_card(path: Path, product: Path) -> None:
    """The model card of the product, with its scores and the command that made it."""
    runs.write_text(product / "README.md", render("card.md.j2", {**load_context(path), "product": product.name}))


def load_context(path: Path) -> dict[str, Any]:
    """Everything a page shows but the plots, read from the run folder."""
    summary = runs.read_json(path / "summary.json")
    manifest = runs.RunFolder.open(path).manifest
    rows = runs.read_rows(path / "facts.jsonl")
    inputs = runs.read_rows(path / "inputs.jsonl")
    phases = [phase for phase in (*PHASES, "model") if phase in summary["phases"]]
    return {
        "title": path.resolve().name,
        "summary": summary,
        "manifest": manifest,
        "config_yaml": as_yaml(manifest["config"]),
        "command": " ".join(_quoted(word) for word in manifest["command"]),
        "phases": phases,
        "columns": COLUMNS,
        "table": score_table(summary, phases),
        "facts": fact_table(inputs, rows, phases),
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
        sentence += f"; the base gave the old answer to {facts['known']}, {facts.get('forgotten') or 0} were forgotten"
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


def fact_table(
    inputs: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]], phases: Sequence[str]
) -> list[dict[str, Any]]:
    """A line per fact: old and new answer, and what the model said in each phase."""
    said: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["protocol"] == "generate":
            said.setdefault(row["fact"], {})[row["phase"]] = row
    table = []
    for fact in inputs:
        own = said.get(fact["id"], {})
        last = own.get(phases[-1], {})
        state = _state(last) if own else "not asked"
        table.append(
            {
                "ground_truth": None,
                **fact,
                "said": {phase: own.get(phase, {}).get("said") for phase in phases},
                "state": state,
            }
        )
    return table


def _state(row: Mapping[str, Any]) -> str:
    """What a fact's free answers are now: the new answer to its prompt, else the old one anywhere, else another."""
    if row.get("errors"):
        return "errored"
    if row.get("reliability"):
        return "new"
    return "old" if row.get("residue") else "other"


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


def plot_scores(summary: Mapping[str, Any], phases: Sequence[str]) -> str | None:
    """Bars with intervals, a group per quantity and a bar per phase, as an SVG element."""
    columns = [("reliability", "token"), ("generality", "token"), ("locality", "agreement"), ("residue", "token")]
    columns = [(q, p) for q, p in columns if any(_mean(summary, phase, q, p) is not None for phase in phases)]
    if not columns:
        return None
    figure, axes = _figure()
    width = 0.8 / len(phases)
    for index, phase in enumerate(phases):
        cells = [summary["phases"][phase].get(q, {}).get(p) or {} for q, p in columns]
        means = [cell.get("mean") or 0 for cell in cells]
        bounds = [(cell.get("low"), cell.get("high"), mean) for cell, mean in zip(cells, means, strict=True)]
        below = [0 if low is None else mean - low for low, _high, mean in bounds]
        above = [0 if high is None else high - mean for _low, high, mean in bounds]
        at = [position + (index - (len(phases) - 1) / 2) * width for position in range(len(columns))]
        axes.bar(at, means, width * 0.92, yerr=[below, above], label=phase, color=PHASE_COLOURS.get(phase), capsize=2)
    axes.set_xticks(range(len(columns)), [f"{quantity}\n{protocol}" for quantity, protocol in columns])
    axes.set_ylim(0, 105)
    axes.set_ylabel("percent of tokens")
    axes.legend(frameon=False, ncols=len(phases), loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return _svg(figure)


def plot_losses(logs: Path) -> str | None:
    """Training loss of the stages over their steps, as an SVG element."""
    curves = {file.stem: runs.read_rows(file) for file in sorted(logs.glob("*.jsonl"))} if logs.is_dir() else {}
    if not curves:
        return None
    figure, axes = _figure()
    for name, colour in (("teach", "#8a8f98"), ("forget", "#d08a2e"), ("learn", "#2f7ed8")):
        if name in curves:
            rows = curves[name]
            axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label=name, color=colour, lw=1.2)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per answer token, nats")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def as_yaml(data: object) -> str:
    """Plain YAML, keys in their own order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _mean(summary: Mapping[str, Any], phase: str, quantity: str, protocol: str) -> float | None:
    cell = summary["phases"][phase].get(quantity, {}).get(protocol)
    return cell["mean"] if cell else None


def _errors(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Facts that could not be scored, with the reason, once each."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for quantity, reason in row["errors"].items():
            found.setdefault((row["fact"], quantity), {"fact": row["fact"], "quantity": quantity, "reason": reason})
    return list(found.values())


def _figure() -> tuple[Any, Any]:
    """A figure without pyplot, which would keep global state; transparent, in the page's text colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """The SVG element alone; black becomes the page's text colour, so that it reads in dark mode too."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and neither date nor random ids make two reports of one run differ.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "forgetlearn", "font.size": 10}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for black in ("#000000", "#262626"):
        text = text.replace(black, "currentColor")
    return text.replace("<text ", '<text fill="currentColor" ')


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
