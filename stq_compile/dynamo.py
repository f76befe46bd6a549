"""What Dynamo is translating now."""

from __future__ import annotations

from typing import Any

from torch._dynamo.symbolic_convert import tls
from torch._dynamo.variables.optimizer import OptimizerVariable
from torch.optim import Optimizer


def _translator() -> Any:
    """Dynamo's translator of this thread; None outside of Dynamo."""
    return getattr(tls, "current_tx", None)


def traced_frame() -> str:
    """The name of the outermost function that is translated; empty outside of Dynamo."""
    tx = _translator()
    return "" if tx is None else str(tx.output.root_tx.f_code.co_qualname)


def traced_optimizer() -> Optimizer | None:
    """The optimizer whose ``step`` is translated, if it is one's."""
    tx = _translator()
    if tx is None:
        return None
    frame = tx.output.root_tx
    first = frame.f_code.co_varnames[:1]  # "self", as a rule
    candidates = [*map(frame.f_locals.get, first), *frame.f_locals.get("args", ())[:1]]
    # torch's wrapper of a custom step calls it with *args
    return next((found for found in candidates if isinstance(found, Optimizer)), None)


def traced_changes() -> list[str]:
    """The kinds of Python objects that the translated function changes, tensors excepted."""
    tx = _translator()
    if tx is None:
        return []
    effects = tx.output.side_effects
    return [
        type(var).__name__ for var in effects.id_to_variable.values() if effects.is_modified(var)
    ]


def lost_attributes() -> list[str]:
    """The attributes of the optimizer that its step sets.

    Dynamo traces these statements and then forgets them: an optimizer is no object whose changes
    it replays, and the compiled step would find the old values the next time.
    """
    tx = _translator()
    if tx is None:
        return []
    changes = tx.output.side_effects.store_attr_mutations
    found = (names for item, names in changes.items() if isinstance(item, OptimizerVariable))
    return sorted({name for names in found for name in names})
