"""Functions of Python's `math` on a step counter that Dynamo has made an input of the graph.

Dynamo replaces ``math.f`` of a symbolic number by ``torch._sym_f`` where torch has that, and where
it has not, it compiles one graph for each value of the number: ``1 - math.pow(beta, step)`` would
cost one graph per step. These are the missing ones, in place while a step is traced.

And it takes a number for a constant until it has seen it change, which costs a graph more: what
is known to count is named to it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._dynamo import config
from torch._dynamo.callback import CallbackArgs, callback_handler


def sym_pow(x: Any, y: Any) -> Any:
    """``math.pow``: a float, also of whole numbers."""
    return (x * 1.0) ** y


def sym_exp(x: Any) -> Any:
    return math.e ** (x * 1.0)


def sym_log(x: Any) -> Any:
    log2: Any = torch._sym_log2  # type: ignore[attr-defined]  # made at run time
    return log2(x * 1.0) * math.log(2.0)


MISSING = {"_sym_pow": sym_pow, "_sym_exp": sym_exp, "_sym_log": sym_log}


class _Here(threading.local):
    """How many of the blocks below this thread is in, and what Dynamo's setting was before it was
    told not to time what its own code takes, which a fifth of a small step would be."""

    blocks = 0
    timed: bool | None = None


_here = _Here()
_LOCK = threading.RLock()  # of what follows
_blocks = 0  # of all threads
_given: tuple[str, ...] = ()  # names that torch has from here


def _give(_: CallbackArgs) -> None:
    """Dynamo begins to trace. (Where another thread is in the midst of a compilation of another
    kind, it does not say so, and the functions are missing this once.)"""
    global _given
    if not _here.blocks:
        return
    with _LOCK:
        if not _given:
            _given = tuple(name for name in MISSING if not hasattr(torch, name))
            for name in _given:
                setattr(torch, name, MISSING[name])
    if _here.timed is None:
        _here.timed, config.record_runtime_overhead = config.record_runtime_overhead, False


def _take_back(_: CallbackArgs | None = None) -> None:
    """Dynamo has ended, in whichever thread, or no block is left."""
    global _given
    with _LOCK:
        for name in _given:
            delattr(torch, name)
        _given = ()
    if _here.timed is not None:
        config.record_runtime_overhead, _here.timed = _here.timed, None


def _register() -> None:
    """Have Dynamo call the two; `torch._dynamo.reset` drops them."""
    starts, ends = callback_handler.start_callbacks, callback_handler.end_callbacks
    if _give in starts and _take_back in ends:
        return
    with _LOCK:
        if _take_back not in ends:
            callback_handler.register_end_callback(_take_back)
        if _give not in starts:
            callback_handler.register_start_callback(_give)


@contextmanager
def symbolic_math(keys: frozenset[str] = frozenset()) -> Iterator[None]:
    """Where Dynamo traces during the block, in this thread, it finds the functions above, unless
    torch has its own by now; and makes whole numbers with these ``keys`` in an optimizer's states
    and groups inputs of a graph, as soon as it sees them.

    Functions are there while it traces and not during the whole block: for every attribute that
    comes or goes, the interpreter forgets where in `torch` it found all others.
    """
    global _blocks
    _register()
    settings: Any = torch.compiler.config
    before = settings.dynamic_sources if keys else None  # the user's
    with _LOCK:
        _blocks += 1
    _here.blocks += 1
    try:
        if keys:  # the setting is this thread's alone
            settings.dynamic_sources = ",".join(filter(None, [before, _sources(keys)]))
        yield
    finally:
        if keys:
            settings.dynamic_sources = before
        _here.blocks -= 1
        with _LOCK:
            _blocks -= 1
            left = _blocks == 0 and bool(_given)
        if left or _here.timed is not None:
            _take_back()


@cache
def _sources(keys: frozenset[str]) -> str:
    """Patterns of Dynamo's names for them; its list of these cannot hold every key."""
    names = sorted(key for key in keys if re.fullmatch(r"\w+", key))
    return ",".join(rf".*\.(state|param_groups)\[.*\['{name}'\]$" for name in names)
