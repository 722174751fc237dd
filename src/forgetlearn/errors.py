"""The errors that forgetlearn raises: one small tree, each also a standard type.

A message answers, in at most three lines: which value, where (file, record, tensor), what was
expected, what to do. The command line prints it and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

# A token of the hub, name and password of a URL, and what a name such as token= or WANDB_API_KEY= is given.
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|((?i:token|api_?key|secret|password)=)[^&\s\"']+"
)
SECRET_WORDS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD"}  # in the names of environment variables
SHORTEST_SECRET = 8


class ForgetLearnError(Exception):
    """Anything that forgetlearn refuses, with a message for the person who asked for it."""


class ConfigError(ForgetLearnError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class FactError(ForgetLearnError, ValueError):
    """A file of facts, or a record in it, cannot be used."""


class ModelError(ForgetLearnError, ValueError):
    """A model, an adapter or a tokenizer cannot be loaded or does not fit what is asked of it."""


class WeightMismatchError(ForgetLearnError, ValueError):
    """Two sets of weights that should agree in names and shapes do not."""


class TrainingError(ForgetLearnError, RuntimeError):
    """A stage of fine-tuning went wrong: its loss is not finite, say."""


class RunError(ForgetLearnError, RuntimeError):
    """A run folder is there already, is damaged, or belongs to another run."""


class MissingExtraError(ForgetLearnError, ImportError):
    """An optional package is not installed; the message says how to get it."""


def missing_extra(purpose: str, extra: str, error: ImportError) -> MissingExtraError:
    """What to raise where the import of an optional package fails: why it is needed, how to install it."""
    return MissingExtraError(f"{purpose}: {error}. Install what that needs: pip install 'forgetlearn[{extra}]'")


def check_installed(package: str, purpose: str, extra: str) -> None:
    """Nothing, if an optional package is there; it is not imported.

    Raises:
        MissingExtraError: it is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise missing_extra(purpose, extra, ImportError(f"the package {package} is not installed"))


def plain(text: str) -> str:
    """Text from facts, models and file names for one line of a terminal or a log: nothing in it steers the terminal.

    What does not print (control characters, marks that turn the direction of text, halves of surrogate pairs) is
    written as its escape: `\\x1b`, `\\u202e`. Applied twice it is as applied once.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def without_secrets(text: str) -> str:
    """The text with `***` in place of anything that looks like a token or password, or is one of the environment's."""
    for name, value in os.environ.items():
        if SECRET_WORDS & {*name.upper().split("_")} and len(value) >= SHORTEST_SECRET and not value.startswith("/"):
            text = text.replace(value, "***")
    return SECRET.sub(lambda found: f"{found[1] or ''}***", text)


def some(items: Sequence[object], most: int = 5) -> str:
    """A long list for a message: the first five, each of one line, then "and n more"."""
    shown = ", ".join(plain(str(item)) for item in items[:most])
    return shown if len(items) <= most else f"{shown}, and {len(items) - most} more"
