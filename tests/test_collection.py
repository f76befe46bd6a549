"""A few published optimizers, a class each; `python tests/collection.py` runs them all."""

from __future__ import annotations

import warnings

import pytest

from collection import GRAPHS, makers, run_one

SOME = (
    ("pytorch_optimizer", "AdaBelief"),  # kernels, with a counter in the group
    ("pytorch_optimizer", "SOAP"),  # matrices in lists, QR
    ("pytorch_optimizer", "SAM"),  # a wrapper whose closure is called twice
    ("torch_optimizer", "Lamb"),  # a branch on a norm
)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), SOME)
def test_some_of_the_collections(library: str, name: str) -> None:
    pytest.importorskip(library)
    ways = next(w for _, n, w in makers([library]) if n == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_one(library, name, ways)
    assert result.eager
    assert not result.failures
    assert result.equal
    assert result.packed
    assert 0 <= result.graphs <= GRAPHS
