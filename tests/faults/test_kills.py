"""Killed at any moment, a job done again gives what it gives undisturbed; nothing else is touched."""

from __future__ import annotations

import os
import random
import re
import signal
import time

import pytest

from faults.harness import (
    OK,
    Job,
    begin,
    contents,
    count_writes,
    differences,
    ended,
    in_child,
    killed_after,
    with_fault,
)
from forgetlearn.products import publish
from hub_server import WRITE_TOKEN, serve

# Others may be writing the pages of a comparison, so what a kill left of one stays.
LEFTOVER = re.compile(r"out/\.(compare\.json|compare\.md|report\.html)\.unfinished-\w+")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def done_again(job: Job, log, whole, lost, when: str, before) -> None:
    """Do the job again after a kill, and note what differs from an undisturbed run."""
    if job.in_one_step:
        there = {name: data for name, data in job.result().items() if not name.startswith(".out")}
        if differences(there, whole) and differences(there, {"neighbour.txt": b"not yours"}):
            lost.append(f"{job.name}, {when}: half a result: {sorted(there)}")
    outcome = in_child(job.act, log)
    if outcome.code != OK:
        lost.append(f"{job.name}, {when}: cannot be done again: {outcome.said}")
    elif differ := [file for file in differences(job.result(), whole) if not LEFTOVER.fullmatch(file)]:
        lost.append(f"{job.name}, {when}: differs: {differ}")
    if differ := differences(contents(job.inputs), before):
        lost.append(f"{job.name}, {when}: inputs changed: {differ}")


def kill_at_writes(job: Job, log, tally, places) -> None:
    """Kill a child at each of these shares of its writes, and do the job again."""
    n_writes, whole, before = count_writes(job, log), job.result(), contents(job.inputs)
    with tally.no_loss() as lost:
        for at in sorted({max(1, round(share * n_writes)) for share in places}):
            job.clear()
            outcome = in_child(with_fault(job, at, None), log)
            assert outcome.code == -signal.SIGKILL, outcome.said
            tally.add("kills")
            done_again(job, log, whole, lost, f"killed at write {at} of {n_writes}", before)


def test_subtract_and_an_update_killed_at_a_few_writes(jobs, log, tally):
    kill_at_writes(jobs("subtract"), log, tally, [0.1, 0.5, 0.98])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "n"), [("subtract", 40), ("f-lora", 30), ("f-ft", 30), ("compare", 15)])
def test_killed_at_its_writes(jobs, log, tally, name, n):
    kill_at_writes(jobs(name), log, tally, [(k + 1) / n for k in range(n)])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "n"), [("subtract", 20), ("f-lora", 15), ("f-ft", 15), ("compare", 8)])
def test_killed_at_random_moments(jobs, log, tally, name, n):
    """Up to three kills before the job is let through."""
    job, draw = jobs(name), random.Random(name)
    job.clear()
    began = time.perf_counter()
    assert in_child(job.act, log).code == OK
    took, whole, before = time.perf_counter() - began, job.result(), contents(job.inputs)
    with tally.no_loss() as lost:
        for number in range(n):
            job.clear()
            for _ in range(draw.randint(1, 3)):
                if killed_after(job.act, log, draw.uniform(0, took)).code == -signal.SIGKILL:
                    tally.add("kills")
            done_again(job, log, whole, lost, f"random kills {number}", before)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_push_killed_at_each_request(jobs, log, tally):
    """The hub has nothing, or the whole commit; the run is as it was."""
    from huggingface_hub import HfApi, constants

    job, requests = jobs("f-lora"), 0
    run = job.place / "out"
    job.clear()
    assert in_child(job.act, log).code == OK
    before, files = contents(job.place), publish.contents(run, base_model_id="org/base").keys()
    with tally.no_loss() as lost, serve({}) as hub:

        def push() -> None:
            constants.HF_HUB_OFFLINE = False
            constants.HF_HUB_DISABLE_XET = True
            constants.ENDPOINT = hub.url
            publish.HfApi = lambda: HfApi(endpoint=hub.url, token=WRITE_TOKEN)
            publish.push(run, "me/mine", base_model_id="org/base")

        def check(when: str, *, must_be_there: bool) -> None:
            there = hub.written.get("me/mine@main", {}).keys()
            if (there and there != files) or (must_be_there and not there):
                lost.append(f"push, {when}: the hub has {sorted(there)}")
            if differ := differences(contents(job.place), before):
                lost.append(f"push, {when}: the run changed: {differ}")

        outcome = in_child(push, log)
        assert outcome.code == OK, outcome.said
        requests = len(hub.requests)
        assert requests >= 4
        for at in range(1, requests + 1):
            for state in (hub.written, hub.private, hub.objects, hub.requests):
                state.clear()
            child = begin(push, log)
            while len(hub.requests) < at and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            if ended(child, log).code == -signal.SIGKILL:
                tally.add("kills")
            check(f"killed at request {at}", must_be_there=False)
            outcome = in_child(push, log)
            assert outcome.code == OK, outcome.said
            check(f"again after request {at}", must_be_there=True)
