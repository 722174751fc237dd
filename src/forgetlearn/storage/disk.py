"""Read and write files: a file is written completely or not at all, and errors name its path."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from forgetlearn.errors import ConfigError, ForgetLearnError, RunError
from forgetlearn.runtime import processes

LONGEST_NAME = 200  # bytes of a name that temporary names may begin with
UNFINISHED = ".unfinished-"  # in the temporary name of a file or folder that is still being written
DEEPEST = 100  # levels of nested lists and objects; Python can recurse this deep


def cache_folder() -> Path:
    """Return the folder where lab bases and second moments are cached."""
    if named := os.environ.get("FORGETLEARN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetlearn"


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see all of the old text or all of the new. Only the main process writes.

    Raises:
        RunError: the disk is full, or the folder is not writable; the old file stays.
    """
    if not processes.is_main():
        return
    unfinished = _unfinished(path)
    # A lone surrogate is a byte of a file name that is not UTF-8. It is written as an escape, which JSON allows.
    with naming(path), unfinished.open("x", encoding="utf-8", errors="backslashreplace") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def write_json(path: Path, data: object) -> None:
    """Write data to a JSON file, which is replaced in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a JSONL file, which is replaced in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise RunError if the file is missing or damaged, or holds something else."""
    data = _parsed(path, _read(path))
    if not isinstance(data, dict):
        raise RunError(f"{path}: does not contain a JSON object. Was it written by forgetlearn?")
    return data


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file; raise RunError if it cannot be read."""
    return [line for line in _read(path).split("\n") if line]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; raise RunError if the file is missing or a line is damaged."""
    lines = read_lines(path)
    # Parsing all lines in one call takes a quarter of the time, and keys that rows share are stored once.
    rows: list[dict[str, Any]] = _parsed(path, f"[{','.join(lines)}]")
    if len(rows) != len(lines):
        raise RunError(f"{path}: cannot be read: {len(lines)} lines hold {len(rows)} rows.")
    if other := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise RunError(f"{path}: row {other} is not a JSON object. Was it written by forgetlearn?")
    return rows


def read_given(file: Path, setting: str, what: str, most_bytes: int) -> str:
    """Return the text of a file that a user names; messages begin with the `setting`, and say that it is not `what`.

    Raises:
        ConfigError: the file cannot be read, has more than `most_bytes`, or is not UTF-8.
    """
    try:
        if file.stat().st_size > most_bytes:
            raise ConfigError(f"{setting}: has more than {most_bytes:,} bytes, so it is not {what}.")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{setting}: {error.strerror or error}. Give a text file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}: is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def _parsed(path: Path, text: str) -> Any:
    """Return the data in a JSON text; raise RunError if it is invalid, nested too deeply, or has lone surrogates."""
    try:
        data = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST and is_deep(data):
            raise RecursionError
        if "\\ud" in text or "\\uD" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise RunError(f"{path}: cannot be read: lists or objects are nested more than {DEEPEST} deep.") from None
    except ValueError as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    return data


def is_deep(data: object, levels: int = DEEPEST + 1) -> bool:
    """Return True if lists and objects are nested more than `levels` deep."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return levels == 0 or any(is_deep(part, levels - 1) for part in inner if isinstance(part, (dict, list)))


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `final` when the block ends without an error.

    If a run has several processes, all of them get the same folder.

    Raises:
        RunError: writing failed, for example on a full disk; nothing is left behind.
    """
    if processes.world_size() > 1:
        with ExitStack() as stack:  # the main process creates the folder, and renames it when all are done
            unfinished = processes.on_main(lambda: stack.enter_context(atomic_folder(final)))
            yield unfinished
            processes.barrier()
            processes.on_main(stack.close)
        return
    with naming(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _unfinished(final)
        unfinished.mkdir()
        try:
            yield unfinished
            sync_files(unfinished)
            replaced = unfinished.with_name(f"{unfinished.name}-replaced")
            if final.exists():
                final.rename(replaced)
            unfinished.rename(final)
            sync(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(final: Path) -> Path:
    """Return a new temporary path beside `final`, for a file or folder that is still being written."""
    return final.with_name(f"{_beginning(final)}{secrets.token_hex(4)}")


def _beginning(final: Path) -> str:
    """Return the prefix of temporary names for `final`, short enough for the limit of 255 bytes per name."""
    is_short = len(os.fsencode(final.name)) <= LONGEST_NAME
    return f".{final.name if is_short else hashlib.sha256(os.fsencode(final.name)).hexdigest()[:32]}{UNFINISHED}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a disk error in the block into a RunError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}.") from error
    except ForgetLearnError:
        raise
    except Exception as error:
        if reason := _disk_error(str(error)):
            raise RunError(f"{path}: cannot be written: {reason}.") from error
        raise


def _disk_error(message: str) -> str:
    """Return the disk error behind the message of an exception other than OSError; "" if it has another cause."""
    if found := re.search(r"\(os error (\d+)\)", message):  # safetensors and tokenizers, both in Rust
        return os.strerror(int(found[1]))
    if "inline_container" in message or "PytorchStreamWriter" in message:  # torch.save, which does not say why
        return "torch could not write all of it (a full disk?)"
    return "No space left on device" if "No space left" in message else ""


def remove_unfinished(final: Path) -> None:
    """Delete temporary folders that a killed `atomic_folder(final)` left; no other process may be writing `final`."""
    for left in final.parent.glob(f"{glob.escape(_beginning(final))}*"):
        shutil.rmtree(left, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Wait until all files in a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
