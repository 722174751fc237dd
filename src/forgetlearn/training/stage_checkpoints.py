"""Checkpoints inside a stage: written in one step, and found again if they are whole.

A checkpoint is a folder with the trained weights (safetensors) and what Trainer needs to continue to the same bits:
optimiser, schedule, random numbers, its own state. It counts if its marker, written last, agrees with its files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from forgetlearn.errors import RunError
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk

log = logging.getLogger("forgetlearn")

MARKER, WEIGHTS = "complete.json", "weights.safetensors"


@dataclass(frozen=True)
class StageIO:
    """A stage's name and where it saves; the weights that come out do not depend on it.

    points: folder of its checkpoints; None keeps none. minutes: between two of them; 0 saves only when it is asked to
    stop. trackers: programs that follow the numbers, as transformers names them; they write to the folder `logs`.
    """

    name: str = "fine-tuning"
    points: Path | None = None
    minutes: float = 0
    trackers: tuple[str, ...] = ()
    logs: Path | None = None

    def part(self, name: str) -> StageIO:
        """Return the same for one of several fine-tunings in a stage."""
        return replace(self, points=self.points and self.points / name)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield a folder for the checkpoint after `step`, which counts, and replaces older ones, only if all went well.

    All processes call this at the same step. Raise RunError if the disk is full, say.
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


def newest(folder: Path) -> Path | None:
    """Return the checkpoint to continue from; None if there is none that is whole. Damaged ones are logged.

    Raise RunError if another number of processes wrote it: they draw other random numbers.
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
    """Write the weights that are trained; all others are as they were when the stage began."""
    save_file({name: weight.contiguous() for name, weight in _trained(model).items()}, folder / WEIGHTS)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Put what `save_weights` wrote into the model; raise RunError if it trains other weights."""
    saved, trained = load_file(folder / WEIGHTS), _trained(model)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in trained.items()}:
        raise RunError(f"{folder}: holds {len(saved)} weights, expected the {len(trained)} that this stage trains.")
    for name, weight in trained.items():
        weight.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
