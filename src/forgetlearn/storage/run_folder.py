"""The run folder: what was asked for, and which stages are done with which results; resume.

A stage counts as done only when the manifest says so, and the manifest is replaced last. So a kill at any moment
leaves a folder in which `--resume` goes on after the last finished stage. The manifest holds hashes of itself and of
what each stage wrote: what was damaged since is done again, or is an error, and is never used.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from forgetlearn.errors import RunError, plain, some
from forgetlearn.runtime import processes
from forgetlearn.storage import provenance
from forgetlearn.storage.digests import HISTORY, damaged, hash_of, hashes, sha256_of
from forgetlearn.storage.disk import UNFINISHED, atomic_folder, naming, read_json, write_json
from forgetlearn.storage.records import Config, Manifest, Record, Rounding

log = logging.getLogger("forgetlearn")

MANIFEST = "manifest.json"
SUMMARY, ROWS, INPUTS = "summary.json", "facts.jsonl", "inputs.jsonl"
FORMAT = 2  # of the manifest
ARITHMETIC = "arithmetic.json"  # how a checkpoint was computed from others
RESULTS = (ROWS, INPUTS, SUMMARY, "config.yaml", "logs/*.jsonl")  # of a run
WITHOUT_EFFECT = ("checkpoint_minutes", "report_to")  # settings that may change from one resume to the next
LOCKS = (".lock", ".writer.json")  # while a process writes the run: its lock, and who it is (locks.py)
REMEDY = "Restore it from a backup"
K = TypeVar("K", bound=Record)


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
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
    ) -> RunFolder:
        """Return a new run folder, or with `resume` the existing one; see `check_output` and `check_same` for errors.

        Without `remove_leftovers` other processes may be writing in the folder.
        """
        path = Path(path)
        check_output(path, resume=resume, overwrite=overwrite)
        config, inputs = _plain(config), _plain(inputs)
        _check_names(config)
        if resume and is_run(path):
            run = cls.open(path)
            run.check_same(config, "config")
            run.check_same(inputs, "inputs")
            run._drop_damaged_stages()
        else:
            with naming(path):
                path.mkdir(parents=True, exist_ok=True)
            manifest = {
                "format": FORMAT,
                "command": provenance.command_line(),
                "config": config,
                "inputs": inputs,
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "machine": provenance.machine(),
                "stages": {},
            }
            if any(path.iterdir()):
                manifest["replaces"] = True  # known as ours before the old run goes: a kill may come in between
            run = cls(path, Manifest.parse(manifest, path / MANIFEST))
            run.note()
        if remove_leftovers:
            run.remove_leftovers()
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the run in a folder; raise RunError if there is none, or its manifest was damaged or changed."""
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise RunError(f"{path}: is not a run folder: it has no {MANIFEST}.")
        data = read_json(file)
        written = data.pop("sha256", None)
        manifest = Manifest.parse(data, file)
        if written != hash_of(data):
            raise RunError(f"{file} was changed or damaged: its hash does not match. {REMEDY}, or start a new run.")
        return cls(Path(path), manifest)

    @property
    def settings(self) -> Config:
        """The recorded settings of an update or of scores."""
        return self.config_as(Config)

    def config_as(self, kind: type[K]) -> K:
        """Return the recorded settings as a record; raise RunError if one has a value that it cannot have."""
        return kind.parse(self.manifest.config, self.path / MANIFEST, "config")

    def check_seen(self) -> None:
        """Raise RunError unless this process sees the run that process 0 writes: all need the same disk."""
        if not (self.path / MANIFEST).is_file():
            raise RunError(
                f"Process {processes.rank()} cannot see {self.path}, which process 0 writes. "
                "Choose an output folder on a file system that all machines share."
            )

    def check_same(self, now: Mapping[str, Any], part: Literal["config", "inputs"]) -> None:
        """Raise RunError, naming the first difference, unless the run was begun with the same config or inputs."""
        was, wanted = _flat(getattr(self.manifest, part), part), _flat(_plain(now), part)
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
        """Return True if a stage was finished."""
        return stage in self.manifest.stages

    def do(self, stage: str, compute: Callable[[Path], Mapping[str, Any] | None], folder: str | None = None) -> None:
        """Do a stage if it is not done: `compute` writes into a folder that appears only when it is complete.

        The folder is `stages/<stage>`, or `folder` in the run. The manifest keeps what `compute` returns, and how many
        seconds it took.
        """
        if not self.is_done(stage):
            start = time.perf_counter()
            final = self.path / (folder or f"stages/{stage}")
            with atomic_folder(final) as unfinished:
                notes = compute(unfinished)
                processes.barrier()  # others may still be writing
                digests = processes.on_main(lambda: hashes(unfinished))
            took = round(time.perf_counter() - start, 3)
            files = {f"{final.relative_to(self.path).as_posix()}/{name}": digest for name, digest in digests.items()}
            steps = self.path / f"logs/{stage}.jsonl"
            files |= {f"logs/{steps.name}": sha256_of(steps)} if steps.is_file() else {}
            self.note(
                stages=self.manifest.as_json()["stages"] | {stage: {"seconds": took, **(notes or {}), "files": files}}
            )
        shutil.rmtree(self.points(stage), ignore_errors=True)  # a kill just after the stage leaves them, too

    def points(self, stage: str) -> Path:
        """Return the folder of the checkpoints inside a stage, which exists until the stage is done."""
        return self.path / f"stages/{stage}.points"

    def rounding(self, *stages: str) -> Rounding | None:
        """Return what rounding left of the change, as the first of these stages noted it."""
        done = (self.manifest.stages.get(stage) for stage in stages)
        return next((stage.rounding for stage in done if stage and stage.rounding), None)

    def remove_stage_weights(self) -> None:
        """Delete the weights between the stages, with their folder if it holds no rows; rows and logs stay."""
        for folder in {file.parent for file in (self.path / "stages").rglob("*.safetensors")}:
            with naming(folder):
                if not list(folder.glob("*.jsonl")):
                    shutil.rmtree(folder)
                for file in folder.glob("*.safetensors"):
                    file.unlink()

    def note(self, **changes: object) -> None:
        """Add to the manifest, or change a field of it."""
        self.manifest = Manifest.parse(self.manifest.as_json() | _plain(changes), self.path / MANIFEST)
        self._save()

    def _save(self) -> None:
        noted = self.manifest.as_json()
        write_json(self.path / MANIFEST, {**noted, "sha256": hash_of(noted)})

    def finish(self) -> None:
        """Note that the run is done, its peak memory, and the hashes of its results."""
        results = sorted({file for pattern in RESULTS for file in self.path.glob(pattern)})
        digests = {file.relative_to(self.path).as_posix(): sha256_of(file) for file in results}
        self.note(finished=True, results=digests, peak_memory_gb=round(provenance.peak_memory_bytes() / 1e9, 3))

    def check_results(self, remedy: str = "run again with --overwrite") -> None:
        """Raise RunError, naming the files, if rows, summary or logs were changed since the run wrote them."""
        written = {name: digest for name, digest in self.manifest.results.items() if (self.path / name).exists()}
        self._check(written, f", or {remedy}")

    def check_stage(self, stage: str) -> None:
        """Raise RunError, naming the files, if those of a stage were changed since the run wrote them."""
        if self.is_done(stage):
            self._check(self.manifest.stages[stage].files)

    def _check(self, written: Mapping[str, str], remedy: str = "") -> None:
        if changed := damaged(self.path, written):
            names = some(changed)
            raise RunError(f"{self.path}: {names}: changed after the run wrote it (hash mismatch). {REMEDY}{remedy}.")

    def _drop_damaged_stages(self) -> None:
        """Begin again at the first stage whose files were changed: later ones were made from them."""
        stages = self.manifest.as_json()["stages"]
        for place, (name, stage) in enumerate(self.manifest.stages.items()):
            if changed := damaged(self.path, stage.files):
                again = list(stages)[place:]
                log.warning(
                    "%s: %s changed since the run wrote it; doing again: %s", self.path, some(changed), some(again)
                )
                self.note(stages={name: stages[name] for name in list(stages)[:place]})
                return

    def remove_leftovers(self) -> None:
        """Delete what a kill left half written, and a run that this one replaces; no other process may be writing."""
        replaces = self.manifest.replaces
        old = [file for file in self.path.iterdir() if file.name not in (MANIFEST, *LOCKS)] if replaces else []
        for left in (*old, *self.path.rglob(f"*{UNFINISHED}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        if replaces:
            self.note(replaces=False)


def is_run(path: str | Path) -> bool:
    """Return True if a folder holds a run, finished or not."""
    return (Path(path) / MANIFEST).is_file()


def is_finished(path: str | Path) -> bool:
    """Return True if a folder holds a finished run."""
    return is_run(path) and RunFolder.open(path).manifest.finished


def check_output(
    path: str | Path,
    *,
    resume: bool,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    can_resume: bool = True,
) -> None:
    """Raise RunError unless a run can be written to this folder without losing anything else.

    Without a flag it must not exist; with one it must be forgetlearn's. It must neither hold one of `inputs` (what the
    run reads) nor lie in one.
    """
    path, reads = Path(path), [Path(read) for read in inputs if read]
    _check_name(path)
    for read in reads:
        if read.is_dir() and path.resolve().is_relative_to(read.resolve()):
            raise RunError(f"{path} lies in {read}, which this run reads. Choose a folder outside of it.")
    if not path.exists() or (
        path.is_dir() and all(UNFINISHED in child.name or child.name in LOCKS for child in path.iterdir())
    ):  # all that a process leaves that was killed early
        return
    if resume and not overwrite and is_run(path):
        return
    if not overwrite:
        if path.is_file():
            raise RunError(f"{path} is a file. Give a folder that does not exist yet.")
        if resume:
            raise RunError(f"{path} exists but holds no run to resume. Choose another folder.")
        go_on = "--resume to continue it, or " if can_resume and is_run(path) else ""
        raise RunError(f"{path} exists. Pass {go_on}--overwrite to replace it.")
    if resume:
        raise RunError("Pass either --resume to continue the run or --overwrite to replace it, not both.")
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


def _is_ours(file: Path) -> bool:
    """Return True if forgetlearn wrote this manifest; other programs use the name too."""
    try:
        return "forgetlearn" in json.loads(file.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data as JSON gives it back, so that recorded and present settings compare equal."""
    found: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return found


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
