"""Functions of Python's `math` on a step counter that Dynamo has made an input of the graph.

Dynamo replaces ``math.f`` of a symbolic number by ``torch._sym_f`` where torch has that, and where
it has not, it compiles one graph for each value of the number: ``1 - math.pow(beta, step)`` would
cost one graph per step. These are the missing ones, in place while a step is captured.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def sym_pow(x: Any, y: Any) -> Any:
    """``math.pow``: a float, also of whole numbers."""
    return (x * 1.0) ** y


def sym_exp(x: Any) -> Any:
    return math.e ** (x * 1.0)


def sym_log(x: Any) -> Any:
    log2: Any = torch._sym_log2  # type: ignore[attr-defined]  # made at run time
    return log2(x * 1.0) * math.log(2.0)


MISSING = {"_sym_pow": sym_pow, "_sym_exp": sym_exp, "_sym_log": sym_log}


_LOCK = threading.Lock()
_blocks = 0


@contextmanager
def symbolic_math() -> Iterator[None]:
    """Dynamo finds the functions above during the block, unless torch has its own by now.

    They are there as long as any thread is in such a block.
    """
    global _blocks
    with _LOCK:
        _blocks += 1
        for name, function in MISSING.items():
            if not hasattr(torch, name):
                setattr(torch, name, function)
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            for name, function in MISSING.items() if _blocks == 0 else ():
                if getattr(torch, name) is function:
                    delattr(torch, name)
