"""Text of others in our output: nothing in it steers the terminal."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Control characters as escapes (``\\x1b``), line breaks and tabs excepted."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def all_printable(value: Any) -> Any:
    """A JSON value with all its texts `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): all_printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [all_printable(inner) for inner in value]
    return value
