"""Ctrl-C and SIGTERM: fine-tuning finishes its step and saves, anything else ends at once; a second signal ends all."""

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
    """A signal asked this process to end. No Exception, so that nothing takes it for an error and goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that such a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


class _State:
    """Of this process: signals come to its main thread alone."""

    waits = False  # a step is being computed, at whose end the signal is asked for
    requested: int | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Within it the two signals raise `Interrupted`; the handlers from before come back after it.

    For the command: the library leaves signals to the program that uses it. In another thread than the main one
    nothing is changed, and neither is a signal that is ignored (nohup).
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
    # As Python has them: a second signal ends the process, whatever it is doing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _State.waits:
        raise Interrupted(signum)
    _State.requested = signum
    log.warning("%s: finishing the step and saving it. Once more ends at once.", signal.Signals(signum).name)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal waits for whoever asks with `requested`; at the end it is raised as `Interrupted`."""
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False
    if _State.requested is not None:
        raise Interrupted(_State.requested)


def requested() -> bool:
    """Whether a signal waits."""
    return _State.requested is not None


def request(signum: int = signal.SIGTERM) -> None:
    """As if the signal had come: another process of this run got it."""
    _State.requested = _State.requested or signum
