"""One writer for a run folder, as long as its process lives."""

import errno
import os
import socket

import pytest
from filelock import FileLock

from forgetlearn.errors import ConfigError, RunError
from forgetlearn.runs.update import update
from forgetlearn.runtime import processes
from forgetlearn.storage import disk, run_folder
from forgetlearn.storage.locks import claimed, only_writer


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    run = tmp_path / "run"
    with only_writer(run):
        with pytest.raises(RunError, match=f"by process {os.getpid()} on {socket.gethostname()}"):
            update("a model", "facts", output=run, resume=True)
        (run / "result").touch()
    assert [path.name for path in run.iterdir()] == ["result"]
    with only_writer(run):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    run = tmp_path / "run"
    if not (child := os.fork()):
        lock = only_writer(run)
        lock.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert {path.name for path in run.iterdir()} == set(run_folder.LOCKS)
    run_folder.check_output(run, resume=False, overwrite=False)  # it holds nothing
    with only_writer(run):
        assert disk.read_json(run / run_folder.LOCKS[1])["pid"] == os.getpid()


@pytest.mark.parametrize("waits", [False, True])
def test_a_lock_that_cannot_be_made_is_named(tmp_path, monkeypatch, waits):
    """Found by the faults: a full disk was an error without a path, and no RunError."""

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileLock, "acquire", full)
    with (
        pytest.raises(RunError, match=r"probe\.lock: .*No space left"),
        claimed(tmp_path / "probe.lock", waits=waits),
    ):
        pass


def test_a_run_that_was_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError):
        update("a model", None, output=tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_processes_of_one_run_need_no_lock(tmp_path, monkeypatch):
    with only_writer(tmp_path):
        monkeypatch.setattr(processes, "is_main", lambda: False)
        with only_writer(tmp_path):
            pass
