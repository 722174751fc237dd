"""The report of a run: a Markdown page, and a self-contained HTML page with plots.

Everything is read from the run folder, so a report can be made again without the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from forgetlearn.config.methods import METHODS
from forgetlearn.errors import RunError, some
from forgetlearn.facts import describe_old_answers, matching
from forgetlearn.report import damage, forgetting, plots
from forgetlearn.report.probes import ProbeLine, matrix, phases_asked
from forgetlearn.report.render import (
    QUESTIONS,
    Column,
    command_text,
    judge_of,
    leading_columns,
    render,
    render_page,
)
from forgetlearn.storage import disk
from forgetlearn.storage.records import (
    REMEDY,
    Config,
    FactCounts,
    General,
    Input,
    Manifest,
    Mean,
    OnPrompts,
    ProbeRow,
    Row,
    Summary,
    Taught,
    load_rows,
)
from forgetlearn.storage.run_folder import INPUTS, LESSONS, PROBES, ROWS, SUMMARY, RunFolder
from forgetlearn.weights.rounding import in_words

PHASES = {"base": "before", "forgotten": "after forgetting", "updated": "after learning", "model": "now"}
SHOWN_PROMPTS = 5  # general prompts that are shown at once
FILTERS = {
    "all": "all",
    "unlearned": "not new",
    "residue": "still old",
    "broken": "broken locality",
    "errored": "errored",
}
TAG_SAYS = {"old": "residue", "errored": "errored"}  # state -> the flag that would only repeat it
RowsOfFact = Mapping[tuple[str, str], Row]  # phase and protocol -> row


@dataclass(frozen=True)
class Overview:
    """The parts of a report that come from the summary: a verdict, counts, and tables of scores."""

    summary: Summary
    phases: list[str]
    verdict: str
    account: list[str]
    measured: list[str]  # phases in which general ability was measured
    general: list[tuple[str, list[str]]]  # a measure, and its cell for each phase in `measured`
    prompts: OnPrompts | None  # the answers to the general prompts in the last phase
    warning: str | None  # if the damage is bad
    probed: list[str]  # phases in which probes were asked
    probes: list[ProbeLine]  # without texts

    @property
    def changed(self) -> list[str]:
        """The answers to general prompts that changed most, a sentence each."""
        return damage.examples(self.prompts)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the short table of scores."""
        if self.summary.forgetting:
            return forgetting.shown_columns(self.summary)
        scored = [cells for phase in self.phases for cells in self.summary.phases[phase].items()]
        found = leading_columns(protocol for _quantity, cells in scored for protocol in cells)
        if any(quantity == "reliability" for quantity, _cells in scored):
            return found
        return tuple(column for column in found if column[0] in ("locality", "residue"))  # no fact has a new answer

    @property
    def table(self) -> list[tuple[str, list[Mean | None]]]:
        """The score of each of `columns`, phase by phase."""
        return [(phase, self.cells(phase, self.columns)) for phase in self.phases]

    def cells(self, phase: str, columns: Iterable[Column]) -> list[Mean | None]:
        """Return the score of each column in a phase."""
        scores = self.summary.phases[phase]
        return [scores.get(quantity, {}).get(protocol) for quantity, protocol in columns]


@dataclass(frozen=True)
class Mark:
    """A cell of the table of facts: `text` holds its signs, `title` explains them, `turn` is its CSS class.

    Rows are sorted by `value`.
    """

    text: str
    title: str
    turn: str
    value: str
    line: str = ""  # the method and variant, in a comparison


@dataclass(frozen=True)
class FactLine:
    """A line of the table of facts: the part that runs and comparisons share."""

    prompt: str
    ground_truth_shown: str
    target_new_shown: str
    marks: list[Mark]
    flags: list[str]  # names of the filters that show this fact


@dataclass(frozen=True)
class RunFactLine(FactLine):
    """A line for a fact of a run: the model's answer in each phase, and whether it is the new or the old one."""

    said: dict[str, str | None]
    which: dict[str, str | None]
    rephrased: str
    probes: str  # the unrelated prompts, if some are no longer answered as before
    state: str
    shown_flags: list[str]
    reason: str | None
    taught: Mapping[str, str] = field(default_factory=dict)  # stage -> what it trained on, if not the bare answer


@dataclass(frozen=True)
class RunPage:
    """Everything that the pages of a run show, except the plots."""

    title: str
    settings: Config
    manifest: Manifest
    overview: Overview
    rows: list[Row]
    facts: list[RunFactLine]
    probe_rows: list[ProbeRow] = field(default_factory=list)
    forgetting: Mapping[str, object] | None = None  # set if nothing was learned

    def context(self) -> dict[str, object]:
        """Return the values that the templates use, by name."""
        phases, scores = self.overview.phases, self.overview.summary.phases
        columns = self.overview.columns
        cells = [self.overview.cells(phase, columns) for phase in phases]
        return {
            **vars(self.overview),
            "title": self.title,
            "settings": self.settings,
            "manifest": self.manifest,
            "config_yaml": as_yaml(self.manifest.config),
            "command": command_text(self.manifest.command),
            "source": method.source if (method := METHODS.get(self.overview.summary.method)) else None,
            "changed": self.overview.changed,
            "columns": columns,
            "table": self.overview.table,
            "quantities": [row for row in zip(columns, *cells, strict=True) if any(row[1:])],
            "forgetting": self.forgetting,
            "phase_names": PHASES,
            "questions": QUESTIONS,
            "facts": self.facts,
            "with_new": any(fact.target_new_shown for fact in self.facts),
            "judged_by": judged_by(self.rows),
            "filters": FILTERS,
            "counts": counts((fact.flags for fact in self.facts), FILTERS),
            "errors": _errors(self.rows),
            "probe_lines": matrix(self.overview.summary.probes, self.probe_rows, self.overview.probed),
            "retention": self.overview.summary.retention,
            "asked_again": list(scores[phases[-1]].get("retention", {})),
            "shown_prompt": damage.shown_prompt,
            "shown_prompts": SHOWN_PROMPTS,
        }


def load_page(path: Path) -> RunPage:
    """Return the page of a run, read from its folder; raise RunError if the run is unfinished or a file is damaged."""
    run = RunFolder.open(path)
    run.check_results()
    if not (path / SUMMARY).is_file():
        raise RunError(f"{path}: the run is not finished, so there is nothing to report. Pass --resume to continue it.")
    return page_of(run, Summary.load(path / SUMMARY), load_rows(Row, path / ROWS))


def page_of(run: RunFolder, summary: Summary, rows: list[Row]) -> RunPage:
    """Return the page of a run whose scores are already in memory; read the facts from its folder."""
    if not any(phase in summary.phases for phase in PHASES):
        raise RunError(f"{run.path / SUMMARY}: phases has none of {', '.join(PHASES)}. {REMEDY}")
    shown = overview(summary)
    inputs = load_rows(Input, run.path / INPUTS)
    if summary.forgetting:
        inputs = forgetting.as_asked(inputs)
    taught = load_rows(Taught, run.path / LESSONS) if (run.path / LESSONS).is_file() else []
    facts = _with_taught(fact_table(inputs, rows, shown.phases), inputs, taught)
    probe_rows = load_rows(ProbeRow, run.path / PROBES) if (run.path / PROBES).is_file() else []
    forgot = forgetting.context(summary, inputs, rows)
    return RunPage(run.path.resolve().name, run.settings, run.manifest, shown, rows, facts, probe_rows, forgot)


def overview(summary: Summary) -> Overview:
    """Return the overview of a run, made from its summary."""
    phases = [phase for phase in PHASES if phase in summary.phases]
    measured = [phase for phase in phases if phase in summary.general and any(_general_cells(summary.general[phase]))]
    prompts, probed = _last_prompts(summary, phases), phases_asked(summary.probes, phases)
    forgot = summary.forgetting
    warnings = [forgetting.warning(forgot) if forgot else None, damage.warning(prompts, kept=bool(summary.kept))]
    return Overview(
        summary=summary,
        phases=phases,
        verdict=forgetting.verdict(summary) if forgot else verdict(summary, phases),
        account=list(_whole_account(summary)),
        measured=measured,
        general=_general(summary.general, measured),
        prompts=prompts,
        warning=" ".join(filter(None, warnings)) or None,
        probed=probed,
        probes=matrix(summary.probes, [], probed),
    )


def _whole_account(summary: Summary) -> Iterator[str]:
    """Yield lines on what became of the records, what the stages trained on, and how the product is stored."""
    facts = summary.facts
    yield from account(facts.model_copy(update={"without_old": {}}) if summary.forgetting else facts)
    if summary.choice:  # set if forget.coef is auto
        yield summary.choice.why
        yield f"{facts.scored} facts are scored; the {facts.set_aside} set aside are updated and listed, not scored"
    if summary.nothing_forgotten and (line := summary.nothing_forgotten.example_line):
        yield line
    yield from _training(summary)
    if summary.since_first:
        yield "general ability is compared with the model before the first batch, as small changes add up"
    if summary.rounding and (words := in_words(summary.rounding.as_json())):
        yield f"the product as it is stored: {words}"


def _last_prompts(summary: Summary, phases: Sequence[str]) -> OnPrompts | None:
    found = summary.general.get(phases[-1])
    return found.prompts if found else None


def _training(summary: Summary) -> Iterator[str]:
    """Yield lines on what the stages trained on, and on facts that were not learned."""
    names = {"forget": "texts to forget", "learn": "texts to learn"}
    for stage, found in summary.lessons.items():
        yield f"{names.get(stage, stage)}: {found.in_words()}"
    if summary.kept:
        yield f"kept: {', '.join(f'{count} {source}' for source, count in summary.kept.items())}"
    if summary.rephrasings_trained:
        yield "the rephrasings were trained on, so they are not asked, and generality is not scored"
    if (learning := summary.learning) and learning.unlearned:
        n_missed = len(learning.unlearned)
        passes = f"{learning.epochs} epoch{'s' * (learning.epochs != 1)}"
        yield (
            f"learned {summary.facts.used - n_missed} of {summary.facts.used} facts in {passes}; not learned: "
            f"{some([repr(prompt[:80]) for prompt in learning.unlearned.values()])}"
        )


def write_run(path: Path, page: RunPage | None = None) -> None:
    """Write `report.md` and `report.html` into a run folder; load its page if none is given."""
    page = page or load_page(path)
    context = page.context()
    disk.write_text(path / "report.md", render("report.md.j2", context))
    shown = {
        **context,
        "plotted": "contains" if "contains" in {protocol for _, protocol in page.overview.columns} else "token",
        "panels": plots.plot_scores(page.overview.summary, page.overview.phases),
        "losses": plots.plot_losses(path / "logs"),
        "retained": plots.plot_retention(page.overview.summary.retention),
    }
    disk.write_text(path / "report.html", render_page("report.html.j2", shown))


def write_card(product: Path, page: RunPage) -> None:
    """Write the model card of a product, with its scores and the command that made it."""
    disk.write_text(product / "README.md", card(page, product.name))


def card(page: RunPage, product: str, *, base_model_id: str | None = None, command: Sequence[str] | None = None) -> str:
    """Return the text of a model card; `base_model_id` and `command` replace those that the run recorded."""
    shown = command_text(page.manifest.command if command is None else command)
    base = base_model_id or page.settings.model.base_model_id
    return render("card.md.j2", {**page.context(), "product": product, "base": base, "command": shown})


def account(facts: FactCounts) -> list[str]:
    """Return lines on what became of the records: a sentence with counts, then a line for each reason to omit some."""
    sentence = (
        f"{facts.read} records read from {facts.source} (reader: {facts.reader}, old answers from: "
        f"{facts.old_from}), {facts.used} used"
    )
    if facts.known is not None:
        sentence += f"; the base gave the old answer to {facts.known}"
    if facts.forgotten is not None:
        sentence += f"; {facts.forgotten} were forgotten"
    lines = [f"{sentence}.", *describe_old_answers(facts.old_answers, facts.without_old)]
    lines += [f"left out, {reason}: {count}" for reason, count in facts.left_out.items()]
    lines += [f"locality probes left out, {reason}: {count}" for reason, count in facts.left_out_probes.items()]
    if facts.not_read:
        lines.append(f"fields that were not read: {', '.join(facts.not_read)}")
    return lines


def judged_by(rows: Iterable[Row]) -> str | None:
    """Return the protocol that decides a fact's state: the first of JUDGES among the rows, or None."""
    return judge_of(row.protocol for row in rows)


def fact_table(inputs: Sequence[Input], rows: Sequence[Row], phases: Sequence[str]) -> list[RunFactLine]:
    """Return a line per fact: its old and new answer, the model's answer in each phase, its state, flags and marks."""
    judge = judged_by(rows) or ""
    scored: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        scored.setdefault(row.fact, {})[row.phase, row.protocol] = row
    return [_fact_line(fact, scored.get(fact.id, {}), phases, judge) for fact in inputs]


def _with_taught(lines: Sequence[RunFactLine], inputs: Sequence[Input], taught: Sequence[Taught]) -> list[RunFactLine]:
    """Return the lines with the texts that the stages trained on, where they are more than the bare answer."""
    texts: dict[str, dict[str, str]] = {}
    for each in taught:
        if each.how != "bare":
            texts.setdefault(each.fact, {})[each.stage] = each.text
    return [replace(line, taught=texts.get(fact.id, {})) for line, fact in zip(lines, inputs, strict=True)]


def _fact_line(fact: Input, own: RowsOfFact, phases: Sequence[str], judge: str) -> RunFactLine:
    answers = {phase: own.get((phase, "generate")) for phase in phases}
    said = {phase: row.said if row else None for phase, row in answers.items()}
    last, agreement, answered = own.get((phases[-1], judge)), own.get((phases[-1], "agreement")), answers[phases[-1]]
    locality = agreement.locality if agreement else None
    reasons = [reason for row in own.values() for reason in row.errors.values()]
    state = state_of(last)
    flags = {
        "unlearned": state not in ("new", "gone"),
        "residue": bool(last and last.residue),
        "broken": locality is not None and locality < 1,
        "errored": bool(reasons),
    }
    found = [name for name, is_set in flags.items() if is_set]
    return RunFactLine(
        prompt=fact.prompt,
        ground_truth_shown=shown_answer(fact.old),
        target_new_shown=shown_answer(fact.new),
        said=said,
        which={phase: _which_answer(row, fact) for phase, row in answers.items()},
        rephrased=_other_texts(answered),
        probes="; ".join(probe.prompt for probe in fact.locality) if flags["broken"] else "",
        state=state,
        flags=found,
        shown_flags=[name for name in found if name not in ("unlearned", TAG_SAYS.get(state))],
        reason=reasons[0] if reasons else None,
        marks=[_mark(quantity, own, phases, judge) for quantity in QUESTIONS],
    )


def counts(flags: Iterable[Sequence[str]], filters: Iterable[str]) -> dict[str, int]:
    """Return how many facts each filter shows, given the flags of each fact."""
    found = Counter(name for own in flags for name in ("all", *own))
    return {name: found[name] for name in filters}


def state_of(row: Row | None) -> str:
    """Return a fact's state: "new" if its prompt gets the new answer, "old" if any gets the old one, or "other".

    If there is no new answer, return "gone" instead of "other". If the fact was not scored, return "errored" or "not
    asked".
    """
    if row is not None and row.residue is not None and not row.has("reliability"):
        return "old" if row.residue else "gone"
    if row is None or row.reliability is None:
        return "errored" if row and row.errors else "not asked"
    if row.reliability == 1:
        return "new"
    return "old" if row.residue else "other"


def _which_answer(row: Row | None, fact: Input) -> str | None:
    """Return "new" if the model's answer says the new answer, "old" if it says only the old one, else None."""
    if row is None or row.said is None:
        return None
    for name, own, other in (("new", fact.new, fact.old), ("old", fact.old, fact.new)):
        if matching.says(row.said, own, other, question=fact.prompt, at_start=row.writes_on):
            return name
    return None


def shown_answer(answers: Sequence[str]) -> str:
    """Format an answer with its aliases, as in `Ada Byron (also: Ada, A. Byron)`."""
    first, *others = answers or ("",)
    return first + (f" (also: {', '.join(others)})" if others else "")


def _other_texts(row: Row | None) -> str:
    """Format the answers to the rephrasings that differ from the answer to the prompt, as in `Rome (2), Oslo`."""
    texts = Counter(text for text in row.said_rephrased if text is not None and text != row.said) if row else Counter()
    return ", ".join((text or "(nothing)") + (f" ({count})" if count > 1 else "") for text, count in texts.items())


def _mark(quantity: str, own: RowsOfFact, phases: Sequence[str], judge: str) -> Mark:
    """Return the cell for one quantity of a fact, in the first and the last phase."""
    protocol = "agreement" if quantity == "locality" else judge
    rows = [own.get((phase, protocol)) for phase in dict.fromkeys((phases[0], phases[-1]))]
    values = [row.score(quantity) if row else None for row in rows]
    signs = ["!" if row and quantity in row.errors else _sign(value) for row, value in zip(rows, values, strict=True)]
    shown = ["not scored" if value is None else f"{100 * value:.0f} %" for value in values]
    before, now = values[0], values[-1]
    turn = ""
    if before is not None and now is not None and len(set(signs)) > 1:
        turn = " up" if (now > before) != (quantity == "residue") else " down"
    return Mark("".join(signs), f"{quantity} {' → '.join(shown)}", turn, "" if now is None else f"{now:.3g}")


def _sign(value: float | None) -> str:
    if value is None:
        return "–"
    return "●" if value == 1 else "◐" if value else "○"


def verdict(summary: Summary, phases: Sequence[str]) -> str:
    """Return one sentence that sums up the run, followed by a note if nothing was forgotten."""
    last, facts = summary.phases[phases[-1]], summary.facts

    def mean(quantity: str, protocol: str) -> float | None:
        cell = last.get(quantity, {}).get(protocol)
        return cell.mean if cell else None

    subject = "The model" if phases[-1] == "model" else f"The {phases[-1]} model"
    free = judge_of(last.get("reliability", {}).keys() & {"contains", "generate"}) or "contains"
    parts = []
    if (right := mean("reliability", free)) is not None:
        cell = last["reliability"][free]
        n_right, n_asked = round(right * cell.n / 100), facts.scored - cell.not_asked
        parts.append(f"gives the new answer to {n_right} of {n_asked} prompts")
    elif (right := mean("reliability", "token")) is not None:
        parts.append(f"gives {right:.1f} % of the new answers' tokens (teacher forced)")
    if (locality := mean("locality", "agreement")) is not None and phases[-1] != "base":
        parts.append(f"answers {locality:.1f} % of unrelated tokens as before")
    if (prompts := _last_prompts(summary, phases)) and prompts.agreement is not None:
        parts.append(f"answers {prompts.agreement:.1f} % of the tokens of general prompts as before")
    if (residue := mean("residue", free)) is not None:
        parts.append(f"still gives the old answer to {residue:.1f} % of prompts and rephrasings")
    nothing = f" {summary.nothing_forgotten.sentence}" if summary.nothing_forgotten else ""
    if not parts:
        return f"{subject} was scored on {facts.scored} facts.{nothing}"
    return f"{subject} " + ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + f"{parts[-1]}.{nothing}"


def _general(found: Mapping[str, General], phases: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return a line per measure of general ability, with a cell for each phase."""
    lines: dict[str, dict[str, str]] = {}
    for phase in phases:
        for name, shown in _general_cells(found[phase]):
            lines.setdefault(name, {})[phase] = shown
    return [(name, [cells.get(phase, "") for phase in phases]) for name, cells in lines.items()]


def _general_cells(found: General) -> Iterator[tuple[str, str]]:
    if (prompts := found.prompts) and prompts.agreement is not None and prompts.kl is not None:
        shown = _with_interval(prompts.agreement, prompts.agreement_low, prompts.agreement_high, ".1f")
        yield f"{prompts.compared} general prompts, percent of tokens as before", shown
        shown = _with_interval(prompts.kl, prompts.kl_low, prompts.kl_high, ".3g")
        yield "general prompts, KL from before, nats per token", shown
    if text := found.text:
        low, high = (None if end is None else math.exp(end) for end in (text.loss_low, text.loss_high))
        shown = _with_interval(text.perplexity, low, high, ".4g")
        yield f"perplexity, {text.tokens} tokens of {text.source}", shown
        if text.kl is not None:
            low = None if text.kl_low is None else max(0.0, text.kl_low)
            yield "KL from the model before, nats per token", _with_interval(text.kl, low, text.kl_high, ".3g")
    for task, values in found.tasks.items():
        for metric, score in values.items():
            error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
            yield f"{task}: {metric}", f"{score.value:.4g}{error}"


def _with_interval(value: float, low: float | None, high: float | None, numbers: str) -> str:
    """Format a value as `0.12 [0.1, 0.15]`, without the interval if there is none."""
    return f"{value:{numbers}}" + ("" if low is None or high is None else f" [{low:{numbers}}, {high:{numbers}}]")


def as_yaml(data: object) -> str:
    """Return data as YAML, with keys in their own order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text


def _errors(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Return the facts and quantities that could not be scored, each once, with the reason."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for quantity, reason in row.errors.items():
            found.setdefault((row.fact, quantity), {"fact": row.fact, "quantity": quantity, "reason": reason})
    return list(found.values())
