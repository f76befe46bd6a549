"""The C++ compiler as a process: asked once what it is, and stopped when it hangs.

torch finds the compiler and knows its flags; it waits for it without limit, and so it is not torch
that runs it. A compiler that takes longer than ``$STQ_COMPILER_TIMEOUT`` seconds is killed with all
its children.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch._inductor import config
from torch._inductor.exc import CppCompileError

VARIABLE = "STQ_COMPILER_TIMEOUT"
DEFAULT = 300.0
"""Seconds; a kernel takes about one, and ten on a machine that is very busy."""
SLICE = 0.1
"""Seconds between two looks at whether to stop."""


class CompilerHungError(RuntimeError):
    """The compiler did not end in time, and was killed."""


def timeout() -> float:
    """Seconds that a compiler may take."""
    try:
        return max(SLICE, float(os.environ.get(VARIABLE, DEFAULT)))
    except ValueError:
        return DEFAULT


@lru_cache(maxsize=1)
def introduce() -> None:
    """Run each compiler that torch would try, so that one that hangs is seen before torch waits.

    Raises:
        CompilerHungError: it does not say what it is.
    """
    candidates = config.cpp.cxx
    for cxx in candidates if isinstance(candidates, (tuple, list)) else (candidates,):
        if cxx is not None:
            try:
                run([cxx, "--version"], Path.cwd())
            except (OSError, CppCompileError):
                continue  # torch tries the next one, and says so where there is none
            return


def run(command: Sequence[str] | str, cwd: Path, stop: threading.Event | None = None) -> str:
    """Run a command to its end; returns what it printed.

    Args:
        command: a list, or a line as for a shell (none is used).
        cwd: the folder in which it runs.
        stop: ends the process when set.

    Raises:
        CppCompileError: it failed.
        CompilerHungError: it took longer than `timeout`.
        OSError: it cannot be started.
    """
    words = shlex.split(command) if isinstance(command, str) else list(command)
    limit = timeout()
    process = subprocess.Popen(
        words, cwd=cwd, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output = _output(process, limit, stop)
    except BaseException:
        _kill(process)
        raise
    if process.returncode != 0:
        raise CppCompileError(words, output)
    return output


def _output(process: subprocess.Popen[str], limit: float, stop: threading.Event | None) -> str:
    waited = 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=SLICE)
            return output
        except subprocess.TimeoutExpired:
            waited += SLICE
        if stop is not None and stop.is_set():
            raise CompilerHungError("it was stopped, because another kernel could not be built")
        if waited >= limit:
            raise CompilerHungError(
                f"{process.args!r} did not end within {limit:g} seconds and was stopped; "
                f"set {VARIABLE} to the seconds that it may take"
            )


def _kill(process: subprocess.Popen[str]) -> None:
    """End the compiler and what it started, which holds its output open."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
