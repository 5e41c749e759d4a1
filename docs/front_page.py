"""mkdocs hook: the front page of the site is README.md; notes to tests/docs/test_documented_blocks.py are left out."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page: README.md for index.md, with its links as seen from docs/."""
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", README.read_text(encoding="utf-8"))
    return re.sub(r"^<!--.*-->\n", "", markdown, flags=re.M)
