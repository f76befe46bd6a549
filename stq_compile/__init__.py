"""stq_compile: optimizer states at a few bits, by compiling the step of the optimizer you have."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stq_compile.api import compile, history, log, report, state_dict
    from stq_compile.errors import StqError
    from stq_compile.packed_state import PackedState

__version__ = "0.1.0"

__all__ = [
    "PackedState",
    "StqError",
    "__version__",
    "compile",
    "history",
    "log",
    "report",
    "state_dict",
]

_HOMES = {
    **dict.fromkeys(("compile", "history", "log", "report", "state_dict"), "api"),
    "StqError": "errors",
    "PackedState": "packed_state",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``stq --help`` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
