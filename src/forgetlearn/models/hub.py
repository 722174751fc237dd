"""The model hub, read: whether it answers, a model's files at a commit, and a plain word where that fails."""

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
# What the hub's client raises, somewhere below transformers' own errors, in words, and whether the name may be a
# folder's that was mistyped; the first that fits counts.
PROBLEMS: tuple[tuple[type[Exception], str, bool], ...] = (
    (
        errors.GatedRepoError,
        "is gated. Ask for access on its page, then set HF_TOKEN (or run `hf auth login`).",
        False,
    ),
    (
        errors.RepositoryNotFoundError,
        "is no folder, and no model on the hub that can be read (private: set HF_TOKEN).",
        True,
    ),
    (errors.RevisionNotFoundError, "has no such revision on the hub.", False),
    (errors.HFValidationError, "is no folder, and cannot be a hub id.", True),
    (
        errors.LocalEntryNotFoundError,
        "is no folder here, is not in the hub's cache, and the hub cannot be reached. "
        "Check the name, the network and HF_HUB_OFFLINE, or download the model first.",
        True,
    ),
)


@functools.cache
def answers() -> bool:
    """Whether the hub can be reached; asked once in a process, with one try.

    The hub's client tries six times for each file, which takes 23 s before it says that a mistyped name is unknown.
    """
    if constants.is_offline_mode():
        return False
    client = logging.getLogger("huggingface_hub.utils._http")
    client.disabled, was = True, client.disabled  # it would tell of the try that failed; the error says more
    try:
        http_backoff("HEAD", constants.ENDPOINT, max_retries=0, retry_on_status_codes=(), timeout=TIMEOUT_S)
    except Exception:  # errors of the network and of proxies have no common base
        return False
    finally:
        client.disabled = was
    return True


def problem(error: Exception, name: str) -> str | None:
    """What went wrong between here and the hub, to be put after a model's name; None where it was something else."""
    causes = tuple(_causes(error))
    for kind, words, mistyped in PROBLEMS:
        if any(isinstance(cause, kind) for cause in causes):
            return words + (near_models(Path(name)) if mistyped else "")
    return None


def near_models(folder: Path) -> str:
    """A sentence on folders of models whose names are like that of one that is not there; nothing if there are none."""
    try:
        models = [other.name for other in folder.parent.iterdir() if os.access(other / "config.json", os.R_OK)]
    except OSError:  # no such place, or none that may be read
        return ""
    near = difflib.get_close_matches(folder.name, models, 3)
    return f" Folders of models of a like name are there: {some(near)}." if near else ""


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that is named by it or by a hub id (owner/name): then in the cache, downloaded if needed.

    Raises:
        ModelError: the hub has no such model, does not show it, or cannot be reached and the cache has not all of it.
    """
    return snapshot(str(name), revision) if is_hub_id(str(name)) else Path(name)


def snapshot(name: str, revision: str | None) -> Path:
    """The folder in the hub's cache with a model's files at a revision; what is not there yet is downloaded.

    Raises: as `folder_of`.
    """
    wanted = [*(f"*{suffix}" for suffix in MODEL_SUFFIXES), *(f"{name}*" for name in LICENCES)]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*/*.safetensors"],  # other forms of the same weights
                local_files_only=not answers(),
            )
        )
    except Exception as error:
        reason = (
            problem(error, name)
            or f"cannot be downloaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        )
        raise ModelError(f"{name}: {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
