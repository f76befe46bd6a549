"""Holds signals back while states change: Ctrl-C before a change or after it, never in its middle.

Python runs signal handlers between any two lines of the main thread, and a handler that raises
(`KeyboardInterrupt` is one) would leave a step half made. A `scope` is opened around work of any
length; from the call of its ``hold`` on, signals wait until the scope ends, and then run the
handlers that they were for. What takes long (capture, the C++ compiler) comes before ``hold`` and
stays interruptible.

Rejected: catching `KeyboardInterrupt` and undoing the step, since a kernel that writes in place has
no old values to go back to; masking signals with ``pthread_sigmask``, which holds only what the
kernel delivers to this one thread.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps; it has no stubs
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HELD = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""What schedulers, timers and terminals send to a process that is to stop or to save."""


class _Scope:
    """Handlers that were replaced, and the signals that came since."""

    def __init__(self) -> None:
        self.former: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.received: list[tuple[int, FrameType | None]] = []
        self.released = False

    def hold(self) -> None:
        """Let signals wait from here on; those without a handler in Python are left alone."""
        if self.former:
            return
        for number in HELD:
            handler = _signal.getsignal(number)  # `signal`'s own take ten times as long, for enums
            if callable(handler):
                self.former[number] = handler
                _signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.released:  # a handler that was put back before this one has raised meanwhile
            self.former[number](number, frame)
        else:
            self.received.append((number, frame))

    def release(self) -> None:
        self.released = True
        for number, handler in self.former.items():
            _signal.signal(number, handler)
        for number, frame in self.received:
            self.former[number](number, frame)


_open: _Scope | None = None  # of the main thread, which alone runs handlers


@contextmanager
def scope() -> Iterator[Callable[[], None]]:
    """Gives ``hold``: signals that come after its call run their handlers when the scope ends.

    Inside another scope, it is the outer one that ends. In a thread that is not the main one there
    is nothing to hold back.

    A generator, which is closed if it is let go: an interrupt may come before ``__exit__`` begins.
    """
    global _open
    if threading.current_thread() is not threading.main_thread():
        yield _nothing
    elif _open is not None:
        yield _open.hold
    else:
        _open = mine = _Scope()
        try:
            yield mine.hold
        finally:
            _open = None
            mine.release()


def _nothing() -> None:
    pass
