"""stq_compile: optimizer states at a few bits, by compiling the step of the optimizer you have."""

from stq_compile.api import compile, history, report, state_dict
from stq_compile.errors import StqError
from stq_compile.packed_state import PackedState

__version__ = "0.1.0"

__all__ = ["PackedState", "StqError", "__version__", "compile", "history", "report", "state_dict"]
