"""What all tests share."""

from golden import golden, pytest_addoption, pytest_collection_modifyitems

__all__ = ["golden", "pytest_addoption", "pytest_collection_modifyitems"]
