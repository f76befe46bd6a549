"""``STQ_DUMP=folder``: every stage of every compile, in files.

Each optimizer of a process has a folder of its own, and in it each run of the compiler, numbered in
order: ``000_analyse/05_refuse.py``, ``001_generate/01_quantize.py``, ``001_generate/NAME.cpp``.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_NUMBER = itertools.count()


def dump_root() -> Path | None:
    """The folder that the environment names, if it names one."""
    named = os.environ.get("STQ_DUMP")
    return Path(named) if named else None


class Dump:
    """Where the stages of one optimizer's compiles go, if anywhere."""

    def __init__(self, optimizer: str) -> None:
        root = dump_root()
        name = f"{optimizer}-{os.getpid()}-{next(_NUMBER)}"
        self._folder = None if root is None else root / name
        self._count = itertools.count()

    def folder(self, run: str) -> Path | None:
        """A new folder for one run of the compiler; None if nothing is dumped."""
        if self._folder is None:
            return None
        return self._folder / f"{next(self._count):03d}_{run}"
