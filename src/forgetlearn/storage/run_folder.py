"""The run folder: what was asked, and which stages are done with which results; resume.

A stage counts as done only when the manifest says so, and the manifest is replaced last. So a kill at any
moment leaves a folder from which `--resume` goes on with the last stage that was finished. The manifest holds a hash of
what each stage wrote and of itself: what was damaged since is done again, or is an error, and never used.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from forgetlearn.errors import RunError, plain, some, without_secrets
from forgetlearn.runtime import processes
from forgetlearn.storage import records
from forgetlearn.storage.digests import HISTORY, damaged, hash_of, hashes, sha256_of
from forgetlearn.storage.disk import UNFINISHED, atomic_folder, naming, read_json, write_json

log = logging.getLogger("forgetlearn")

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest: since 2 it always holds a hash of itself
ARITHMETIC = "arithmetic.json"  # how a checkpoint was computed from others
VERSIONED = ("forgetlearn", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy")
SECRET_FLAGS = ("token", "key", "secret", "password")
RESULTS = ("facts.jsonl", "inputs.jsonl", "summary.json", "config.yaml", "logs/*.jsonl")  # of a run
WITHOUT_EFFECT = ("checkpoint_minutes", "report_to")  # settings that may change from one resume to the next
LOCKS = (".lock", ".writer.json")  # while a process writes the run: its lock, and who it is (locks.py)


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        remove_leftovers: bool = True,
        upgraded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> RunFolder:
        """A new run folder, or with `resume` the one that is there, if it was begun with the same things.

        Raises:
            RunError: the folder exists and neither flag is given, or the run in it was begun with another
                config or other inputs (the message names the first difference).

        Without `remove_leftovers` other processes may be writing in the folder. `upgraded` gives a config that an
        earlier version recorded the settings that came since, as they were then: with their defaults.
        """
        path = Path(path)
        check_output(path, resume=resume, overwrite=overwrite)
        config, inputs = _plain(config), _plain(inputs)
        _check_names(config)
        if resume and is_run(path):
            run = cls.open(path)
            run.check_same(config, "config", upgraded)
            run.check_same(inputs, "inputs")
            run._drop_damaged_stages()
            if remove_leftovers:
                run.remove_leftovers()
            return run
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
        manifest = {
            "format": FORMAT,
            "command": command_line(),
            "config": config,
            "inputs": inputs,
            "versions": versions(),
            "commit": _commit(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "stages": {},
        }
        if any(path.iterdir()):
            manifest["replaces"] = True  # what is there; until it is gone
        run = cls(path, manifest)
        run._save()  # before the old run goes: a kill leaves a folder that is known as ours
        if remove_leftovers:
            run.remove_leftovers()
        return run

    @classmethod
    def open(cls, path: str | Path, kind: type[records.Manifest] = records.Manifest) -> RunFolder:
        """Open the run in a folder; `kind` says which recorded settings are checked too.

        Raises:
            RunError: there is none, or its manifest cannot be read or is not as it was written.
        """
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise RunError(f"{path}: no {MANIFEST} there, so it is no run folder.")
        manifest = read_json(file)
        records.check(kind, manifest, file)
        written = manifest.pop("sha256", None)
        may_lack = written is None and manifest.get("format", 1) == 1  # else a flipped bit in its name would hide it
        if not may_lack and written != hash_of(manifest):
            raise RunError(
                f"{file} was changed or damaged: its hash does not match. Restore it from a backup, or start a new run."
            )
        return cls(Path(path), manifest)

    def check_seen(self) -> None:
        """Raise RunError unless this process sees the run that process 0 writes.

        Raises:
            RunError: it does not: the folder is on a disk of another machine.
        """
        if not (self.path / MANIFEST).is_file():
            raise RunError(
                f"Process {processes.rank()} does not see {self.path}, which process 0 writes. "
                "Choose an output folder on a file system that all machines share."
            )

    def check_same(
        self, now: Mapping[str, Any], part: str, upgraded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    ) -> None:
        """Raise RunError unless the run was begun with the same `part` (config or inputs); `upgraded` as in `create`.

        Raises:
            RunError: the first setting that differs, with both values.
        """
        was, wanted = _flat(_plain(upgraded(self.manifest[part])), part), _flat(_plain(now), part)
        names = [name for name in {**was, **wanted} if name.rsplit(".", 1)[-1] not in WITHOUT_EFFECT]
        differ = [name for name in names if was.get(name) != wanted.get(name)]
        if differ:
            name = differ[0]
            raise RunError(
                f"{self.path} was begun with {name} = {was.get(name)!r}, now it is {wanted.get(name)!r}"
                f"{f' (and {len(differ) - 1} more differ)' if len(differ) > 1 else ''}. "
                "Resume with the same settings, or choose another folder."
            )

    def is_done(self, stage: str) -> bool:
        """Whether a stage was finished."""
        return stage in self.manifest["stages"]

    def do(self, stage: str, compute: Callable[[Path], Mapping[str, Any] | None], folder: str | None = None) -> None:
        """Do a stage if it is not done: `compute` writes into a folder that appears only when it is complete.

        The folder is `stages/<stage>`, or `folder` in the run; what `compute` returns goes to the manifest
        with the seconds that it took.
        """
        if self.is_done(stage):
            shutil.rmtree(self.points(stage), ignore_errors=True)  # killed just after the stage, it left them
            return
        start = time.perf_counter()
        final = self.path / (folder or f"stages/{stage}")
        with atomic_folder(final) as unfinished:
            noted = compute(unfinished)
            processes.barrier()  # others may still be writing
            digests = processes.on_main(lambda: hashes(unfinished))
        took = round(time.perf_counter() - start, 3)
        files = {f"{final.relative_to(self.path).as_posix()}/{name}": digest for name, digest in digests.items()}
        steps = self.path / f"logs/{stage}.jsonl"
        files |= {f"logs/{steps.name}": sha256_of(steps)} if steps.is_file() else {}
        self.manifest["stages"][stage] = {"seconds": took, **_plain(noted or {}), "files": files}
        self._save()
        shutil.rmtree(self.points(stage), ignore_errors=True)

    def points(self, stage: str) -> Path:
        """Where the checkpoints inside a stage are, until it is done."""
        return self.path / f"stages/{stage}.points"

    def noted(self, stage: str, name: str) -> Any:
        """What a stage noted under a name; None where it did not, or is not done."""
        return self.manifest["stages"].get(stage, {}).get(name)

    def remove_stage_weights(self) -> None:
        """Delete the weights between the stages, with their folder where it holds no rows; rows and logs stay."""
        for folder in {file.parent for file in (self.path / "stages").rglob("*.safetensors")}:
            with naming(folder):
                if not list(folder.glob("*.jsonl")):
                    shutil.rmtree(folder)
                for file in folder.glob("*.safetensors"):
                    file.unlink()

    def note(self, **facts: Any) -> None:
        """Add to the manifest."""
        self.manifest.update(_plain(facts))
        self._save()

    def finish(self) -> None:
        """Note that the whole run is done, the most memory that it took, and the hashes of its results."""
        self.manifest["finished"] = True
        results = sorted({file for pattern in RESULTS for file in self.path.glob(pattern)})
        self.manifest["results"] = {file.relative_to(self.path).as_posix(): sha256_of(file) for file in results}
        self.manifest["peak_memory_gb"] = round(_peak_memory_bytes() / 1e9, 3)
        self._save()

    def check_results(self, remedy: str = "run again with --overwrite") -> None:
        """Raise RunError if rows, summary or logs of a finished run were changed since it wrote them.

        Raises:
            RunError: the names of those that are not.
        """
        written = self.manifest.get("results", {})
        if changed := damaged(self.path, {name: written[name] for name in written if (self.path / name).exists()}):
            raise RunError(
                f"{self.path}: {some(changed)}: not as the run wrote it. Restore it from a backup, or {remedy}."
            )

    def check_stage(self, stage: str) -> None:
        """Raise RunError if the files of a stage were changed since it wrote them.

        Raises:
            RunError: the names of those that are not.
        """
        if changed := damaged(self.path, self.manifest["stages"].get(stage, {}).get("files", {})):
            raise RunError(f"{self.path}: {some(changed)}: not as the run wrote it. Restore it from a backup.")

    def _drop_damaged_stages(self) -> None:
        """Begin again at the first stage whose files are not as it wrote them: what came after was made from them."""
        stages = self.manifest["stages"]
        for place, told in enumerate(stages.values()):
            if changed := damaged(self.path, told.get("files", {})):
                again = list(stages)[place:]
                log.warning(
                    "%s: %s: not as it was written, so this is done again: %s", self.path, some(changed), some(again)
                )
                self.manifest["stages"] = {name: stages[name] for name in list(stages)[:place]}
                self._save()
                return

    def _save(self) -> None:
        self.manifest.pop("sha256", None)
        write_json(self.path / MANIFEST, {**self.manifest, "sha256": hash_of(self.manifest)})

    def remove_leftovers(self) -> None:
        """Delete what a kill left half written, and all of a run that this one replaces; nobody else may be writing."""
        kept, replaces = (MANIFEST, *LOCKS), self.manifest.get("replaces")
        old = [file for file in self.path.iterdir() if file.name not in kept] if replaces else []
        for left in (*old, *self.path.rglob(f"*{UNFINISHED}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        if replaces:
            del self.manifest["replaces"]
            self._save()


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run, done or not."""
    return (Path(path) / MANIFEST).is_file()


def is_finished(path: str | Path) -> bool:
    """Whether a folder holds a run that is done."""
    return is_run(path) and "finished" in RunFolder.open(path).manifest


def check_output(
    path: str | Path,
    *,
    resume: bool,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    can_resume: bool = True,
) -> None:
    """Raise RunError unless a run can be written to this folder without losing anything else, such as `inputs`.

    Raises:
        RunError: it is there and neither flag is given, or it is not forgetlearn's to replace, or one of the
            files and folders that the run reads lies in it, or it lies in one of them.
    """
    path, reads = Path(path), [Path(read) for read in inputs if read]
    _check_name(path)
    for read in reads:
        if read.is_dir() and path.resolve().is_relative_to(read.resolve()):
            raise RunError(f"{path} lies in {read}, which this run reads. Choose a folder outside of it.")
    if not path.exists() or (path.is_dir() and all(_is_leftover(child.name) for child in path.iterdir())):
        return
    if resume and not overwrite and is_run(path):
        return
    if not overwrite:
        if path.is_file():
            raise RunError(f"{path} is a file. Give a folder that does not exist yet.")
        if resume:
            raise RunError(f"{path} exists, but holds no run to go on with. Choose another folder.")
        go_on = "--resume to go on with it, or " if can_resume and is_run(path) else ""
        raise RunError(f"{path} exists. Pass {go_on}--overwrite to replace it.")
    if resume:
        raise RunError("Pass --resume to go on with the run, or --overwrite to replace it, not both.")
    if not any(_is_ours(path / name) for name in (MANIFEST, "lab.json", ARITHMETIC, HISTORY)):
        raise RunError(f"{path} was not written by forgetlearn, so --overwrite does not replace it. Choose another.")
    for read in reads:
        if read.resolve().is_relative_to(path.resolve()):
            raise RunError(f"{path} holds {read}, which this run reads, so it is not replaced. Choose another folder.")


def _check_name(path: Path) -> None:
    """Raise RunError if the system, or the libraries that write weights and tokenizers, reject the name."""
    with naming(path):
        path.exists()  # fails for a name that is too long
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise RunError(
            f"{path}: the name is not UTF-8, and safetensors and tokenizers write to no such path. Choose another."
        ) from None


def _is_leftover(name: str) -> bool:
    """Whether a process that was killed before it had anything leaves a file or folder of this name."""
    return UNFINISHED in name or name in LOCKS


def _is_ours(file: Path) -> bool:
    """Whether forgetlearn wrote this manifest; other programs use the name too."""
    try:
        return "forgetlearn" in json.loads(file.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about the numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def command_line() -> list[str]:
    """The command of this process, with anything that looks like a token left out."""
    return masked([Path(sys.argv[0]).name, *sys.argv[1:]])


def masked(words: Sequence[str]) -> list[str]:
    """The words of a command, with anything that looks like a token left out."""
    shown, hide_next = [], False
    for word in words:
        name, equals, _value = word.partition("=")
        is_secret = name.startswith("--") and any(secret in name.lower() for secret in SECRET_FLAGS)
        masked = f"{name}=***" if is_secret and equals else without_secrets(word)
        shown.append("***" if hide_next else masked)
        hide_next = is_secret and not equals
    return shown


def _commit() -> str | None:
    """Commit of forgetlearn's own source tree; None when it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what was begun and what is asked now compare equal."""
    plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return plain


def _check_names(config: Mapping[str, Any]) -> None:
    """Raise RunError if a setting names a file whose name is not UTF-8: no JSON or YAML file could record it."""
    for name, value in _flat(config, "").items():
        if isinstance(value, str) and any("\udc80" <= letter <= "\udcff" for letter in value):
            raise RunError(f"{name.removeprefix('.')} = {plain(value)}: the name is not UTF-8. Rename it.")


def _flat(data: object, prefix: str) -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat = {}
    for name, value in data.items():
        flat.update(_flat(value, f"{prefix}.{name}"))
    return flat


def _peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
