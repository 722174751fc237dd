"""Try regular expressions from files, with a time limit, before they are used.

Python's `re` cannot be stopped, and peft matches the patterns in an adapter's config against the name of every
module: `(.*)*(.*)*x` would take years. So each pattern is first tried on the same names in a process that can be
killed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MOST_SECONDS = 5.0  # for all patterns together, including the start of the process; a match takes microseconds
_HARMLESS = re.compile(r"[\w.-]*")  # a pattern of these characters alone is matched in one pass
_TRY = """
import json, os, re, sys
given = json.load(sys.stdin)
for pattern, how in given["patterns"]:
    os.write(1, b".")
    try:
        match = getattr(re.compile(pattern), how)
    except (re.error, OverflowError, RecursionError) as error:
        os.write(2, str(error).encode(errors="replace"))
        sys.exit(3)
    for name in given["names"]:
        match(name)
"""


@dataclass(frozen=True)
class Pattern:
    """A pattern: its setting, its text there, the regular expression made from it, and how `re` matches it."""

    setting: str
    text: str
    regex: str
    how: Literal["match", "fullmatch"] = "fullmatch"


def problem(patterns: Sequence[Pattern], names: Sequence[str]) -> str | None:
    """Describe the first pattern that is invalid or takes too long on `names`; None if all are usable.

    The sentence starts with the setting and ends with what was expected.
    """
    tried = [pattern for pattern in patterns if not _HARMLESS.fullmatch(pattern.text)]
    if not tried or not sys.executable:
        return None
    given = json.dumps({"patterns": [(pattern.regex, pattern.how) for pattern in tried], "names": list(names)})
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        return _describe(tried, late.stdout, f"takes more than {MOST_SECONDS:g} s to match the names of modules")
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() if done.returncode == 3 else ""
        return _describe(tried, done.stdout, f"is not a valid regular expression{': ' if reason else ''}{reason[:200]}")
    return None


def _describe(tried: Sequence[Pattern], dots: bytes | None, what: str) -> str:
    pattern = tried[max(0, len(dots or b"") - 1)]  # a dot is printed before each is tried
    shown = pattern.text if len(pattern.text) <= 80 else f"{pattern.text[:80]}..."
    return f"{pattern.setting} = {shown!r} {what}. Expected a plain name, or a pattern such as .*\\.q_proj"
