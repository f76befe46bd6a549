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


class _Blocks(threading.local):
    """The blocks below that this thread is in, the names that it gave to torch, and whether Dynamo
    was to time what its own code takes, which a fifth of a small step would be."""

    open = 0
    given: tuple[str, ...] = ()
    timed: bool | None = None


_here = _Blocks()


def _give(_: CallbackArgs) -> None:
    """Dynamo begins to trace. It does one function at a time, of all threads."""
    if _here.open:
        _here.given = tuple(name for name in MISSING if not hasattr(torch, name))
        for name in _here.given:
            setattr(torch, name, MISSING[name])
        _here.timed, config.record_runtime_overhead = config.record_runtime_overhead, False


def _take_back(_: CallbackArgs) -> None:
    for name in _here.given:
        delattr(torch, name)
    if _here.timed is not None:
        config.record_runtime_overhead = _here.timed
    _here.given, _here.timed = (), None


class symbolic_math:
    """Where Dynamo traces during the block, in this thread, it finds the functions above, unless
    torch has its own by now; and makes whole numbers with these ``keys`` in an optimizer's states
    and groups inputs of a graph, as soon as it sees them.

    Functions are there while it traces and not during the whole block: for every attribute that
    comes or goes, the interpreter forgets where in `torch` it found all others.
    """

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self.keys = keys

    def __enter__(self) -> None:
        if _give not in callback_handler.start_callbacks:  # `torch._dynamo.reset` drops them
            callback_handler.register_start_callback(_give)
            callback_handler.register_end_callback(_take_back)
        if self.keys:  # the setting is this thread's alone
            settings: Any = torch.compiler.config
            self.before = settings.dynamic_sources  # the user's
            settings.dynamic_sources = ",".join(filter(None, [self.before, _sources(self.keys)]))
        _here.open += 1

    def __exit__(self, *_: object) -> None:
        _here.open -= 1
        if self.keys:
            settings: Any = torch.compiler.config
            settings.dynamic_sources = self.before


@cache
def _sources(keys: frozenset[str]) -> str:
    """Patterns of Dynamo's names for them; its list of these cannot hold every key."""
    names = sorted(key for key in keys if re.fullmatch(r"\w+", key))
    return ",".join(rf".*\.(state|param_groups)\[.*\['{name}'\]$" for name in names)
