"""The data tests use the same small models as the module tests."""

from tests.modules.conftest import bert, cache, t5

__all__ = ["bert", "cache", "t5"]
