"""Render templates as Markdown or self-contained HTML, and format scores.

Text from facts or models is escaped: in HTML by jinja2's autoescape, in Markdown by `_cell`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from forgetlearn.evaluation.statistics import Estimate, OverSeeds
from forgetlearn.report.paper_table import Measured
from forgetlearn.storage.records import Score

Interval = Estimate | OverSeeds | Score | Measured  # a mean with its 95 % interval, in percent or points
Column = tuple[str, str]  # quantity and protocol
COLUMNS: tuple[Column, ...] = (
    ("reliability", "contains"),
    ("generality", "contains"),
    ("locality", "agreement"),
    ("residue", "contains"),
    ("reliability", "generate"),
    ("generality", "generate"),
    ("residue", "generate"),
    ("reliability", "token"),
    ("generality", "token"),
    ("residue", "token"),
)
JUDGES = ("contains", "generate", "exact", "token", "prefer")  # the first of these that was scored decides and leads
QUESTIONS = {
    "reliability": "does it give the new answer?",
    "generality": "also when asked in other words?",
    "locality": "is everything else as it was?",
    "residue": "does it still give the old answer? (lower is better)",
}

# Control characters except tab and line feed, and characters that change the direction of text.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Plain text that Markdown renderers turn into a link, a mention, a reference or an emoji. The parts before :// and @
# have a maximum length, without which the search would take quadratic time on a long word.
LIVE = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s`|\\]+|\b(?:www\.|mailto:|xmpp:)[^\s`|\\]+|[\w.+-]{0,64}@[\w.-]+"
    r"|#\d+|(?<!\d):[A-Za-z0-9_+-]+:"
)


def judge_of(protocols: Iterable[str]) -> str | None:
    """Return the first of JUDGES among the protocols that were scored, or None."""
    scored = set(protocols)
    return next((protocol for protocol in JUDGES if protocol in scored), None)


def leading_columns(protocols: Iterable[str]) -> tuple[Column, ...]:
    """Return a column per quantity, under the first of JUDGES among the protocols that were scored."""
    judge = judge_of(protocols) or JUDGES[0]
    return tuple((quantity, "agreement" if quantity == "locality" else judge) for quantity in QUESTIONS)


def render(template: str, context: Mapping[str, object]) -> str:
    """Return a template of the package, filled in. HTML is autoescaped; a name missing from `context` is an error."""
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> Environment:
    """Return the environment of the templates, which compiles each template once."""
    environment = Environment(
        loader=PackageLoader("forgetlearn.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.filters["cell"] = _cell
    environment.filters["score"] = show_score
    environment.filters["difference"] = show_difference
    environment.filters["yaml_string"] = json.dumps  # a JSON string is a YAML string
    return environment


def render_page(template: str, context: Mapping[str, object]) -> str:
    """Return an HTML page with its style and script inlined; its policy forbids other scripts and all requests."""
    templates = resources.files("forgetlearn.report") / "templates"
    style, script = (templates.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Style and script are the package's own files, so they are not escaped.
    inlined = {"style": Markup(style), "script": Markup(script), "script_hash": f"sha256-{digest}"}
    return render(template, {**context, **inlined})


def show_score(cell: Interval | None, *, interval: bool = False) -> str:
    """Format a mean as `78.4`, or with its interval as `78.4 [75.1, 81.5]`; a dash if nothing was scored."""
    return _show(cell, ".1f", interval)


def show_difference(cell: Interval | None) -> str:
    """Format a difference as `+2.1 [-0.3, +4.5]`; a dash if nothing was paired."""
    return _show(cell, "+.1f", True)


def _show(cell: Interval | None, numbers: str, interval: bool) -> str:
    if cell is None or cell.mean is None:
        return "–"
    whole = interval and cell.low is not None and cell.high is not None
    ends = f" [{cell.low:{numbers}}, {cell.high:{numbers}}]" if whole else ""
    return f"{cell.mean:{numbers}}{ends}"


def _printable(value: object) -> object:
    """Replace control and text-direction characters in a value that a template prints."""
    if not isinstance(value, str):
        return value
    return type(value)(STEERING.sub("�", value))  # Markup stays Markup


def _cell(text: object) -> str:
    """Escape text for a Markdown table or line, so that it never becomes markup, a link, a mention or an emoji.

    Renderers (GitHub, hubs, Discord, Slack) interpret addresses, @names, #numbers and :emoji: even if they are escaped,
    but not in code. So these are written as code.
    """
    shown = " ".join(STEERING.sub("�", "" if text is None else str(text)).split())
    parts, end = [], 0
    for live in LIVE.finditer(shown):
        parts += [_escaped(shown[end : live.start()]), f"`{live[0]}`"]
        end = live.end()
    return "".join([*parts, _escaped(shown[end:])])


def _escaped(text: str) -> str:
    for mark in ("\\", "|", "`", "*", "_", "[", "]", "#", "~", "$"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def command_text(words: Sequence[str]) -> str:
    """Return a command quoted for a shell."""
    return " ".join(shlex.quote(word) for word in words)
