"""A run folder to pages for people: Markdown, and one self-contained HTML file with plots.

Everything is read from the folder, so a report can be made again without the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from forgetlearn.errors import RunError
from forgetlearn.facts import as_written, matching, tell_old
from forgetlearn.report import plots
from forgetlearn.report.render import COLUMNS, QUESTIONS, command_text, render, render_page
from forgetlearn.storage import disk, records, run_folder
from forgetlearn.weights.rounding import in_words

PHASES = ("base", "forgotten", "updated")
SHOWN_FACTS_MARKDOWN = 20
JUDGES = ("generate", "exact", "token", "prefer")  # a fact's state comes from the first of these that was scored
FILTERS = {
    "all": "all",
    "unlearned": "not new",
    "residue": "still old",
    "broken": "broken locality",
    "errored": "errored",
}
TAG_SAYS = {"old": "residue", "errored": "errored"}  # states that a flag would only repeat


def write_run(path: Path, context: Mapping[str, Any] | None = None) -> None:
    """`report.md` and `report.html` of a run folder, from what is in it: from its `context`, where that is known.

    Raises:
        RunError: the folder holds no finished scores.
    """
    context = load_context(path) if context is None else context
    disk.write_text(path / "report.md", render("report.md.j2", context))
    panels = plots.plot_scores(context["summary"], context["phases"])
    shown = {**context, "panels": panels, "losses": plots.plot_losses(path / "logs")}
    shown["retained"] = plots.plot_retention(context["retention"])
    disk.write_text(path / "report.html", render_page("report.html.j2", shown))


def write_card(product: Path, context: Mapping[str, Any]) -> None:
    """The model card of the product, with its scores and the command that made it, from its run's context."""
    disk.write_text(product / "README.md", card(context, product.name))


def card(
    context: Mapping[str, Any], product: str, *, base_model_id: str | None = None, command: Sequence[str] | None = None
) -> str:
    """The text of the model card; what is given stands in it in place of what the run's manifest tells."""
    shown = context["command"] if command is None else command_text(command)
    base = base_model_id or context["manifest"]["config"]["model"]["base_model_id"]
    return render("card.md.j2", {**context, "product": product, "base": base, "command": shown})


def load_context(path: Path) -> dict[str, Any]:
    """Everything a page shows but the plots, read from the run folder."""
    run = run_folder.RunFolder.open(path, records.RunManifest)
    run.check_results()
    if not (path / "summary.json").is_file():
        raise RunError(f"{path}: the run is not finished, so there is nothing to report. Go on with --resume.")
    summary = records.read(records.Summary, path / "summary.json")
    summary["facts"].setdefault("scored", summary["facts"]["used"])  # folders from before facts could be set aside
    rows = records.read_rows(records.Row, path / "facts.jsonl")
    inputs = records.read_rows(records.Input, path / "inputs.jsonl")
    phases = [phase for phase in (*PHASES, "model") if phase in summary["phases"]]
    if not phases:
        raise RunError(f"{path / 'summary.json'}: phases has none of {', '.join((*PHASES, 'model'))}. {records.REMEDY}")
    table = score_table(summary, phases)
    measured = [phase for phase in phases if phase in summary.get("general", {})]
    facts = fact_table(inputs, rows, phases)
    return {
        "title": path.resolve().name,
        "summary": summary,
        "manifest": run.manifest,
        "config_yaml": as_yaml(run.manifest["config"]),
        "command": command_text(run.manifest["command"]),
        "phases": phases,
        "columns": COLUMNS,
        "table": table,
        "quantities": [row for row in zip(COLUMNS, *(cells for _phase, cells in table), strict=True) if any(row[1:])],
        "phase_names": phase_names(phases),
        "questions": QUESTIONS,
        "facts": facts,
        "judged_by": judged_by(rows),
        "filters": FILTERS,
        "counts": counts(facts, FILTERS),
        "account": account(summary["facts"]) + chosen(summary) + rounded(summary),
        "errors": _errors(rows),
        "shown_facts": SHOWN_FACTS_MARKDOWN,
        "verdict": verdict(summary, phases),
        "retention": summary.get("retention", []),
        "general": general_table(summary.get("general", {}), measured),
        "measured": measured,
        "asked_again": list(summary["phases"][phases[-1]].get("retention", {})),
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
    if "old_answers" in facts:  # not in folders of earlier versions
        lines += tell_old(facts["old_answers"], facts["without_old"])
    lines += [f"left out, {reason}: {count}" for reason, count in facts["left_out"].items()]
    lines += [f"locality probes left out, {reason}: {count}" for reason, count in facts["left_out_probes"].items()]
    if facts.get("not_read"):
        lines.append(f"fields that were not read: {', '.join(facts['not_read'])}")
    return lines


def chosen(summary: Mapping[str, Any]) -> list[str]:
    """How `coef: auto` was chosen and what became of the facts that it was chosen on, where it was."""
    choice, facts = summary.get("choice"), summary["facts"]
    if choice is None:
        return []
    return [
        choice["why"],
        f"{facts['scored']} facts are scored; the {facts['set_aside']} set aside are updated and listed, not scored",
    ]


def rounded(summary: Mapping[str, Any]) -> list[str]:
    """What storing the product left of its change, where it was rounded."""
    said = in_words(summary["rounding"]) if summary.get("rounding") else ""
    return [f"the product as it is stored: {said}"] if said else []


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
    return [_fact_line(as_written(fact), scored.get(fact["id"], {}), phases, judge) for fact in inputs]


def _fact_line(
    fact: dict[str, Any], own: Mapping[tuple[str, str], Mapping[str, Any]], phases: Sequence[str], judge: str | None
) -> dict[str, Any]:
    said = {phase: own.get((phase, "generate"), {}).get("said") for phase in phases}
    last = own.get((phases[-1], judge or ""), {})
    place = own.get((phases[-1], "agreement"), {}).get("locality")
    reasons = [reason for row in own.values() for reason in row["errors"].values()]
    state = state_of(last) if last else "not asked"
    flags = {
        "unlearned": state != "new",
        "residue": bool(last.get("residue")),
        "broken": place is not None and place < 1,
        "errored": bool(reasons),
    }
    found = [name for name, is_set in flags.items() if is_set]
    return {
        **fact,
        **shown_answers(fact),
        "said": said,
        "told": {phase: _told(text, fact) for phase, text in said.items()},
        "rephrased": _other_texts(said[phases[-1]], own.get((phases[-1], "generate"), {}).get("said_rephrased")),
        "state": state,
        "flags": found,
        "shown_flags": [name for name in found if name not in ("unlearned", TAG_SAYS.get(state))],
        "reason": reasons[0] if reasons else None,
        "marks": [_mark(quantity, own, phases, judge or "") for quantity in QUESTIONS],
    }


def counts(facts: Sequence[Mapping[str, Any]], filters: Iterable[str]) -> dict[str, int]:
    """How many of a table's facts each filter shows."""
    return {name: sum(name == "all" or name in fact["flags"] for fact in facts) for name in filters}


def state_of(row: Mapping[str, Any]) -> str:
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
    for name, state in (("target_new", "new"), ("ground_truth", "old")):
        if fact[name] and matching.matches(said, [fact[name], *fact[f"{name}_aliases"]]):
            return state
    return None


def shown_answers(fact: Mapping[str, Any]) -> dict[str, str]:
    """Format both answers of a fact for a page, with their aliases: `Ada Byron (also: Ada, A. Byron)`."""
    return {
        f"{name}_shown": (fact[name] or "") + (f" (also: {', '.join(others)})" if others else "")
        for name in ("target_new", "ground_truth")
        for others in [fact[f"{name}_aliases"]]
    }


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
    scored = summary["facts"]["scored"]
    generated = last.get("reliability", {}).get("generate") or {}
    token = last.get("reliability", {}).get("token") or {}
    subject = "The model" if phases[-1] == "model" else f"The {phases[-1]} model"
    parts = []
    if generated.get("mean") is not None:
        parts.append(f"gives the new answer to {round(generated['mean'] * generated['n'] / 100)} of {scored} prompts")
    elif token.get("mean") is not None:
        parts.append(f"gives {token['mean']:.1f} % of the new answers' tokens (teacher forced)")
    locality = last.get("locality", {}).get("agreement")
    if locality and locality["mean"] is not None and phases[-1] != "base":
        parts.append(f"answers {locality['mean']:.1f} % of unrelated tokens as before")
    residue = last.get("residue", {}).get("generate")
    if residue and residue["mean"] is not None:
        parts.append(f"still gives the old answer to {residue['mean']:.1f} % of prompts and rephrasings")
    if not parts:
        return f"{subject} was scored on {scored} facts."
    nothing = "" if summary["coef"] is None or summary["facts"].get("forgotten", 1) else " Nothing was forgotten."
    return f"{subject} " + ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + f"{parts[-1]}.{nothing}"


def general_table(found: Mapping[str, Mapping[str, Any]], phases: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A line per measure, with a cell for each phase that there is."""
    lines: dict[str, dict[str, str]] = {}
    for phase in phases:
        for name, shown in _general_cells(found.get(phase, {})):
            lines.setdefault(name, {})[phase] = shown
    return [(name, [cells.get(phase, "") for phase in phases]) for name, cells in lines.items()]


def _general_cells(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if text := found.get("text"):
        ends = (text["loss_low"], text["loss_high"])
        interval = "" if ends[0] is None else f" [{math.exp(ends[0]):.4g}, {math.exp(ends[1]):.4g}]"
        yield f"perplexity, {text['tokens']} tokens of {text['source']}", f"{text['perplexity']:.4g}{interval}"
        if text["kl"] is not None:
            interval = "" if text["kl_low"] is None else f" [{max(0.0, text['kl_low']):.3g}, {text['kl_high']:.3g}]"
            yield "KL from the model before, nats per token", f"{text['kl']:.3g}{interval}"
    for task, values in found.get("tasks", {}).items():
        for metric, told in values.items():
            error = told["stderr"]
            yield f"{task}: {metric}", f"{told['value']:.4g}" + (f" ± {error:.2g}" if isinstance(error, float) else "")


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
