"""Read the model hub: check whether it can be reached, find a model's files at a revision, explain errors."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]

from forgetlearn.errors import ModelError, some
from forgetlearn.facts.files import is_hub_id
from forgetlearn.storage.digests import LICENCES, MODEL_SUFFIXES

TIMEOUT_S = 10
# Errors of the hub's client, which transformers wraps in its own errors; the first match counts. The second field is
# True if the name may be a mistyped folder.
PROBLEMS: tuple[tuple[type[Exception], bool, str], ...] = (
    (errors.GatedRepoError, False, "is gated. Ask for access on its page, then set HF_TOKEN (or run `hf auth login`)."),
    (
        errors.RepositoryNotFoundError,
        True,
        "is neither a folder nor a model on the hub that can be read (private: set HF_TOKEN).",
    ),
    (errors.RevisionNotFoundError, False, "has no such revision on the hub."),
    (errors.HFValidationError, True, "is not a folder, and cannot be a hub id."),
    (
        errors.LocalEntryNotFoundError,
        True,
        "is not a folder here, is not in the hub's cache, and the hub cannot be reached. "
        "Check the name, the network and HF_HUB_OFFLINE, or download the model first.",
    ),
)


@functools.cache
def is_reachable() -> bool:
    """Return True if the hub can be reached. Each process tries only once.

    The hub's client itself tries six times for each file, which takes 23 s before it reports a mistyped name.
    """
    if constants.is_offline_mode():
        return False
    client = logging.getLogger("huggingface_hub.utils._http")
    client.disabled, was = True, client.disabled  # it would log the failed attempt; our error says more
    try:
        http_backoff("HEAD", constants.ENDPOINT, max_retries=0, retry_on_status_codes=(), timeout=TIMEOUT_S)
    except Exception:  # errors of the network and of proxies have no common base
        return False
    finally:
        client.disabled = was
    return True


def problem(error: Exception, name: str) -> str | None:
    """Return the end of a sentence that starts with a model's name and explains a hub error; None for other errors."""
    causes = tuple(_causes(error))
    for kind, may_be_mistyped, words in PROBLEMS:
        if any(isinstance(cause, kind) for cause in causes):
            return words + (near_models(Path(name)) if may_be_mistyped else "")
    return None


def near_models(folder: Path) -> str:
    """Return a sentence that lists similarly named models beside a missing folder; return "" if there are none."""
    try:
        models = [other.name for other in folder.parent.iterdir() if os.access(other / "config.json", os.R_OK)]
    except OSError:  # the parent does not exist or cannot be read
        return ""
    near = difflib.get_close_matches(folder.name, models, 3)
    return f" Did you mean: {some(near)}?" if near else ""


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """Return a model's folder; for a hub id (owner/name), its folder in the cache, downloading files if needed.

    Raises:
        ModelError: the hub lacks the model or denies access to it, or cannot be reached and the cache is incomplete.
    """
    return snapshot(str(name), revision) if is_hub_id(str(name)) else Path(name)


def snapshot(name: str, revision: str | None) -> Path:
    """Return the cache folder of a hub model's files at a revision, downloading them if needed; see `folder_of`."""
    wanted = [*(f"*{suffix}" for suffix in MODEL_SUFFIXES), *(f"{name}*" for name in LICENCES)]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*/*.safetensors"],  # the same weights in other formats
                local_files_only=not is_reachable(),
            )
        )
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: {problem(error, name) or f'cannot be downloaded: {first_line}'}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
