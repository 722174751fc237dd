"""A write that fails, or a full disk, is a message that names the path; done again, all is as undisturbed."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from faults.harness import OK, REFUSED, Job, contents, count_writes, differences, in_child, with_fault
from forgetlearn.runs.update import update
from forgetlearn.weights.folder_arithmetic import subtract_folders

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def fail_writes(job: Job, log, tally, *, fault: str, stride: int, first: int = 1) -> None:
    """Let every `stride`-th write fail: once with EIO; with ENOSPC all that follow fail too, as on a full disk."""
    n_writes, whole, before = count_writes(job, log), job.result(), contents(job.inputs)
    with tally.no_loss() as lost:
        for at in range(first, n_writes + 1, stride):
            job.clear()
            when = f"{job.name}, {fault} at write {at} of {n_writes}"
            outcome = in_child(with_fault(job, at, FAULTS[fault], stays=fault == "ENOSPC"), log)
            tally.add("failed writes")
            if outcome.code not in (OK, REFUSED):
                lost.append(f"{when}: no message, but {outcome.said}")
            differ = differences(job.result(), whole)
            if outcome.code == OK and [name for name in differ if not name.rpartition("/")[2].startswith(".")]:
                lost.append(f"{when}: said nothing, and differs: {differ}")
            if (
                job.in_one_step and outcome.code == REFUSED and differ and len(job.result()) > 1
            ):  # neither all nor nothing
                lost.append(f"{when}: left {sorted(job.result())}")
            again = in_child(job.act, log)
            if again.code != OK or (differ := differences(job.result(), whole)):
                lost.append(f"{when}: done again: {again.said or differ}")
            if differ := differences(contents(job.inputs), before):
                lost.append(f"{when}: inputs changed: {differ}")


def test_subtract_with_a_few_failing_writes(jobs, log, tally):
    fail_writes(jobs("subtract"), log, tally, fault="EIO", stride=20)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "stride"), [("subtract", 1), ("f-lora", 3), ("f-ft", 3), ("compare", 3)])
def test_each_write_fails_in_turn(jobs, log, tally, name, stride, fault):
    fail_writes(jobs(name), log, tally, fault=fault, stride=stride, first=1 + (fault == "EIO") * (stride // 2))


@pytest.fixture
def disk(tmp_path):
    """`disk(kilobytes)`: an empty file system of that size; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(kilobytes: int):
        if mounted:
            subprocess.run(["umount", place], check=True)
            mounted.clear()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")
        mounted.append(True)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["subtract", "f-lora", "f-ft"])
def test_a_disk_that_is_too_small(jobs, disk, inputs, log, tally, name):
    """From a few kilobytes to nearly enough: a message, nothing half written that counts, and with room the result."""
    job = jobs(name)
    job.clear()
    assert in_child(job.act, log).code == OK
    needed = sum(len(data) for data in job.result().values()) // 1024
    with tally.no_loss() as lost:
        for tenths in range(1, 10):
            place = disk(max(8, needed * tenths // 10))

            def act(place=place):
                if name == "subtract":
                    return subtract_folders(inputs / "base", place / "out", 0.5, tuned=inputs / "tuned")
                return update(inputs / "base", inputs / "facts.jsonl", job.config, output=place / "out", resume=True)

            outcome = in_child(act, log)
            tally.add("full disks")
            if outcome.code == OK:
                continue  # weights between stages and checkpoints come and go: the size is a guess
            if outcome.code != REFUSED:
                lost.append(f"{name}, {tenths}/10 of the room: no message, but {outcome.said}")
            if job.in_one_step and any(place.iterdir()):
                lost.append(f"{name}, {tenths}/10 of the room: left {sorted(contents(place))}")
            subprocess.run(["mount", "-o", f"remount,size={needed * 20}k", place], check=True)
            again = in_child(act, log)
            # A path of its own stands in cards and configs, so what counts are weights and rows.
            there, whole = contents(place), job.result()
            differ = [file for file in differences(there, whole) if file.endswith((".safetensors", ".jsonl"))]
            if again.code != OK or differ:
                lost.append(f"{name}, {tenths}/10 of the room, then more: {again.said or differ}")
