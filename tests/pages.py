"""Commands and programs of the documentation, for tests that run them as they are written."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["block_after", "blocks"]

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block_after(page: str, title: str) -> str:
    """Return the code block that follows a line of the page."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^{re.escape(title)}\n+```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no code block after {title!r}"
    return found[1]
