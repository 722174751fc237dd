"""Write checkpoints of a stage atomically, and find the newest one that is complete.

A checkpoint is a folder with the trained weights (safetensors) and what Trainer needs to continue to the same bits:
optimiser, schedule, random states and its own state. It is valid if its marker, written last, matches its files.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from forgetlearn.errors import RunError
from forgetlearn.runtime import processes, signals
from forgetlearn.storage import digests, disk

log = logging.getLogger("forgetlearn")

MARKER, WEIGHTS = "complete.json", "weights.safetensors"


@dataclass(frozen=True)
class StageIO:
    """A stage's name, and the folders for its checkpoints and logs. The trained weights do not depend on these.

    points: the folder of its checkpoints; None keeps none. minutes: the time between two checkpoints; 0 saves only
    when the stage is asked to stop. trackers: the programs that record the numbers, by transformers' names; they
    write to the folder `logs`.
    """

    name: str = "fine-tuning"
    points: Path | None = None
    minutes: float = 0
    trackers: tuple[str, ...] = ()
    logs: Path | None = None

    def part(self, name: str) -> StageIO:
        """Return a copy for one of several fine-tunings in a stage, with its own folder of checkpoints."""
        return replace(self, points=self.points and self.points / name)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield a folder for the checkpoint after `step`. If the body succeeds, it becomes valid and replaces older ones.

    All processes call this at the same step. Raise RunError if a file cannot be written, for example on a full disk.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".{final.name}{disk.UNFINISHED}"
    with disk.naming(folder):
        if processes.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        processes.barrier()
        yield unfinished
        processes.barrier()
        if processes.is_main():
            disk.sync_files(unfinished)
            files = {file.name: [file.stat().st_size, digests.sha256_of(file)] for file in unfinished.iterdir()}
            marker = {"step": step, "world_size": processes.world_size(), "files": files}
            disk.write_json(unfinished / MARKER, marker)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            disk.sync(folder)
            for older in set(_points(folder)) - {final}:
                shutil.rmtree(older, ignore_errors=True)
        processes.barrier()


class SavedParts:
    """Saves a stage that edits facts part by part; a resumed stage continues after the last part that was saved.

    `found` are the tensors that were saved last; it is empty at the beginning.
    """

    def __init__(self, stage_io: StageIO) -> None:
        self.stage_io = stage_io
        self.saved = time.monotonic()
        point = newest(stage_io.points) if stage_io.points else None
        self.found = load_file(point / WEIGHTS) if point else {}
        self.done = int(disk.read_json(point / MARKER)["step"]) if point else 0

    def parts(self, total: int, size: int, unit: str) -> Iterator[range]:
        """Yield the parts that are left, with a progress bar. After a signal, raise Interrupted before the next one."""
        bar = tqdm(total=total, initial=self.done, desc=self.stage_io.name, unit=unit, disable=processes.no_bar())
        with signals.deferred(), bar:
            for start in range(self.done, total, size):
                part = range(start, min(start + size, total))
                yield part
                bar.update(len(part))
                if signals.requested():
                    return

    def save(self, part: range, tensors: Mapping[str, torch.Tensor]) -> None:
        """Save what was found up to the end of a part, if it is time, or if a signal was received."""
        minutes = self.stage_io.minutes
        is_due = minutes and time.monotonic() - self.saved >= 60 * minutes
        wishes = processes.gather((bool(is_due), signals.requested()))
        if any(stops for _due, stops in wishes):
            signals.request()
        if self.stage_io.points and any(map(any, wishes)):
            with writing(self.stage_io.points, part.stop) as folder:
                if processes.is_main():
                    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
            self.saved = time.monotonic()


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None; log a warning for each damaged one.

    Raise RunError if a different number of processes wrote it, because they draw other random numbers.
    """
    for point in sorted(_points(folder), reverse=True):
        if problem := _problem(point):
            log.warning("%s: ignoring this checkpoint: %s", point, problem)
            continue
        was, now = disk.read_json(point / MARKER)["world_size"], processes.world_size()
        if was != now:
            raise RunError(
                f"{point} was written by {was} processes, and now there are {now}. Resume with {was}, or "
                f"remove {folder} to begin the stage again."
            )
        return point
    return None


def _problem(point: Path) -> str:
    """Return why a checkpoint cannot be used; "" if it can."""
    if not (point / MARKER).is_file():
        return f"{MARKER} is missing, so it was not finished"
    try:
        files = disk.read_json(point / MARKER)["files"]
        for name, (size, digest) in files.items():
            file = point / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if digests.sha256_of(file) != digest:
                return f"{name} is damaged (another hash)"
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        return f"{MARKER} is damaged"
    return ""


def _points(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.is_dir()]


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights that are trained; the others have not changed since the stage began."""
    save_file({name: weight.contiguous() for name, weight in _trained(model).items()}, folder / WEIGHTS)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Load into the model what `save_weights` wrote; raise RunError if the stage trains other weights."""
    saved, trained = load_file(folder / WEIGHTS), _trained(model)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in trained.items()}:
        raise RunError(f"{folder}: holds {len(saved)} weights, expected the {len(trained)} that this stage trains.")
    for name, weight in trained.items():
        weight.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
