"""The run folder: what was asked, which stages are done, rows and weights; atomic writes and resume.

A stage counts as done only when the manifest says so, and the manifest is replaced last. So a kill at any
moment leaves a folder from which `--resume` goes on with the last stage that was finished. The manifest holds a hash of
what each stage wrote and of itself: what was damaged since is done again, or is an error, and never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from forgetlearn import processes
from forgetlearn.errors import ForgetLearnError, RunError, some, without_secrets

log = logging.getLogger("forgetlearn")

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest: since 2 it always holds a hash of itself
ARITHMETIC = "arithmetic.json"  # how a checkpoint was computed from others
HISTORY = "forgetlearn.json"  # the updates that made a model
VERSIONED = ("forgetlearn", "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy")
COMMIT_DIGITS = 40  # a commit on the hub; the SHA-256 of a folder has 64
SECRET_FLAGS = ("token", "key", "secret", "password")
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".py")
LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")  # how the names of these files begin
RESULTS = ("facts.jsonl", "inputs.jsonl", "summary.json", "config.yaml", "logs/*.jsonl")  # of a run
HASHES = "hashes.json"  # of the other files in its folder
UNFINISHED = ".unfinished-"  # what is written under another name until it is complete
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
    ) -> RunFolder:
        """A new run folder, or with `resume` the one that is there, if it was begun with the same things.

        Raises:
            RunError: the folder exists and neither flag is given, or the run in it was begun with another
                config or other inputs (the message names the first difference).

        Without `remove_leftovers` other processes may be writing in the folder.
        """
        path = Path(path)
        check_output(path, resume=resume, overwrite=overwrite)
        config, inputs = _plain(config), _plain(inputs)
        if resume and is_run(path):
            run = cls.open(path)
            run.check_same(config, "config")
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
    def open(cls, path: str | Path) -> RunFolder:
        """The run in a folder.

        Raises:
            RunError: there is none, or its manifest cannot be read or is not as it was written.
        """
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise RunError(f"{path}: no {MANIFEST} there, so it is no run folder.")
        manifest = read_json(file)
        if not {"config", "inputs", "versions", "stages"} <= manifest.keys():
            raise RunError(f"{file} was not written by forgetlearn.")
        written = manifest.pop("sha256", None)
        may_lack = written is None and manifest.get("format", 1) == 1  # else a flipped bit in its name would hide it
        if not may_lack and written != hash_of(manifest):
            raise RunError(f"{file} was changed or damaged: its hash is another. Bring it back, or begin a new run.")
        return cls(Path(path), manifest)

    def check_seen(self) -> None:
        """Nothing, if this process sees the run that process 0 writes.

        Raises:
            RunError: it does not: the folder is on a disk of another machine.
        """
        if not (self.path / MANIFEST).is_file():
            raise RunError(
                f"Process {processes.place()} does not see {self.path}, which process 0 writes. "
                "Choose an output folder on a file system that all machines share."
            )

    def check_same(self, now: Mapping[str, Any], part: str) -> None:
        """Nothing, if the run was begun with the same `part` (config or inputs).

        Raises:
            RunError: the first setting that differs, with both values.
        """
        was, wanted = _flat(self.manifest[part], part), _flat(_plain(now), part)
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
        """Nothing, if what is there of the rows, the summary and the logs of a run that is done is as it wrote it.

        Raises:
            RunError: the names of those that are not.
        """
        written = self.manifest.get("results", {})
        if changed := damaged(self.path, {name: written[name] for name in written if (self.path / name).exists()}):
            raise RunError(
                f"{self.path}: {some(changed)}: not as the run wrote it. Bring it back from a copy, or {remedy}."
            )

    def check_stage(self, stage: str) -> None:
        """Nothing, if the files of a stage are as it wrote them.

        Raises:
            RunError: the names of those that are not.
        """
        if changed := damaged(self.path, self.manifest["stages"].get(stage, {}).get("files", {})):
            raise RunError(f"{self.path}: {some(changed)}: not as the run wrote it. Bring it back from a copy.")

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


def remove_unfinished(final: Path) -> None:
    """Delete what a kill left of `atomic_folder(final)`; nobody else may be writing it."""
    for left in final.parent.glob(f".{final.name}{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


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
    """Nothing, if a run may be written to this folder without losing or changing anything else, least of all `inputs`.

    Raises:
        RunError: it is there and neither flag is given, or it is not forgetlearn's to replace, or one of the
            files and folders that the run reads lies in it, or it lies in one of them.
    """
    path, reads = Path(path), [Path(read) for read in inputs if read]
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


def _is_leftover(name: str) -> bool:
    """Whether a process that was killed before it had anything leaves a file or folder of this name."""
    return UNFINISHED in name or name in LOCKS


def _is_ours(file: Path) -> bool:
    """Whether forgetlearn wrote this manifest; other programs use the name too."""
    try:
        return "forgetlearn" in json.loads(file.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, never a part. Process 0 writes.

    Raises:
        RunError: the disk is full, or the folder cannot be written; the old file stays.
    """
    if not processes.is_main():
        return
    with (
        naming(path),
        tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}{UNFINISHED}", delete=False
        ) as file,
    ):
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o666 & ~_umask())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_json(path: Path, data: object) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a JSONL file in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        RunError: it is not there, or it is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise RunError(f"{path}: holds no JSON object. Is it from forgetlearn?")
    return data


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        RunError: it is not there, or a line is damaged.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        # All lines at once: a quarter of the time of a call for each, and names that rows share are held once.
        rows: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if len(rows) != len(lines):
        raise RunError(f"{path}: cannot be read: {len(lines)} lines hold {len(rows)} rows.")
    return rows


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which gets its final name only when all went well; the same one in all processes.

    Raises:
        RunError: writing failed, of a full disk say; nothing is left behind.
    """
    if processes.count() > 1:
        with _shared_folder(final) as unfinished:
            yield unfinished
        return
    with naming(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}{UNFINISHED}", dir=final.parent))
        try:
            unfinished.chmod(0o777 & ~_umask())
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


@contextmanager
def _shared_folder(final: Path) -> Iterator[Path]:
    """`atomic_folder` for several processes: process 0 makes it, and names it when all are done."""
    with ExitStack() as stack:
        unfinished = processes.on_main(lambda: stack.enter_context(atomic_folder(final)))
        yield unfinished
        processes.barrier()
        processes.on_main(stack.close)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what went wrong with the disk into an error that names the path."""
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
    """What went wrong with the disk, out of an error that is no OSError; nothing if it is about something else."""
    if told := re.search(r"\(os error (\d+)\)", message):  # safetensors and tokenizers, both in Rust
        return os.strerror(int(told[1]))
    if "inline_container" in message or "PytorchStreamWriter" in message:  # torch.save, which does not say why
        return "torch could not write all of it (a full disk?)"
    return "No space left on device" if "No space left" in message else ""


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


def model_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: weights, config, tokenizer, code; not its card, licence and chain."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.name != HISTORY]


def licences(folder: Path) -> list[Path]:
    """The files of a folder that say under which terms its model may be used."""
    return [path for path in sorted(folder.iterdir()) if path.name.startswith(LICENCES)]


def copy_own(path: Path, folder: Path) -> None:
    """Copy a file of a model into `folder`. A link may lead within the model's folder, or into the hub's cache.

    Raises:
        RunError: it is a link to somewhere else: what lies there is not the model's, and could be published with it.
    """
    home, target = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # what a snapshot in the hub's cache is made of
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise RunError(
            f"{path} is a link out of its folder, to {target}, and is not copied. Put the file itself there."
        )
    shutil.copyfile(path, folder / path.name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the files that a folder's model is loaded from, with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else model_files(path):
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def is_recorded(folder: Path, recorded: str | None) -> bool:
    """Whether a folder is the base that a run recorded: by its hash, or in the hub's cache, where folders are named
    by it, by its commit."""
    if recorded is not None and len(recorded) == COMMIT_DIGITS:
        return folder.resolve().name == recorded
    return recorded is not None and sha256_of(folder) == recorded


def hashes(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of every file in a folder, but for what people may edit (Markdown)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def damaged(folder: Path, written: Mapping[str, str]) -> list[str]:
    """The files that are gone, or not as they were written."""
    return [name for name in written if not (folder / name).is_file() or sha256_of(folder / name) != written[name]]


def write_hashes(folder: Path) -> None:
    """Write the hashes of a folder's files beside them, for `is_whole`."""
    write_json(folder / HASHES, hashes(folder))


def is_whole(folder: Path) -> bool:
    """Whether a folder is there with all files as `write_hashes` saw them; damage is said."""
    if not folder.is_dir():
        return False
    try:
        changed = damaged(folder, read_json(folder / HASHES))
    except RunError:
        changed = [HASHES]
    if changed:
        log.warning("%s: %s: not as it was written, so it is made again", folder, some(changed))
    return not changed


def hash_of(data: object) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _commit() -> str | None:
    """Commit of forgetlearn's own source tree; None when it is installed without one."""
    root = Path(__file__).resolve().parents[2]
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


def _flat(data: object, prefix: str) -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat = {}
    for name, value in data.items():
        flat.update(_flat(value, f"{prefix}.{name}"))
    return flat


def sync_files(folder: Path) -> None:
    """Wait until all files in a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
