"""The run folder: settings, finished stages and their results, and how a run is resumed.

A stage counts as done only when the manifest says so, and the manifest is written last. So a run that is killed at any
moment can be resumed after its last finished stage. The manifest holds hashes of itself and of the files that each
stage wrote. Damaged files are never used: their stage is done again, or an error is raised.
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
FAILED, RIGHT = "failed.jsonl", "right.jsonl"
STREAM = "stream.json"  # the batches of a stream of updates
FORMAT = 2  # version of the manifest's format
ARITHMETIC = "arithmetic.json"  # how a checkpoint was computed from others
PROBES = "probes.jsonl"  # what was asked beyond the facts' own wordings, and answered
LESSONS = "lessons.jsonl"  # what each fact was trained on
KEPT_FACTS, TRUTH = "kept_facts.jsonl", "truth.jsonl"  # of a run that only forgets: rows of facts to keep, truth ratios
RESULTS = (
    ROWS,
    KEPT_FACTS,
    TRUTH,
    INPUTS,
    LESSONS,
    PROBES,
    FAILED,
    RIGHT,
    SUMMARY,
    STREAM,
    "config.yaml",
    "logs/*.jsonl",
)  # files whose hashes `finish` records
WITHOUT_EFFECT = ("checkpoint_minutes", "report_to")  # settings that may differ when a run is resumed
LOCKS = (".lock", ".writer.json")  # exist while a process writes the run: its lock, and its id and host
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

        Pass `remove_leftovers=False` if other processes may be writing into the folder.
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
                manifest["replaces"] = True  # noted before the old run is deleted, in case this process is killed
            run = cls(path, Manifest.parse(manifest, path / MANIFEST))
            run.note()
        if remove_leftovers:
            run.remove_leftovers()
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the run in a folder; raise RunError if the folder holds none, or its manifest was damaged or changed."""
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise RunError(_no_run(Path(path)))
        data = read_json(file)
        written = data.pop("sha256", None)
        manifest = Manifest.parse(data, file)
        if written != hash_of(data):
            raise RunError(f"{file} was changed or damaged: its hash does not match. {REMEDY}, or start a new run.")
        return cls(Path(path), manifest)

    @property
    def settings(self) -> Config:
        """The recorded settings of an update or an evaluation."""
        return self.config_as(Config)

    def config_as(self, kind: type[K]) -> K:
        """Return the recorded settings as a record of this kind; raise RunError if a value is invalid."""
        return kind.parse(self.manifest.config, self.path / MANIFEST, "config")

    def check_seen(self) -> None:
        """Raise RunError unless this process can see the run that the main process writes, on a shared disk."""
        if not (self.path / MANIFEST).is_file():
            raise RunError(
                f"Process {processes.rank()} cannot see {self.path}, which process 0 writes. "
                "Choose an output folder on a file system that all machines share."
            )

    def check_same(self, now: Mapping[str, Any], part: Literal["config", "inputs"]) -> None:
        """Raise RunError, naming the first difference, if the recorded config or inputs (`part`) differ from `now`."""
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
        """Return True if the stage is finished."""
        return stage in self.manifest.stages

    def do(self, stage: str, compute: Callable[[Path], Mapping[str, Any] | None], folder: str | None = None) -> None:
        """Do a stage unless it is done: `compute` writes into a temporary folder, which is then renamed.

        The folder becomes `stages/<stage>`, or `folder` if it is given. The manifest records the notes that `compute`
        returns and how many seconds it took.
        """
        if not self.is_done(stage):
            start = time.perf_counter()
            final = self.path / (folder or f"stages/{stage}")
            with atomic_folder(final) as unfinished:
                notes = compute(unfinished)
                processes.barrier()  # other processes may still be writing
                digests = processes.on_main(lambda: hashes(unfinished))
            took = round(time.perf_counter() - start, 3)
            files = {f"{final.relative_to(self.path).as_posix()}/{name}": digest for name, digest in digests.items()}
            steps = self.path / f"logs/{stage}.jsonl"
            files |= {f"logs/{steps.name}": sha256_of(steps)} if steps.is_file() else {}
            self.note(
                stages=self.manifest.as_json()["stages"] | {stage: {"seconds": took, **(notes or {}), "files": files}}
            )
        shutil.rmtree(self.points(stage), ignore_errors=True)  # also if a process was killed just before this

    def points(self, stage: str) -> Path:
        """Return the folder of the checkpoints made during a stage; it is deleted when the stage is done."""
        return self.path / f"stages/{stage}.points"

    def rounding(self, *stages: str) -> Rounding | None:
        """Return how much of the change survived rounding, from the first of these stages that recorded it."""
        done = (self.manifest.stages.get(stage) for stage in stages)
        return next((stage.rounding for stage in done if stage and stage.rounding), None)

    def remove_stage_weights(self) -> None:
        """Delete the weights that stages kept for later stages, and folders that hold no rows; rows and logs stay."""
        for folder in {file.parent for file in (self.path / "stages").rglob("*.safetensors")}:
            with naming(folder):
                if not list(folder.glob("*.jsonl")):
                    shutil.rmtree(folder)
                for file in folder.glob("*.safetensors"):
                    file.unlink()

    def note(self, **changes: object) -> None:
        """Set fields of the manifest and write it."""
        self.manifest = Manifest.parse(self.manifest.as_json() | _plain(changes), self.path / MANIFEST)
        self._save()

    def _save(self) -> None:
        noted = self.manifest.as_json()
        write_json(self.path / MANIFEST, {**noted, "sha256": hash_of(noted)})

    def finish(self) -> None:
        """Record in the manifest that the run is finished, its peak memory, and the hashes of its results."""
        results = sorted({file for pattern in RESULTS for file in self.path.glob(pattern)})
        digests = {file.relative_to(self.path).as_posix(): sha256_of(file) for file in results}
        self.note(finished=True, results=digests, peak_memory_gb=round(provenance.peak_memory_bytes() / 1e9, 3))

    def check_results(self, remedy: str = "run again with --overwrite") -> None:
        """Raise RunError, naming the files, if rows, summary or logs were changed since the run wrote them."""
        written = {name: digest for name, digest in self.manifest.results.items() if (self.path / name).exists()}
        self._check(written, f", or {remedy}")

    def check_stage(self, stage: str) -> None:
        """Raise RunError, naming the files, if files of a stage were changed since the run wrote them."""
        if self.is_done(stage):
            self._check(self.manifest.stages[stage].files)

    def _check(self, written: Mapping[str, str], remedy: str = "") -> None:
        if changed := damaged(self.path, written):
            names = some(changed)
            raise RunError(f"{self.path}: {names}: changed after the run wrote it (hash mismatch). {REMEDY}{remedy}.")

    def _drop_damaged_stages(self) -> None:
        """Drop the first stage whose files were changed, and all later ones, which were made from it."""
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
        """Delete half-written files of a killed process, and the run that this one replaces, if any.

        No other process may be writing into the folder.
        """
        replaces = self.manifest.replaces
        old = [file for file in self.path.iterdir() if file.name not in (MANIFEST, *LOCKS)] if replaces else []
        for left in (*old, *self.path.rglob(f"*{UNFINISHED}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        if replaces:
            self.note(replaces=False)


def _no_run(path: Path) -> str:
    """Return a message for a folder that holds no run."""
    if not path.exists():
        return f"{path}: does not exist. Give the folder that --output named when the run was made."
    of_run = f" {path.parent} is one." if is_run(path.parent) else ""
    return f"{path}: is not a run folder: it has no {MANIFEST}.{of_run}"


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

    Without `resume` or `overwrite` the folder must not exist; with one of them, forgetlearn must have written it. It
    must neither contain any of `inputs`, the files and folders that the run reads, nor lie inside one.
    """
    path, reads = Path(path), [Path(read) for read in inputs if read]
    _check_name(path)
    for read in reads:
        if read.is_dir() and path.resolve().is_relative_to(read.resolve()):
            raise RunError(f"{path} lies in {read}, which this run reads. Choose a folder outside of it.")
    if not path.exists() or (
        path.is_dir() and all(UNFINISHED in child.name or child.name in LOCKS for child in path.iterdir())
    ):  # a process that was killed early leaves nothing else
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
    """Raise RunError if the file system, or a library that writes weights or tokenizers, would reject the name."""
    with naming(path):
        path.exists()  # raises OSError if the name is too long
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise RunError(
            f"{path}: the name is not UTF-8, and safetensors and tokenizers write to no such path. Choose another."
        ) from None


def _is_ours(file: Path) -> bool:
    """Return True if forgetlearn wrote this file; other programs use the same names."""
    try:
        return "forgetlearn" in json.loads(file.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data as it is read back from JSON, so that recorded and current settings can be compared."""
    found: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return found


def _check_names(config: Mapping[str, Any]) -> None:
    """Raise RunError if a setting holds a file name that is not UTF-8, which JSON and YAML cannot record."""
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
