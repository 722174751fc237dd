"""Handle Ctrl-C and SIGTERM.

Fine-tuning finishes its step and saves. Everything else ends at once, and so does fine-tuning at a second signal.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("forgetlearn")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked this process to end. It is not an Exception, so that no error handler catches it and continues."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """Exit code that a shell reports for the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


class _State:
    """The state of this process, whose main thread receives the signals."""

    waits = False  # a step is running; `requested` is read after it
    requested: int | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Raise `Interrupted` in the body on either signal; restore the earlier handlers afterwards.

    Only the command uses this: the library leaves signals to the program that uses it. Nothing changes outside the main
    thread, or for a signal that is ignored (nohup).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _State.requested = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    # Python's own handlers: a second signal ends the process, whatever it is doing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _State.waits:
        raise Interrupted(signum)
    _State.requested = signum
    log.warning("%s: finishing the step and saving it. A second signal ends at once.", signal.Signals(signum).name)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold a signal back during the body, where `requested` reports it, and raise `Interrupted` at the end."""
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False
    if _State.requested is not None:
        raise Interrupted(_State.requested)


def requested() -> bool:
    """Return True if a signal was received and has not been raised yet."""
    return _State.requested is not None


def request() -> None:
    """Act as if SIGTERM had been received, because another process of this run received a signal."""
    _State.requested = _State.requested or signal.SIGTERM
