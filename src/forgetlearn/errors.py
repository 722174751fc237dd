"""The errors that forgetlearn raises. Each is a ForgetLearnError and also a built-in exception.

A message says, in at most three lines, which value is wrong, where it is (file, record, tensor), what was expected
and what to do. The command line prints it and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence

# Matches tokens of a known shape, the name and password in a URL, and the value after a name such as token= or
# WANDB_API_KEY=. The group is the part of the match that is kept.
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[opsru]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bsk-(?=[\w-]*\d)[\w-]{16,}|\bxox[a-z]-[\w-]{10,}|\bA[KS]IA[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bpypi-[\w-]{16,}"
    r"|\bnpm_[A-Za-z0-9]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|((?i:(?:token|api_?key|access_?key|secret|passw(?:or)?d|passphrase|credentials?|(?:\b|_)(?:pass|pwd|pat|auth))="
    r"|\b(?:bearer|basic)\s+(?=\S*\d)(?=\S{8})))[^&\s\"']+"
)
# Matches names of environment variables that hold secrets: MYTOKEN, PGPASSWORD, DB_PASS, GITHUB_PAT, but not
# TOKENIZERS_PARALLELISM, PATH or KEYBOARD.
SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(?:KEY|PASS|PWD)(?:S?(?:_|$))|(?:^|_)(?:PAT|AUTH|JWT)(?:_|$)"
)
SHORTEST_SECRET = 8
SHORTEST_MIXED = 6  # for a value that is neither all letters nor all digits


class ForgetLearnError(Exception):
    """The base class of all errors that forgetlearn raises on purpose. The message is written for the user."""


class ConfigError(ForgetLearnError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class FactError(ForgetLearnError, ValueError):
    """A file of facts, or a record in it, cannot be used."""


class ModelError(ForgetLearnError, ValueError):
    """A model, an adapter or a tokenizer cannot be loaded, or cannot be used for the task."""


class WeightMismatchError(ForgetLearnError, ValueError):
    """Two sets of weights that should agree in names and shapes do not."""


class TrainingError(ForgetLearnError, RuntimeError):
    """A stage of fine-tuning failed, for example because its loss is not finite."""


class RunError(ForgetLearnError, RuntimeError):
    """A run folder already exists, is damaged, or belongs to another run."""


class DamageError(ForgetLearnError, RuntimeError):
    """An update changed more than `evaluate.max_damage` allows; its product was put aside."""


class MissingExtraError(ForgetLearnError, ImportError):
    """An optional package is not installed; the message says how to get it."""


def missing_extra(purpose: str, extra: str, error: ImportError) -> MissingExtraError:
    """Return the error for a missing optional package: why the package is needed and how to install it."""
    return MissingExtraError(f"{purpose}: {error}. Install what that needs: pip install 'forgetlearn[{extra}]'")


def check_installed(package: str, purpose: str, extra: str) -> None:
    """Raise MissingExtraError unless an optional package is installed. The package is not imported."""
    if importlib.util.find_spec(package) is None:
        raise missing_extra(purpose, extra, ImportError(f"the package {package} is not installed"))


def plain(text: str) -> str:
    """Return a text from facts, models or file names that is safe on one line of a terminal or log.

    Characters that do not print (control characters, marks that change the direction of text, halves of surrogate
    pairs) become escapes: `\\x1b`, `\\u202e`. A second call changes nothing.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Format a value from a JSON file for a message, in one short line."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = "null" if value is None else repr(value)
    return plain(text if len(text) <= 60 else f"{text[:60]}…")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean ...?" with the known name closest to `name`, after `prefix`; "" if none is close."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean '{prefix}{near[0]}'?" if near else ""


def without_secrets(text: str) -> str:
    """Return the text with `***` for whatever looks like a token or password, or is a secret in the environment."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name.upper()) and _may_be_secret(value) and value in text:
            # A short secret may also be a part of another word.
            edges = ("", "") if len(value) > 2 * SHORTEST_SECRET else (r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])")
            text = re.sub(edges[0] + re.escape(value) + edges[1], "***", text)
    return SECRET.sub(lambda found: f"{found[1] or ''}***", text)


def _may_be_secret(value: str) -> bool:
    """Return False for values that are not secrets, whatever the variable's name: switches, numbers, paths, sockets."""
    looks_like_path = value.startswith(("/", "~/", "./"))
    # pathlib would raise an error if the value is too long for a path.
    is_path = looks_like_path and ("." in value.rpartition("/")[2] or os.path.exists(value))  # noqa: PTH110
    shortest = SHORTEST_SECRET if value.isalpha() or value.isdigit() else SHORTEST_MIXED
    return len(value) >= shortest and not is_path and value.lower() not in ("disabled", "enabled", "required")


OUT_OF_MEMORY = re.compile(
    r"can't start new thread|can't allocate memory|cannot allocate memory|failed to map segment|DefaultCPUAllocator",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the system refused memory or threads, however the library words that."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def some(items: Sequence[object], most: int = 5) -> str:
    """Format a list for a message: its first `most` items, each on one line, then "and n more"."""
    shown = ", ".join(plain(str(item)) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, and {len(items) - most} more"
