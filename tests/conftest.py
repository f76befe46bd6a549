"""What all tests share, and how many examples hypothesis tries.

``HYPOTHESIS_PROFILE=nightly`` (`make nightly`) tries `FACTOR` times as many examples of every
property as its test asks for, with a new seed in every run.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from small_examples import one_thread, text_file

__all__ = ["one_thread", "text_file"]

NIGHTLY = "nightly"
FACTOR = 10

settings.register_profile(
    NIGHTLY,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
nightly = os.environ.get("HYPOTHESIS_PROFILE") == NIGHTLY
if nightly:
    settings.load_profile(NIGHTLY)


@pytest.fixture(scope="module", autouse=True)
def _own_limit_of_graphs() -> None:
    """All string forms of a process share the code of torch's wrapper, and so its limit of 8
    graphs, whatever files of tests ran before in the process."""
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's own settings come before those of the profile; so they are multiplied here."""
    if not nightly:
        return
    total = 0
    for function in {id(i.obj): i.obj for i in items if isinstance(i, pytest.Function)}.values():
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None:
            examples = own.max_examples * FACTOR
            function._hypothesis_internal_use_settings = settings(
                own, max_examples=examples, derandomize=False, deadline=None
            )
            total += examples
    print(f"\nproperties are tried on {total} examples")
