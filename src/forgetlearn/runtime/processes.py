"""Run in one process or several: decide which one writes, wait for others, and exchange results.

`torchrun` starts the same command in several processes and gives each its rank in the environment. Rank 0 owns the
run folder: only rank 0 writes and prints. The others compute their share, wait for rank 0, and read. In a single
process, every function here does nothing, and torch is not imported.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

from forgetlearn.errors import ConfigError, ForgetLearnError

T = TypeVar("T")
K = TypeVar("K")
HOW_TO_START = "torchrun --nproc_per_node=2 -m forgetlearn update ..."
ADDRESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Reading a large model from a slow disk takes rank 0 longer than torch's own ten minutes.
TIMEOUT = timedelta(hours=2)
SECONDS_TO_REPORT = 5.0
FAILED, REPORTED = "forgetlearn/failed", "forgetlearn/reported"
_alone: ContextVar[bool] = ContextVar("alone", default=False)


# Launched processes ------------------------------------------------------------------------------------------


def launched() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher.

    Raise ConfigError if several were started but cannot find each other.
    """
    try:
        asked = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ConfigError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']!r} in the environment: not a number.") from None
    missing = [name for name in ADDRESS if name not in os.environ]
    if asked > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE = {asked} in the environment, but not {', '.join(missing)}: the processes cannot find each "
            f"other. Start them with {HOW_TO_START}"
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        if "WORLD_SIZE" not in os.environ and tasks.isdigit() and int(tasks) > 1:
            raise ConfigError(
                f"{name} = {tasks}: {tasks} independent processes were started, and each would "
                "do all of the work. Start one task per machine, and torchrun in it (docs/scaling.md)."
            )
    return asked


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, whether or not the processes are joined yet."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() and world.isdigit() and int(world) > 1 else 0


def check_launched(asked: int | None) -> None:
    """Raise ConfigError unless as many processes run as were asked for: a launcher may silently start only one."""
    if asked is not None and asked != launched():
        raise ConfigError(
            f"--processes {asked}, but {launched()} {'was' if launched() == 1 else 'were'} started. "
            f"Start them with {HOW_TO_START}"
        )


@contextmanager
def main_speaks() -> Iterator[None]:
    """Let only rank 0 print results."""
    if launched_rank() == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Connect the processes of this launch, and disconnect them when all are done; nested calls do nothing.

    `device` is the setting model.device. Raise ConfigError if there is no GPU for this process.
    """
    if launched() == 1 or _joined():
        yield
        return
    import torch
    from torch import distributed

    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
    # gloo beside nccl: Python objects are not sent through the GPUs.
    distributed.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
        barrier()
    except Exception as error:
        error.reported_elsewhere = not _first_to_fail()  # type: ignore[attr-defined]
        raise
    distributed.destroy_process_group()


def _own_gpu(n_gpus: int) -> int:
    own = int(os.environ["LOCAL_RANK"])
    if own >= n_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES = {visible!r})"
        raise ConfigError(
            f"Process {own} of this machine has no GPU: the machine has {n_gpus}{shown}. "
            f"Start as many processes as there are GPUs: --nproc_per_node={n_gpus}."
        )
    return own


def run_tied(pickled: bytes) -> None:
    """Run a pickled `(function, arguments)` in a spawned process, and exit at once when the parent ends.

    However the parent ends, the pipe between the two closes, which ends this process too. The call is unpickled only
    after the watching thread has started, because its imports take seconds.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
    function, arguments = pickle.loads(pickled)  # from our own parent
    function(*arguments)


# Errors: the first process to fail reports -------------------------------------------------------------------


def is_reported(error: BaseException) -> bool:
    """Return True if another process reports this error or its cause."""
    # Before the processes are joined, all of them raise the same error.
    everywhere = isinstance(error, ForgetLearnError) and launched_rank() > 0
    return bool(getattr(error, "reported_elsewhere", everywhere))


def mark_reported() -> None:
    """Tell the other processes that they may end, because the error has been printed."""
    if _joined():
        from torch.distributed import distributed_c10d

        with suppress(RuntimeError):
            distributed_c10d._get_default_store().set(REPORTED, "1")


def _first_to_fail() -> bool:
    """Return True in the first process that fails, False in the others.

    The launcher ends all processes when one ends, so the others first wait until the error has been printed.
    """
    from torch.distributed import distributed_c10d

    with suppress(RuntimeError):  # the store was in a process that has ended
        store = distributed_c10d._get_default_store()
        if store.add(FAILED, 1) == 1:
            return True
        end = time.monotonic() + SECONDS_TO_REPORT
        while time.monotonic() < end and not store.check([REPORTED]):
            time.sleep(0.05)
    return False


# Between joined processes -----------------------------------------------------------------------------------


def _joined() -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Return the number of processes that work together."""
    if _alone.get() or not _joined():
        return 1
    from torch import distributed

    return distributed.get_world_size()


def rank() -> int:
    """Return the rank of this process, from 0."""
    if not _joined():
        return 0
    from torch import distributed

    return distributed.get_rank()


def is_main() -> bool:
    """Return True in rank 0, the process that writes."""
    return rank() == 0


def no_bar() -> bool | None:
    """Return tqdm's `disable`: True in all ranks but 0, where None shows a bar only in a terminal."""
    return None if is_main() else True


def check_enough_for(n_facts: int) -> None:
    """Raise ConfigError unless there is at least one fact per process."""
    if n_facts < world_size():
        raise ConfigError(f"{world_size()} processes for {n_facts} facts. Start {max(1, n_facts)} at most.")


def gather(own: T) -> list[T]:
    """Return the values of all processes, in the order of ranks; every process gets the same list."""
    if world_size() == 1:
        return [own]
    from torch import distributed

    found = [own] * world_size()
    distributed.all_gather_object(found, own)
    return found


def barrier() -> None:
    """Wait until all processes have called this."""
    gather(None)


def merged(own: Mapping[K, T]) -> dict[K, T]:
    """Return the entries of all processes in one dict."""
    return {key: value for part in gather(own) for key, value in part.items()}


def share(items: Sequence[T]) -> list[T]:
    """Return this process's part of the items: every n-th item, and equally many in each process.

    If the items cannot be divided evenly, the last one goes to several processes, because with a sharded model all
    have to compute equally often.
    """
    n = world_size()
    return [items[min(start + rank(), len(items) - 1)] for start in range(0, len(items), n)]


def on_main(compute: Callable[[], T]) -> T:
    """Call `compute` in rank 0 only; return its result, or raise its error, in all processes."""
    if world_size() == 1:
        return compute()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        token = _alone.set(True)
        try:
            outcome = compute(), None
        except (ForgetLearnError, OSError) as error:
            outcome = None, error
        finally:
            _alone.reset(token)
    answer, failure = gather(outcome)[0]
    if failure is not None:
        raise failure
    return cast(T, answer)
