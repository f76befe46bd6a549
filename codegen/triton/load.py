"""Importing Triton, and modules that were generated for it, when they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from torch._inductor.codecache import PyCodeCache

from stq_compile.errors import TritonMissingError


def require_triton() -> Any:
    """The ``triton`` package; raises `TritonMissingError`."""
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise TritonMissingError(reason=error) from error


def load(source: str) -> Any:
    """A generated module, from torch's cache of such files."""
    require_triton()
    return PyCodeCache.load(source)
