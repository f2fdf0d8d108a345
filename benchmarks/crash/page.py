"""The documentation page of the results."""

from typing import Any


def text(results: dict[str, Any]) -> str:
    """Markdown of all campaigns."""
    return ""
