"""The cases of a test: a few by default, the others where slow tests run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(*axes: Iterable[Any], few: Collection[tuple[Any, ...]]) -> list[Any]:
    """Every combination of values; those that are not among ``few`` are slow."""
    every = list(itertools.product(*axes))
    assert set(few) <= set(every)
    return [
        pytest.param(
            *case,
            marks=[] if case in few else pytest.mark.slow,
            id="-".join(str(value).removeprefix("torch.") for value in case),
        )
        for case in every
    ]
