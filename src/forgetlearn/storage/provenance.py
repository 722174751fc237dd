"""Describe how a run was made, without secrets: command line, versions of libraries, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from forgetlearn.errors import without_secrets

VERSIONED = ("forgetlearn", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy")
SECRET_FLAGS = ("token", "key", "secret", "password")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def command_line() -> list[str]:
    """Return this process's command as words, with anything that looks like a token masked."""
    return masked([Path(sys.argv[0]).name, *sys.argv[1:]])


def masked(words: Sequence[str]) -> list[str]:
    """Return the words of a command, with anything that looks like a token replaced by ***."""
    shown, hide_next = [], False
    for word in words:
        name, equals, _value = word.partition("=")
        is_secret = name.startswith("--") and any(secret in name.lower() for secret in SECRET_FLAGS)
        text = f"{name}=***" if is_secret and equals else without_secrets(word)
        shown.append("***" if hide_next else text)
        hide_next = is_secret and not equals
    return shown


def commit() -> str | None:
    """Return the git commit of forgetlearn's source tree, or None if it is not in a repository."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def machine() -> str:
    """Return a description of this machine: operating system, architecture, number of CPUs."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, or 0 if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
