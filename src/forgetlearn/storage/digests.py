"""Find the files that make up a model, and detect changed files by their hashes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from forgetlearn.errors import RunError, some
from forgetlearn.storage.disk import read_json, write_json

log = logging.getLogger("forgetlearn")

HISTORY = "forgetlearn.json"  # the file that lists the updates that made a model
COMMIT_DIGITS = 40  # length of a commit hash on the hub; the SHA-256 of a folder has 64 digits
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".py")
LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")  # prefixes of the names of licence files
HASHES = "hashes.json"  # holds the hashes of the other files in its folder


def model_files(folder: Path) -> list[Path]:
    """Return the files that a model is loaded from (weights, config, tokenizer, code); not card, licence or chain."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.name != HISTORY]


def licences(folder: Path) -> list[Path]:
    """Return the files in a folder that state the terms for using its model."""
    return [path for path in sorted(folder.iterdir()) if path.name.startswith(LICENCES)]


def copy_own(path: Path, folder: Path) -> None:
    """Copy a file of a model into `folder`; raise RunError if it is a link that leads out of the model's folder.

    A file from elsewhere is not part of the model and might be published with it. Links within the hub's cache are
    followed.
    """
    home, target = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # where the links of a snapshot in the hub's cache lead
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise RunError(f"{path} is a link to {target}, outside its folder. Replace it by the file itself.")
    shutil.copyfile(path, folder / path.name)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of the files that a folder's model is loaded from."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else model_files(path):
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def is_recorded(folder: Path, recorded: str | None) -> bool:
    """Return True if a folder is the recorded one, by its hash or, if a hub commit was recorded, by its name."""
    if recorded is not None and len(recorded) == COMMIT_DIGITS:
        return folder.resolve().name == recorded
    return recorded is not None and sha256_of(folder) == recorded


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by name, except Markdown files, which people may edit."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def damaged(folder: Path, written: Mapping[str, str]) -> list[str]:
    """Return the names of the files in `written` that are missing or whose hash has changed."""
    return [name for name in written if not (folder / name).is_file() or sha256_of(folder / name) != written[name]]


def write_hashes(folder: Path) -> None:
    """Write the hashes of a folder's files to hashes.json in it, for `is_whole`."""
    write_json(folder / HASHES, hashes(folder))


def is_whole(folder: Path) -> bool:
    """Return True if no file of a folder is missing or changed since `write_hashes`; log a warning if one is."""
    if not folder.is_dir():
        return False
    try:
        changed = damaged(folder, read_json(folder / HASHES))
    except RunError:
        changed = [HASHES]
    if changed:
        log.warning("%s: %s changed since it was written; making it again", folder, some(changed))
    return not changed


def hash_of(data: object) -> str:
    """Return the SHA-256 of JSON data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
