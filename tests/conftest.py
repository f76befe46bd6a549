"""What all tests share."""

from golden import golden, pytest_addoption, pytest_collection_modifyitems
from small_examples import one_thread, text_file

__all__ = [
    "golden",
    "one_thread",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "text_file",
]
