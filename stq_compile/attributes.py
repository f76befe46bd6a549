"""The lines of an optimizer that set attributes of the optimizer itself.

Dynamo traces ``self.n += 1`` in a step, and either forgets it or fails at it (an attribute that the
step has set is no number to it any more). Which of the two it does, and what it says then, depends
on the version of torch; the line is found in the source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.optim import Optimizer


class Setting(NamedTuple):
    """A statement that sets an attribute of the optimizer."""

    attribute: str
    file: str
    first: int
    last: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.first}: {self.text}"


def settings_of(cls: type[Optimizer]) -> Iterator[Setting]:
    """Every such statement in the methods of an optimizer's classes but ``__init__``."""
    for owner in cls.__mro__[: cls.__mro__.index(Optimizer)]:
        for name, method in vars(owner).items():
            function = inspect.unwrap(method) if callable(method) else None
            if inspect.isfunction(function) and name != "__init__":
                yield from _settings_in(function)


def _settings_in(function: Any) -> Iterator[Setting]:
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):  # there is no source, or not one that stands alone
        return
    names = function.__code__.co_varnames[:1]
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (t for whole in targets if whole is not None for t in ast.walk(whole)):
            if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
                continue
            if isinstance(node, ast.stmt) and target.value.id in names:
                first, last = (start - 1 + n for n in (node.lineno, node.end_lineno or node.lineno))
                text = " ".join(ast.unparse(node).split())
                yield Setting(target.attr, inspect.getfile(function), first, last, text)


def places(cls: type[Optimizer], attributes: Iterable[str]) -> str:
    """Where the methods of an optimizer set the attributes, each place in a line of its own."""
    wanted = set(attributes)
    found = (str(s) for s in settings_of(cls) if s.attribute in wanted)
    return "\n  ".join(dict.fromkeys(found))


def set_at(cls: type[Optimizer], file: str, line: int) -> Setting | None:
    """The statement in a line of a file that sets an attribute, if it is one."""
    return next((s for s in settings_of(cls) if s.file == file and s.first <= line <= s.last), None)
